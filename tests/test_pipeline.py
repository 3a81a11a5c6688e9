"The pipeline with small random weights: sizes, tiles, files, diffusers' conventions, errors."

import inspect
import io
import json
import shutil
import subprocess
import sys
import typing
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageCms
from raw_images import write_tiff

import tocsr
from tocsr.core.config import UNetConfig
from tocsr.core.files import StoreError, read_weights, save_weights
from tocsr.core.image import imresize
from tocsr.data.degradations import degrade_images
from tocsr.inference.model_info import measure_peak, model_info, tile_difference
from tocsr.inference.pipeline import TOCSRPipeline, as_tensors, model_folder
from tocsr.inference.tiling import (
    BLOCK_MARGINS,
    LazyBicubic,
    receptive_field,
    tile_blended,
    tile_exact,
)
from tocsr.models.autoencoder import fit_pca
from tocsr.models.diffusion import nano_unet, noise_schedule
from tocsr.models.generator import (
    Refiner,
    add_condition_channels,
    freeze_normalization_statistics,
    one_step,
)
from tocsr.models.staged_unet import split_into_stages


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    cfg = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
    smooth = F.interpolate(torch.rand(8, 3, 16, 16), 64, mode="bicubic").clamp(0, 1) * 2 - 1
    return TOCSRPipeline(
        fit_pca(smooth),
        add_condition_channels(split_into_stages(nano_unet(cfg, 16)), 16),
        noise_schedule("v_prediction"),
    )


def variant(pipe, **changes):
    "A pipeline with copies of the components, some of them others."
    settings = {k: pipe.config[k] for k in pipe._get_signature_keys(pipe)[1]}
    parts = deepcopy(pipe.components)
    return TOCSRPipeline(**{**settings, **parts, **changes})


def make_image(h, w, seed=0):
    "A smooth random image, uint8 (h, w, 3)."
    x = imresize(
        torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(seed)), size=(h, w)
    ).clamp(0, 1)
    return (x * 255).byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 65), (1, 40), (2, 300)])
def test_every_size_comes_out_four_times_as_large(pipe, size):
    out = pipe(make_image(*size), tile=64, overlap=16, output_type="np").images[0]
    assert (
        out.shape == (4 * size[0], 4 * size[1], 3)
        and out.dtype == np.float32
        and 0 <= out.min() <= out.max() <= 1
    )


@pytest.mark.parametrize("kind", ["pil", "np", "float", "pt"])
def test_kinds_in_and_out_agree(pipe, kind):
    a = make_image(12, 20)
    tensor = torch.from_numpy(a).permute(2, 0, 1) / 255
    given = dict(pil=Image.fromarray(a), np=a, float=a / 255, pt=tensor)[kind]
    want = pipe(a, output_type="pt").images[0]
    out = pipe(given, output_type=kind.replace("float", "np")).images[0]
    if kind == "pil":
        out = np.asarray(out) / 255
    got = out if kind == "pt" else torch.from_numpy(np.ascontiguousarray(out)).permute(2, 0, 1)
    assert (got - want).abs().max() <= (0.51 / 255 if kind == "pil" else 1e-5)


def test_a_batch_equals_its_images(pipe):
    a = [make_image(12, 20, s) for s in range(3)]
    together = pipe(np.stack(a), output_type="np").images
    assert all((pipe(x, output_type="np").images[0] == y).all() for x, y in zip(a, together))
    mixed = pipe([a[0], Image.fromarray(make_image(5, 9))], output_type="np").images
    assert (mixed[0] == together[0]).all() and mixed[1].shape == (20, 36, 3)


def test_seed_decides_the_result(pipe):
    a = make_image(16, 16)
    r = [pipe(a, seed=s, output_type="np").images[0] for s in (3, np.int64(3), 4)]
    assert (r[0] == r[1]).all() and not (r[0] == r[2]).all()


