"Pairs and endpoints on disk: deterministic, continued after a kill, damaged ones refused."
import pytest
import torch
import torch.nn.functional as F
from tocsr.adapt import CHUNK, Chunks, PairPool, SRModel, condition, load_model, make_pairs, save_model, start_latent, start_noise, write_chunks
from tocsr.degradations import imresize
from tocsr.diffusion import nano_unet, noise_schedule
from tocsr.images import load_photos
from tocsr.latents import LatentCodec, fit_pca
from tocsr.onestep import consistent
from tocsr.profiles import DataConfig, UNetConfig
from tocsr.store import StoreError
from tocsr.surrogates import cut

THIN = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)


@pytest.fixture(scope="module")
def photos(): return load_photos(DataConfig(patch=64)).split("train")


@pytest.fixture(scope="module")
def codec(photos): return LatentCodec(fit_pca(photos.crops(12, 128, torch.Generator().manual_seed(0)), 4)).eval()


@pytest.mark.parametrize("kind", ["bicubic", "realesrgan"])
def test_a_killed_pool_is_continued_to_the_same_bytes(tmp_path, photos, codec, kind, monkeypatch):
    count = CHUNK + 3
    make_pairs(tmp_path/"whole", codec, photos, count, kind, patch=32)
    calls, crops = [], type(photos).crops
    def dying(self, *args):
        calls.append(0)
        if len(calls) == CHUNK + 2: raise KeyboardInterrupt
        return crops(self, *args)
    monkeypatch.setattr(type(photos), "crops", dying)
    with pytest.raises(KeyboardInterrupt): make_pairs(tmp_path/"killed", codec, photos, count, kind, patch=32)
    assert [f.name for f in (tmp_path/"killed").iterdir()] == ["chunk-000000.safetensors"]
    make_pairs(tmp_path/"killed", codec, photos, count, kind, patch=32)
    for a, b in zip(sorted((tmp_path/"whole").iterdir()), sorted((tmp_path/"killed").iterdir())): assert a.read_bytes() == b.read_bytes()


def test_damaged_and_missing_chunks_are_refused(tmp_path):
    with pytest.raises(StoreError, match="lacks"): PairPool(tmp_path)
    write_chunks(tmp_path, 2*CHUNK + 1, lambda n: dict(x=torch.tensor(list(n)).float()[:, None]))
    assert Chunks(tmp_path).read("x", [0, CHUNK, 2*CHUNK]).flatten().tolist() == [0, CHUNK, 2*CHUNK]
    last = tmp_path/"chunk-000002.safetensors"; data = last.read_bytes()
    last.write_bytes(data[:len(data) - 3])
    with pytest.raises(StoreError, match="truncated"): Chunks(tmp_path)
    last.write_bytes(data); (tmp_path/"chunk-000001.safetensors").unlink()
    with pytest.raises(StoreError, match="lacks"): Chunks(tmp_path)


@pytest.mark.parametrize("wrap", [cut, lambda u: u])
def test_a_fresh_condition_changes_nothing(wrap):
    torch.manual_seed(0)
    unet = wrap(nano_unet(THIN, 16)).eval(); new = condition(unet, 16)
    z, t, context = torch.randn(2, 16, 16, 16), torch.tensor([3, 980]), torch.ones(2, 1, 64)
    with torch.no_grad(): assert torch.allclose(new(torch.cat([z, 9*torch.randn_like(z)], 1), t, context).sample, unet(z, t, context).sample, atol=1e-5)


def test_a_conditioned_model_is_read_back_and_foreign_weights_are_refused(tmp_path):
    torch.manual_seed(0)
    a, b = (condition(cut(nano_unet(THIN, c)), c) for c in (16, 4))
    save_model(tmp_path/"a", SRModel(a, noise_schedule("epsilon"), torch.arange(1., 17.))); save_model(tmp_path/"b", SRModel(b, noise_schedule("v_prediction")))
    again = load_model(tmp_path/"a")
    assert again.schedule.config.prediction_type == "epsilon" and all(torch.equal(v, again.unet.state_dict()[k]) for k, v in a.state_dict().items())
    assert torch.equal(again.gain, torch.arange(1., 17.)) and load_model(tmp_path/"b").gain is None
    (tmp_path/"a/unet/model.safetensors").write_bytes((tmp_path/"b/unet/model.safetensors").read_bytes())
    with pytest.raises(StoreError, match="another architecture"): load_model(tmp_path/"a")


def test_the_matched_start_has_the_statistics_of_training():
    schedule, z = noise_schedule("epsilon"), torch.randn(4, 16, 16, 16)
    noise = start_noise((16, 16, 16), 0, range(4))
    want = schedule.add_noise(z, noise, torch.full((4,), 999))
    latent, residual = SRModel(None, schedule), SRModel(None, schedule, torch.ones(16))
    assert torch.allclose(start_latent(latent, z, noise, "matched"), want, atol=1e-5) and start_latent(latent, z, noise) is noise
    assert torch.allclose(start_latent(residual, z, noise, "matched"), schedule.add_noise(0*z, noise, torch.full((4,), 999)), atol=1e-5)
    assert torch.equal(start_noise((16, 16, 16), 0, [2])[0], noise[2])
    with pytest.raises(ValueError, match="matched"): start_latent(latent, z, noise, "pure")


@pytest.mark.parametrize("size", [(32, 32), (17, 9), (1, 1)])
def test_consistency_in_every_pixel(size):
    g = torch.Generator().manual_seed(0)
    lr = ((imresize(torch.rand(1, 3, 6, 6, generator=g), size=size).clamp(0, 1)*255).round()/127.5 - 1)*.9
    sr = consistent(torch.randn(1, 3, 4*size[0], 4*size[1], generator=g)*.3, lr)
    assert (imresize(sr, size=size) - lr).abs().mean()*127.5 < 0.5 and sr.abs().max() <= 1
