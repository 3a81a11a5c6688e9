"The pipeline with small random weights: sizes, kinds, batches, tiles, files, errors."
import json
import shutil
from copy import deepcopy
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from diffusers import AutoencoderKL
from tocsr.adapt import condition
from tocsr.degradations import degrade, imresize
from tocsr.diffusion import nano_unet, noise_schedule
from tocsr.latents import LatentCodec, fit_pca
from tocsr.onestep import Fusion, Generator, freeze_statistics, localize, one_step, save_update
from tocsr.pipeline import Enlarged, TOCSRPipeline, as_tensors, measure_peak, model_info, tile_difference, tiled
from tocsr.profiles import UNetConfig
from tocsr.store import StoreError, read_weights, save_weights
from tocsr.surrogates import cut


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    cfg = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
    smooth = F.interpolate(torch.rand(8, 3, 16, 16), 64, mode="bicubic").clamp(0, 1)*2 - 1
    return TOCSRPipeline(Generator(LatentCodec(fit_pca(smooth)), condition(cut(nano_unet(cfg, 16)), 16), noise_schedule("v_prediction")))


def picture(h, w, seed=0):
    "A smooth random picture, uint8 (h, w, 3)."
    x = imresize(torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(seed)), size=(h, w)).clamp(0, 1)
    return (x*255).byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 65), (1, 40), (2, 300)])
def test_every_size_comes_out_four_times_as_large(pipe, size):
    out = pipe(picture(*size), tile=64, overlap=16, output_type="np").images[0]
    assert out.shape == (4*size[0], 4*size[1], 3) and out.dtype == np.uint8


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_kinds_in_and_out_agree(pipe, kind):
    a = picture(12, 20)
    given = dict(pil=Image.fromarray(a), np=a, pt=torch.from_numpy(a).permute(2, 0, 1)/127.5 - 1)[kind]
    want, out = pipe(a, output_type="np").images[0], pipe(given, output_type=kind).images[0]
    got = dict(pil=np.asarray, np=np.asarray, pt=lambda t: ((t + 1)*127.5).round().byte().permute(1, 2, 0).numpy())[kind](out)
    assert np.abs(got.astype(int) - want).max() <= 1


def test_a_batch_equals_its_pictures(pipe):
    a = [picture(12, 20, s) for s in range(3)]
    together = pipe(np.stack(a), output_type="np").images
    assert all((pipe(x, output_type="np").images[0] == y).all() for x, y in zip(a, together))
    mixed = pipe([a[0], Image.fromarray(picture(5, 9))], output_type="np").images
    assert (mixed[0] == together[0]).all() and mixed[1].shape == (20, 36, 3)


def test_seed_decides_the_result(pipe):
    a = picture(16, 16)
    r = [pipe(a, seed=s, output_type="np").images[0] for s in (3, 3, 4)]
    assert (r[0] == r[1]).all() and not (r[0] == r[2]).all()


@pytest.mark.parametrize("scale, size", [(4, (80, 48)), (3, (60, 36)), (2, (40, 24)), (1.5, (30, 18))])
def test_smaller_scales(pipe, scale, size):
    assert pipe(picture(20, 12), scale=scale, output_type="np").images[0].shape[:2] == size


def test_tiles_do_not_show_where_the_generator_is_local():
    x, noise = Enlarged(torch.rand(1, 3, 60, 80), 4), torch.randn(1, 16, 32, 40)
    local = lambda v, z: v + F.interpolate(z[:, :3], scale_factor=8)
    assert torch.allclose(tiled(local, x, noise, 128, 64), tiled(local, x, noise, None, 64), atol=1e-5)


def test_tiles_of_different_brightness_are_cross_faded():
    "Attention and normalisation see one tile: what they change must fade over the overlap, not step."
    noise = torch.randn(1, 16, 32, 40, generator=torch.Generator().manual_seed(0))
    own = lambda v, z: v + 20*z.mean()                              # every tile shifts by a number of its own
    out = tiled(own, Enlarged(torch.zeros(1, 3, 64, 80), 4), noise, 128, 64)
    step = max(out.diff(dim=d).abs().max() for d in (-1, -2))
    assert out.std() > 0.05 and step < 3*(out.max() - out.min())/64


@pytest.mark.parametrize("size, tile", [((40, 90), 32), ((130, 33), 64), ((64, 64), 16)])
def test_a_local_models_tiles_are_the_whole_picture(pipe, size, tile):
    g = deepcopy(pipe.generator)
    freeze_statistics(g.unet, lambda u: one_step(g.model._replace(unet=u), torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)))
    steady, shares = TOCSRPipeline(g), []
    whole, cut_up = (steady(picture(*size), tile=t, output_type="pt", progress=f).images[0] for t, f in ((None, shares.append), (tile, shares.append)))
    assert (whole - cut_up).abs().max() < 1e-3 and shares[1:] == sorted(shares[1:]) and shares[-1] == 1
    assert tile_difference(steady, picture(*size), tile=tile)["max"] < .2