def test_a_generator_decides_the_result(pipe):
    a = make_image(16, 16)

    def draw(s):
        return torch.Generator().manual_seed(s)

    one, same, other = (pipe(a, generator=draw(s), output_type="pt").images[0] for s in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    both = pipe([a, a], generator=[draw(4), draw(3)], output_type="pt").images
    assert torch.equal(both[0], other) and torch.equal(both[1], one)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        pipe([a, a], generator=[draw(1)])


@pytest.mark.parametrize(
    "scale, size", [(4, (80, 48)), (3, (60, 36)), (2, (40, 24)), (1.5, (30, 18))]
)
def test_smaller_scales(pipe, scale, size):
    assert pipe(make_image(20, 12), scale=scale, output_type="np").images[0].shape[:2] == size


def test_tiles_do_not_show_where_the_generator_is_local():
    x = LazyBicubic(torch.rand(1, 3, 60, 80), 4)
    noise = torch.randn(1, 16, 32, 40)

    def local(v, z):
        return v + F.interpolate(z[:, :3], scale_factor=8)

    assert torch.allclose(
        tile_blended(local, x, noise, 128, 64), tile_blended(local, x, noise, None, 64), atol=1e-5
    )


def test_tiles_of_different_brightness_are_cross_faded():
    """Attention and normalization see one tile: what they change must fade over the overlap, not
    step.
    """
    noise = torch.randn(1, 16, 32, 40, generator=torch.Generator().manual_seed(0))

    def own(v, z):
        return v + 20 * z.mean()  # every tile shifts by a number of its own

    out = tile_blended(own, LazyBicubic(torch.zeros(1, 3, 64, 80), 4), noise, 128, 64)
    step = max(out.diff(dim=d).abs().max() for d in (-1, -2))
    assert out.std() > 0.05 and step < 3 * (out.max() - out.min()) / 64


def make_local(pipe) -> TOCSRPipeline:
    "A tileable copy of a pipeline."
    other = variant(pipe)
    model = other.network.model
    freeze_normalization_statistics(
        other.unet,
        lambda u: one_step(
            model._replace(unet=u), torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
        ),
        vae_factor=8,
    )
    return TOCSRPipeline(**other.components, tileable=True)


@pytest.mark.parametrize("block_margins", [0, BLOCK_MARGINS])
@pytest.mark.parametrize("size, tile", [((40, 90), 32), ((130, 33), 64), ((64, 64), 16)])
def test_a_local_models_tiles_are_the_whole_image(pipe, monkeypatch, size, tile, block_margins):
    "Tile by tile as well as in blocks; these images are single blocks of the UNet."
    by_blocks = partial(tile_exact, block_margins=block_margins)
    monkeypatch.setattr("tocsr.inference.pipeline.tile_exact", by_blocks)
    steady = make_local(pipe)
    shares = []
    whole, parts = (
        steady(make_image(*size), tile=t, output_type="pt", progress=shares.append).images[0]
        for t in (None, tile)
    )
    assert steady.tileable and (whole - parts).abs().max() < 5e-4
    assert shares[1:] == sorted(shares[1:]) and shares[-1] == 1
    assert tile_difference(steady, make_image(*size), tile=tile)["max"] < 0.2


class Windows(torch.nn.Module):
    "A refiner that changes nothing, with a receptive field of 40, and notes what it computes."

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 81, padding=40)
        self.sides = []

    def forward(self, y, x):
        self.sides.append(tuple(y.shape[-2:]))
        self.conv(y[:, :1, :1])  # one row
        return y


@pytest.mark.parametrize("tile", [16, 32, 48, 64, 80])
def test_small_tiles_do_not_compute_the_image_many_times(pipe, tile):
    "The margin is 64 HR pixels; a tile of 16 LR pixels by itself would need 9 times the image."
    g = make_local(pipe).network
    g.refiner = Windows()
    x = LazyBicubic(torch.rand(1, 3, 160, 96) * 2 - 1, 4)
    tile_exact(g, x, torch.randn(1, 16, 80, 48), 4 * tile)
    windows = g.refiner.sides[1:]  # the first is the measurement of the receptive field
    largest = max(4 * tile, 4 * 64) + 2 * 64
    assert len(windows) > 1 and max(max(w) for w in windows) <= largest
    assert sum(h * w for h, w in windows) < 4 * 640 * 384