def test_a_local_network_behind_a_normalising_autoencoder_is_cross_faded(pipe):
    "An AutoencoderKL normalises over the whole picture: its tiles cannot be exact, and must not fail."
    g = deepcopy(pipe.generator)
    localize(g.unet)
    g.codec = LatentCodec(AutoencoderKL(latent_channels=16, block_out_channels=(8,)*4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4))
    other = TOCSRPipeline(g)
    assert g.local and not other.local and other(picture(40, 40), tile=32, output_type="np").images[0].shape == (160, 160, 3)


def test_tiled_and_untiled_results_are_close(pipe):
    assert 0 < tile_difference(pipe, picture(64, 96), tile=32, overlap=16)["mean"] < 5      # grey levels


def test_consistency_on_bicubic_inputs_is_below_half_a_grey_level(pipe):
    hr = imresize(torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1)), size=(128, 128)).clamp(0, 1)*1.6 - .8
    lr = degrade(hr, "bicubic")
    sr = pipe(lr, coarse=1, output_type="np").images[0]
    back = imresize(torch.from_numpy(sr).permute(2, 0, 1)[None]/127.5 - 1, 1/4)
    assert (back - lr).abs().mean()*127.5 < 0.5


def test_a_saved_pipeline_is_the_same(pipe, tmp_path):
    a = picture(16, 16)
    pipe.save_pretrained(tmp_path/"m")
    assert (TOCSRPipeline.from_pretrained(tmp_path/"m")(a, output_type="np").images[0] == pipe(a, output_type="np").images[0]).all()
    assert {f.suffix for f in (tmp_path/"m").rglob("*") if f.is_file()} == {".json", ".safetensors"}


@pytest.mark.parametrize("image, words", [
    (torch.full((3, 4, 4), float("nan")), "NaN"), (torch.zeros(1, 4, 4), "(1, 4, 4)"), (torch.zeros(3, 4, 4, dtype=torch.uint8), "floating point"),
    (np.zeros((4, 4, 4), np.uint8), "(4, 4, 4)"), (np.zeros((4, 4, 3), np.float32), "uint8"), (np.zeros((0, 4, 3), np.uint8), "without pixels"),
    ("photo.png", "str"), ([], "no picture"), (torch.full((3, 4, 4), 200.), "200")])
def test_bad_pictures_are_refused_with_a_reason(pipe, image, words):
    with pytest.raises(ValueError, match="(?s).*") as e: pipe(image)
    assert words in str(e.value)


@pytest.mark.parametrize("arguments, words", [
    (dict(scale=8), "at most 4"), (dict(scale=-1), "above 0"), (dict(tile=100), "multiples of 16"), (dict(tile=32, overlap=32), "overlap"), (dict(output_type="jpg"), "pil"),
    (dict(strength=1.5), "0..1"), (dict(steps=2), "1 step, not 2"), (dict(coarse=0), "1 or more")])
def test_bad_arguments_are_refused_with_a_reason(pipe, arguments, words):
    with pytest.raises(ValueError) as e: pipe(picture(8, 8), **arguments)
    assert words in str(e.value)


def test_broken_folders_are_refused(pipe, tmp_path):
    with pytest.raises(StoreError, match="config.json is missing"): TOCSRPipeline.from_pretrained(tmp_path)
    folder = pipe.save_pretrained(tmp_path/"m")
    weights = folder/"unet"/"model.safetensors"
    whole = weights.read_bytes(); weights.write_bytes(whole[:len(whole)//2])
    with pytest.raises(StoreError, match="truncated"): TOCSRPipeline.from_pretrained(folder)
    weights.write_bytes(whole)
    (folder/"config.json").write_text(json.dumps(dict(_class_name="StableDiffusionPipeline")))
    with pytest.raises(StoreError, match="StableDiffusionPipeline"): TOCSRPipeline.from_pretrained(folder)


def test_sixteen_bit_and_transparent_pictures_are_converted():
    deep = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    assert as_tensors(deep)[0].min() == 1 and as_tensors(Image.new("RGBA", (3, 3), (0, 0, 0, 0)))[0].min() == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 65)])
def test_windows_agree_with_the_whole_enlargement(size):
    x = Enlarged(torch.rand(1, 3, *size), 4)
    H, W = x.size
    whole = x.window(0, 0, H, W)
    assert torch.allclose(whole[..., :4*size[0], :4*size[1]], imresize(x.lr, 4), atol=1e-6)
    for top in range(0, H, 64):
        for left in range(0, W, 64): assert torch.allclose(x.window(top, left, 64, 64), whole[..., top:top + 64, left:left + 64], atol=1e-6)


def test_strength_goes_from_bicubic_to_the_model(pipe):
    a = picture(12, 20)
    low, half, full = (pipe(a, strength=s, output_type="pt").images[0] for s in (0, .5, 1))
    assert torch.allclose(half, (low + full)/2, atol=1e-5) and not torch.allclose(low, full, atol=.01)


def test_progress_is_told_up_to_the_end(pipe):
    shares = []
    pipe([picture(8, 8), picture(40, 40)], tile=32, overlap=16, progress=shares.append)
    assert shares == sorted(shares) and shares[0] == .5 and shares[-1] == 1 and len(shares) == 5


def test_a_model_that_returns_nan_is_an_error_and_no_picture(pipe):
    broken = TOCSRPipeline(torch.nn.Identity()); broken.generator.codec = pipe.generator.codec
    broken.generator.forward = lambda x, z: x*float("nan")
    with pytest.raises(RuntimeError, match="NaN"): broken(picture(8, 8))


def test_tensors_missing_from_the_autoencoder_are_an_error(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path/"m")
    file = folder/"vae/diffusion_pytorch_model.safetensors"
    save_weights(file, {k: v for k, v in read_weights(file).items() if k != "gain"}, format="pt")
    with pytest.raises(StoreError, match="gain"): TOCSRPipeline.from_pretrained(folder)


def test_hub_folders_go_up_and_come_down(pipe, tmp_path, monkeypatch):
    import huggingface_hub as hub
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, private, exist_ok): return SimpleNamespace(repo_id=repo_id)
        def upload_folder(self, repo_id, folder_path): shutil.copytree(folder_path, tmp_path/repo_id); return f"hub/{repo_id}"
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, revision, allow_patterns: str(tmp_path/name))
    monkeypatch.chdir(tmp_path.parent)
    assert pipe.push_to_hub("me/model") == "hub/me/model"
    assert (TOCSRPipeline.from_pretrained("me/model")(picture(8, 8), output_type="np").images[0] == pipe(picture(8, 8), output_type="np").images[0]).all()
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **kw: 1/0)
    with pytest.raises(StoreError, match="hub did not deliver"): TOCSRPipeline.from_pretrained("me/other")


def test_model_info(pipe):
    i = model_info(pipe)
    assert (i.scale, i.multiple, i.steps, i.latent_channels) == (4, 16, "1", 16) and i.macs_per_pixel > 0 and i.licence == "not stated by the model"


def test_memory_grows_with_the_result_not_with_its_copies(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path/"m")
    m = measure_peak(folder, 384, tile=64)
    assert m["result"] == [1536, 1536] and (m["peak_gb"] - m["loaded_gb"])*1e9 < 144*1536**2      # twelve float pictures of three channels


def test_a_fusion_is_saved_seen_and_missed(pipe, tmp_path):
    g, a = pipe.generator, picture(16, 16)
    torch.manual_seed(0)
    fused = TOCSRPipeline(Generator(g.codec, g.unet, g.schedule, g.gain, Fusion(1, 8)))
    assert (fused(a, output_type="np").images[0] == pipe(a, output_type="np").images[0]).all(), "it starts as the identity"
    torch.nn.init.normal_(fused.generator.fusion.tail.weight, 0, .2)
    out = fused(a, output_type="np").images[0]
    folder = fused.save_pretrained(tmp_path/"m")
    assert (TOCSRPipeline.from_pretrained(folder)(a, output_type="np").images[0] == out).all() and (out != pipe(a, output_type="np").images[0]).any()
    file = folder/"fusion/diffusion_pytorch_model.safetensors"
    whole = read_weights(file)
    save_weights(file, {k: v for k, v in whole.items() if "tail" not in k}, format="pt")
    with pytest.raises(StoreError, match="tail"): TOCSRPipeline.from_pretrained(folder)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(StoreError, match="truncated"): TOCSRPipeline.from_pretrained(folder)
    file.unlink()
    with pytest.raises(StoreError, match="no weights"): TOCSRPipeline.from_pretrained(folder)
    file.with_name("config.json").unlink()
    with pytest.raises(StoreError, match="fusion/config.json is missing"): TOCSRPipeline.from_pretrained(folder)


def test_an_update_beside_the_weights_is_read_along(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    moved = deepcopy(pipe.generator)
    with torch.no_grad():
        for w in moved.unet.parameters(): w += 0.1*w.abs().mean()
    save_update(tmp_path/"update.safetensors", pipe.generator, moved)
    read = TOCSRPipeline.from_pretrained(tmp_path)
    gap = lambda a, b: sum((u - v).pow(2).sum() for u, v in zip(a.generator.unet.parameters(), b.unet.parameters())).sqrt().item()
    assert gap(read, moved) < 0.2*gap(pipe, moved)
    read.save_pretrained(tmp_path/"sum")
    assert not (tmp_path/"sum/update.safetensors").exists() and gap(TOCSRPipeline.from_pretrained(tmp_path/"sum"), read.generator) < 1e-6
    (tmp_path/"update.safetensors").write_bytes(b"cut")
    with pytest.raises(StoreError, match="update.safetensors"): TOCSRPipeline.from_pretrained(tmp_path)