def test_a_local_network_behind_a_normalizing_autoencoder_is_cross_faded(pipe):
    """An AutoencoderKL normalizes over the whole image: its tiles cannot be exact, and must not
    fail.
    """
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
    )
    vae = AutoencoderKL(
        latent_channels=16, block_out_channels=(8,) * 4, norm_num_groups=4, **blocks
    )
    other = variant(pipe, vae=vae, tileable=True)
    assert other.config.tileable and not other.tileable
    assert other(make_image(40, 40), tile=32, output_type="np").images[0].shape == (160, 160, 3)


def test_tiled_and_untiled_results_are_close(pipe):
    assert (
        0 < tile_difference(pipe, make_image(64, 96), tile=32, overlap=16)["mean"] < 5
    )  # gray levels


def test_consistency_on_bicubic_inputs_is_below_half_a_gray_level(pipe):
    hr = (
        imresize(
            torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1)), size=(128, 128)
        ).clamp(0, 1)
        * 1.6
        - 0.8
    )
    lr = (degrade_images(hr, "bicubic") + 1) / 2
    sr = pipe(lr, consistency_factor=1, output_type="pt").images[0]
    assert (imresize(sr[None], 1 / 4) - lr).abs().mean() * 255 < 0.5


def test_the_consistency_factor_of_a_call_and_of_the_model(pipe):
    a = make_image(16, 16)

    def call(p, n):
        return p(a, consistency_factor=n, output_type="pt").images[0]

    assert torch.equal(call(pipe, None), call(pipe, 1)) and not torch.equal(
        call(pipe, 0), call(pipe, 1)
    )
    assert torch.equal(call(variant(pipe, consistency_factor=4), None), call(pipe, 4))


def test_a_saved_pipeline_is_the_same(pipe, tmp_path):
    a = make_image(16, 16)
    scaled = variant(
        pipe, residual_scale=torch.linspace(0.7, 3, 16).tolist(), about=dict(license="a license")
    )
    folder = scaled.save_pretrained(tmp_path / "m")
    again = TOCSRPipeline.from_pretrained(folder)
    assert again.config.about == dict(license="a license")
    assert (again(a, output_type="np").images[0] == scaled(a, output_type="np").images[0]).all()
    assert not (scaled(a, output_type="np").images[0] == pipe(a, output_type="np").images[0]).all()
    files = {f.name for f in folder.rglob("*") if f.is_file()}
    assert files == {
        "model_index.json",
        "pipeline.py",
        "config.json",
        "scheduler_config.json",
        "diffusion_pytorch_model.safetensors",
    }
    texts = [f.read_text() for f in folder.rglob("*.json")]
    again.save_pretrained(tmp_path / "n")
    texts += [f.read_text() for f in (tmp_path / "n").rglob("*.json")]
    assert not any(str(tmp_path) in t for t in texts), "no path of this machine"


def test_diffusers_own_class_loads_the_folder(pipe, tmp_path):
    a = make_image(16, 16)
    folder = variant(pipe, refiner=Refiner(1, 8)).save_pretrained(tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["tocsr", "StagedUNet"] and index["scheduler"] == [
        "diffusers",
        "DDPMScheduler",
    ]
    native = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline="pipeline", trust_remote_code=True
    )
    assert type(native).__name__ == "TOCSRPipeline"
    assert (native(a, output_type="np").images[0] == pipe(a, output_type="np").images[0]).all()


def test_the_habits_of_diffusers(pipe):
    a = make_image(16, 16)
    assert set(pipe.components) == {"vae", "unet", "scheduler", "refiner"} and pipe.refiner is None
    (images,) = pipe(a, return_dict=False)
    assert images[0].size == (64, 64)
    other = variant(pipe)
    other.set_progress_bar_config(disable=True)
    a = make_image(48, 16)
    other.enable_tiling(32)
    tiles = pipe(a, tile=32, output_type="pt").images[0]
    assert torch.equal(other(a, output_type="pt").images[0], tiles)
    other.disable_vae_tiling()
    whole = other(a, output_type="pt").images[0]
    assert torch.equal(whole, pipe(a, tile=None, output_type="pt").images[0]) and not torch.equal(
        whole, tiles
    )
    with pytest.raises(ValueError, match="multiples of 16"):
        other.enable_tiling(17)


def test_callbacks_see_and_change_latents_after_every_step(pipe):
    a = make_image(16, 16)
    slow = variant(pipe, multistep=True)
    seen = []

    def watch(p, step, timestep, kwargs):
        seen.append((step, int(timestep), tuple(kwargs["latents"].shape)))
        return {}

    def run(f):
        return slow(
            a, num_inference_steps=3, consistency_factor=0, output_type="pt", callback_on_step_end=f
        ).images[0]

    plain = run(watch)
    assert (
        [s for s, _, _ in seen] == [0, 1, 2] and seen[0][1] == 999 and seen[0][2] == (1, 16, 8, 8)
    )
    assert torch.equal(run(None), plain)
    assert not torch.equal(run(lambda p, s, t, kw: dict(latents=kw["latents"] * 0)), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(pipe, dtype, tmp_path):
    a = make_image(24, 40)
    for original in (variant(pipe, refiner=Refiner(1, 8)), TOCSRPipeline.from_pretrained()):
        folder = original.save_pretrained(tmp_path / f"{id(original)}")
        half = TOCSRPipeline.from_pretrained(folder, torch_dtype=dtype)
        assert half.dtype == half.unet.dtype == dtype
        for tile in (None, 32):
            call = dict(tile=tile, output_type="pt")
            y = half(a, **call).images[0]
            assert (
                y.dtype == torch.float32 and (y - original(a, **call).images[0]).abs().mean() < 0.01
            )
    assert TOCSRPipeline.from_pretrained(folder).dtype == torch.float32


def test_half_precision_samples_in_steps(pipe):
    slow = variant(pipe, multistep=True)
    call = dict(num_inference_steps=2, output_type="pt")
    want = slow(make_image(16, 16), **call).images[0]
    assert (
        slow.to(torch.bfloat16)(make_image(16, 16), **call).images[0] - want
    ).abs().mean() < 0.02


def test_the_constructors_annotations_are_no_strings():
    "diffusers 0.35 looks at them without resolving strings and unions written with |."
    for name, parameter in inspect.signature(TOCSRPipeline.__init__).parameters.items():
        a = parameter.annotation
        assert name == "self" or isinstance(a, type) or typing.get_origin(a) is typing.Union, name


def test_loading_ignores_torchs_default_dtype(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "m")
    torch.set_default_dtype(torch.float64)
    try:
        assert TOCSRPipeline.from_pretrained(folder).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


CALLS = [
    {},
    dict(tile=64, overlap=16),
    dict(scale=1.5),
    dict(strength=0.5),
    dict(consistency_factor=4),
    dict(output_type="pt"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["array", "alpha", "local"])
def test_results_ignore_torchs_defaults(pipe, call, kind):
    "Another default dtype, or device, changes no result."
    image = make_image(70, 20)
    model = variant(pipe, tileable=True) if kind == "local" else pipe
    if kind == "alpha":
        image = Image.fromarray(np.dstack([image, image[..., :1]]))
    want = model(image, **call).images[0]
    for name, value, before in (
        ("set_default_dtype", torch.float64, torch.float32),
        ("set_default_dtype", torch.bfloat16, torch.float32),
        ("set_default_device", "meta", None),
    ):
        getattr(torch, name)(value)
        try:
            got = model(image, **call).images[0]
        finally:
            getattr(torch, name)(before)
        assert np.array_equal(np.asarray(got), np.asarray(want)), (name, value)


def test_loading_ignores_torchs_default_device(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "m")
    want = pipe(make_image(8, 8), output_type="np").images[0]
    torch.set_default_device("meta")
    try:
        again = TOCSRPipeline.from_pretrained(folder)
    finally:
        torch.set_default_device(None)
    assert np.array_equal(again(make_image(8, 8), output_type="np").images[0], want)


def test_loading_in_threads_restores_diffusers_settings(pipe, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    folder = pipe.save_pretrained(tmp_path / "m")
    for level in (diffusers_logging.INFO, diffusers_logging.WARNING):
        diffusers_logging.set_verbosity(level)
        diffusers_logging.enable_progress_bar()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: TOCSRPipeline.from_pretrained(folder), range(8)))
        assert diffusers_logging.get_verbosity() == level
        assert diffusers_logging.is_progress_bar_enabled()
    assert not torch.nn.Linear(1, 1).weight.is_meta  # accelerate's patch is gone, too


@pytest.mark.parametrize("tile", [50, 0, -16, 16.5, "large"])
def test_a_refused_setting_changes_nothing(pipe, tile):
    own = variant(pipe)
    own.enable_tiling(64)
    with pytest.raises(ValueError):
        own.enable_tiling(tile)
    assert own._tile_of("auto") == 64


def test_a_device_that_fails_leaves_the_pipeline_as_it_was(pipe):
    own = variant(pipe)
    want = own(make_image(8, 8), output_type="np").images[0]
    with pytest.raises((RuntimeError, AssertionError, ValueError, NotImplementedError)):
        own.to("cuda:99")
    assert own.device.type == "cpu"
    assert np.array_equal(own(make_image(8, 8), output_type="np").images[0], want)


@pytest.mark.parametrize(
    "seed", [3, np.int64(3), np.uint8(3), np.int32(3), torch.tensor(3), True, -1, 2**63 - 1]
)
def test_integers_of_every_type_are_seeds(pipe, seed):
    got, same, other = (
        pipe(make_image(8, 8), seed=s, output_type="np").images[0]
        for s in (seed, int(seed), int(seed) - 1)
    )
    assert np.array_equal(got, same) and not np.array_equal(got, other)


def test_layouts_that_pillow_misreads_are_right_or_refused(pipe):
    dark = write_tiff(np.full((8, 8, 1), 65535), 16, 0)  # white is zero
    im = Image.open(io.BytesIO(dark))
    assert np.asarray(pipe(im).images[0]).max() < 40
    im = Image.open(io.BytesIO(dark))
    im.load()
    with pytest.raises(ValueError, match="white is zero"):
        pipe(im)


def test_orientation_and_profile_of_a_pillow_image(pipe):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    upright = Image.fromarray(make_image(8, 12))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # turn clockwise to view
    turned.info["icc_profile"] = profile
    out = pipe(turned).images[0]
    assert out.size == (48, 32) and out.info["icc_profile"] == profile
    assert (np.asarray(out) == np.asarray(pipe(upright).images[0])).all()
    assert "icc_profile" not in pipe(upright).images[0].info


@pytest.mark.parametrize(
    "image, words",
    [
        (torch.full((3, 4, 4), float("nan")), "NaN"),
        (torch.zeros(1, 4, 4), "(1, 4, 4)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "floating point"),
        (torch.full((3, 4, 4), -1.0), "(x + 1)/2"),
        (np.full((4, 4, 3), -0.5), "(x + 1)/2"),
        (np.zeros((4, 4, 4), np.uint8), "(4, 4, 4)"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.zeros((0, 4, 3), np.uint8), "without pixels"),
        ("photo.png", "str"),
        ([], "no image"),
        (torch.full((3, 4, 4), 200.0), "200"),
    ],
)
def test_bad_images_are_refused_with_a_reason(pipe, image, words):
    with pytest.raises(ValueError, match="(?s).*") as e:
        pipe(image)
    assert words in str(e.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(scale=8), "at most 4"),
        (dict(scale=-1), "above 0"),
        (dict(tile=100), "multiples of 16"),
        (dict(tile=32, overlap=32), "overlap"),
        (dict(output_type="jpg"), "pil"),
        (dict(strength=1.5), "0..1"),
        (dict(num_inference_steps=2), "1 step, not 2"),
        (dict(consistency_factor=-1), "consistency_factor"),
        (dict(consistency_factor=1.5), "whole number"),
        (dict(seed=2**63), "seed"),
        (dict(seed=1.5), "seed"),
        (dict(seed=None), "seed"),
        (dict(seed="3"), "seed"),
        (dict(seed=np.float64(3)), "seed"),
        (dict(seed=np.uint64(2**63)), "seed"),
        (dict(scale=0), "above 0"),
        (dict(scale=float("nan")), "scale must be a number"),
        (dict(scale=float("inf")), "at most 4"),
        (dict(scale="2"), "scale must be a number"),
        (dict(scale=[2]), "scale must be a number"),
        (dict(strength="x"), "strength must be a number"),
        (dict(strength=float("nan")), "strength must be a number"),
        (dict(tile=16.0), "tile must be a whole number"),
        (dict(tile="big"), "tile must be a whole number"),
        (dict(tile=64, overlap=1.5), "overlap must be a whole number"),
        (dict(num_inference_steps=1.5), "num_inference_steps"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(pipe, arguments, words):
    with pytest.raises(ValueError) as e:
        pipe(make_image(8, 8), **arguments)
    assert words in str(e.value)


def test_broken_folders_are_refused(pipe, tmp_path):
    def refused(words):
        with pytest.raises(StoreError) as e:
            TOCSRPipeline.from_pretrained(folder)
        assert words in str(e.value)

    folder = tmp_path
    refused("model_index.json is missing")
    folder = variant(pipe, refiner=Refiner(1, 8)).save_pretrained(tmp_path / "m")
    for name, tensor in (("unet", "conv_in.bias"), ("vae", "gain"), ("refiner", "tail.bias")):
        file = folder / name / "diffusion_pytorch_model.safetensors"
        whole = file.read_bytes()
        state = {k: v.clone() for k, v in read_weights(file).items()}  # not mapped to the file
        file.write_bytes(whole[: len(whole) // 2])
        refused("truncated")
        save_weights(file, {k: v for k, v in state.items() if k != tensor}, format="pt")
        refused(tensor)
        save_weights(file, state | dict(foreign=torch.zeros(1)), format="pt")
        refused("foreign")
        file.unlink()
        refused("no weights")
        file.write_bytes(whole)
        config = file.with_name("config.json")
        config.rename(folder / "away")
        refused("config.json is missing")
        (folder / "away").rename(config)
    index = folder / "model_index.json"
    index.write_text("{")
    refused("model_index.json")
    index.write_text(json.dumps(dict(_class_name="StableDiffusionPipeline")))
    refused("StableDiffusionPipeline")
    index.unlink()
    (folder / "gain.safetensors").touch()
    refused("early version")


def test_sixteen_bit_and_transparent_images_are_converted():
    deep = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    assert (
        as_tensors(deep)[0].min() == 1
        and as_tensors(Image.new("RGBA", (3, 3), (0, 0, 0, 0)))[0].min() == 1
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 65)])
def test_windows_agree_with_the_whole_enlargement(size):
    x = LazyBicubic(torch.rand(1, 3, *size), 4)
    H, W = x.size
    whole = x.window(0, 0, H, W)
    assert torch.allclose(whole[..., : 4 * size[0], : 4 * size[1]], imresize(x.lr, 4), atol=1e-6)
    for top in range(0, H, 64):
        for left in range(0, W, 64):
            assert torch.allclose(
                x.window(top, left, 64, 64), whole[..., top : top + 64, left : left + 64], atol=1e-6
            )


def test_strength_goes_from_bicubic_to_the_model(pipe):
    a = make_image(12, 20)
    low, half, full = (pipe(a, strength=s, output_type="pt").images[0] for s in (0, 0.5, 1))
    assert torch.allclose(half, (low + full) / 2, atol=1e-5) and not torch.allclose(
        low, full, atol=0.005
    )


def test_progress_is_told_up_to_the_end(pipe):
    shares = []
    pipe([make_image(8, 8), make_image(40, 40)], tile=32, overlap=16, progress=shares.append)
    assert shares == sorted(shares) and shares[0] == 0.5 and shares[-1] == 1 and len(shares) == 5


def test_a_model_that_returns_nan_is_an_error_and_no_image(pipe):
    broken = variant(pipe)
    broken.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN"):
        broken(make_image(8, 8))


def test_hub_folders_come_down(pipe, tmp_path, monkeypatch):
    import huggingface_hub as hub

    pipe.save_pretrained(tmp_path / "me/model")

    def download(name, revision, allow_patterns):
        return str(
            shutil.copytree(
                tmp_path / name,
                tmp_path / "cache",
                ignore=lambda d, files: [f for f in files if f.endswith(".py")],
            )
        )

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path.parent)
    loaded = TOCSRPipeline.from_pretrained("me/model")
    assert (
        loaded(make_image(8, 8), output_type="np").images[0]
        == pipe(make_image(8, 8), output_type="np").images[0]
    ).all()
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **kw: 1 / 0)
    with pytest.raises(StoreError, match="hub did not deliver"):
        TOCSRPipeline.from_pretrained("me/other")


def test_model_info(pipe):
    i = model_info(variant(pipe, about=dict(license="a license")))
    assert (i.scale, i.multiple, i.steps, i.latent_channels, i.consistency_factor) == (
        4,
        16,
        "1",
        16,
        1,
    )
    assert i.macs_per_pixel > 0 and i.license == "a license"


def test_the_bundled_weights(tmp_path):
    bundled = TOCSRPipeline.from_pretrained()
    i = model_info(bundled)
    assert not list(model_folder(None).rglob("*.py")), "nbdev would make it a package"
    assert (
        bundled.tileable
        and bundled.refiner is not None
        and i.license == "Apache-2.0"
        and i.architecture == "[R-R-R]-[R-RS-RA]"
    )
    again = TOCSRPipeline.from_pretrained(bundled.save_pretrained(tmp_path / "m"))
    assert again.tileable and torch.equal(
        *(p(make_image(40, 24), output_type="pt").images[0] for p in (bundled, again))
    )


def test_memory_grows_with_the_result_not_with_its_copies(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "m")
    m = measure_peak(folder, 384, tile=64)
    assert (
        m["result"] == [1536, 1536] and (m["peak_gb"] - m["loaded_gb"]) * 1e9 < 144 * 1536**2
    )  # twelve float images of three channels


def test_a_refiner_is_saved_and_used(pipe, tmp_path):
    a = make_image(16, 16)
    torch.manual_seed(0)
    refined = variant(pipe, refiner=Refiner(1, 8))
    plain = pipe(a, output_type="np").images[0]
    assert (refined(a, output_type="np").images[0] == plain).all(), "it starts as the identity"
    torch.nn.init.normal_(refined.refiner.tail.weight, 0, 0.2)
    out = refined(a, output_type="np").images[0]
    folder = refined.save_pretrained(tmp_path / "m")
    assert (TOCSRPipeline.from_pretrained(folder)(a, output_type="np").images[0] == out).all() and (
        out != plain
    ).any()


def gradient_radius(f, x):
    "How far from the middle block of f(x) an input has a gradient, in positions of x."
    side = x.shape[-1]
    x = x.requires_grad_(True)
    y = f(x)
    middle = y.shape[-1] // 2
    half = 64 * y.shape[-1] // side // 2 // (8 if side < 500 else 1)
    block = y[..., middle - half : middle + half, middle - half : middle + half]
    (block * torch.randn(y.shape[1], 2 * half, 2 * half)).sum().backward()
    support = x.grad.abs().sum((0, 1, 2)).nonzero()
    return side // 2 - support.min().item() - half * side // y.shape[-1]


def test_receptive_fields_are_no_smaller_than_gradients_say():
    g = TOCSRPipeline.from_pretrained().network.requires_grad_(False)

    def step(z):
        return one_step(g.model, z, z)

    rgb = torch.zeros(1, 3, 64, 64)
    z = torch.zeros(1, g.vae.channels, 8, 8)
    for part, f, example, larger in (
        (g.vae, g.vae.encode, rgb, (3, 512, 512)),
        (g.vae, g.vae.decode, z, (g.vae.channels, 64, 64)),
        (g.unet, step, z, (g.vae.channels, 128, 128)),
    ):
        unit = 64 // example.shape[-1]  # HR pixels
        found = unit * gradient_radius(f, torch.randn(1, *larger))
        assert 0 < found <= receptive_field(part, f, example)


def test_a_receptive_field_without_bound_is_refused(pipe):
    with pytest.raises(ValueError, match="normalization"):
        receptive_field(pipe.unet, lambda: None)


def test_the_unet_compiles_to_one_graph(pipe):
    context = torch.ones(1, 1, pipe.unet.config.cross_attention_dim)
    report = torch._dynamo.explain(pipe.unet)(
        torch.randn(1, 32, 16, 16), torch.tensor([999]), context
    )
    assert report.graph_count == 1 and report.graph_break_count == 0, report.break_reasons


def test_names_of_the_package():
    assert set(tocsr.__all__) <= set(dir(tocsr)) and tocsr.TOCSRPipeline is TOCSRPipeline
    assert callable(tocsr.get_profile) and callable(tocsr.run_stage)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(tocsr, "nothing")  # noqa: B009
    r = subprocess.run(
        [sys.executable, "-c", "import sys, tocsr; assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert not r.returncode, r.stderr
