"Degradations: MATLAB's bicubic held to published numbers, the real-world pipeline to its contract."

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_sets import find_set
from PIL import Image

import tocsr
from tocsr.core import image as C
from tocsr.core.image import imresize, read_image, to_array, to_tensor
from tocsr.data import degradations as D
from tocsr.data.images import EMBEDDED, embedded_path


def luma(x, gray=False):
    """BT.601 studio-range Y in 8-bit levels of (3, h, w) in [-1, 1]; a gray file as it is.

    The published 26.00 dB of Set14 needs the second half: one of its files has one channel, and
    MATLAB code converts RGB files only.
    """
    if gray:
        return (x[0] + 1) * 127.5
    w = torch.tensor([65.481, 128.553, 24.966])[:, None, None]
    return ((x + 1) / 2 * w).sum(0) + 16


def psnr_y(a, b, border, gray=False):
    d = (luma(a, gray) - luma(b, gray))[border:-border, border:-border]
    return (10 * torch.log10(255**2 / (d**2).mean())).item()


def photo(seed=0, side=96):
    "A smooth random gray image with an edge, (3, side, side) in [-1, 1]."
    x = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = imresize(x, size=(side, side)).clamp(-1, 1) * 0.8
    x[:, :, side // 2 :] *= -1
    return x.expand(3, -1, -1).contiguous()


@pytest.mark.parametrize("name, published", [("Set5", 28.42), ("Set14", 26.00)])
def test_bicubic_x4_gives_the_published_psnr(name, published):
    got = []
    for f in find_set(name).hr:
        hr = to_tensor(read_image(f))[None]
        sr = D._quantize(imresize(D.degrade_images(hr, "bicubic", 4), 4.0))
        got.append(psnr_y(sr[0], hr[0], 4, gray=Image.open(f).mode == "L"))
    assert np.mean(got) == pytest.approx(published, abs=0.02)


def pillow_bicubic(x, size):
    "Pillow's antialiased bicubic of (c, h, w): the same kernel; it drops taps at the border."
    return torch.stack(
        [
            torch.tensor(
                np.asarray(
                    Image.fromarray(c.numpy(), "F").resize(size[::-1], Image.Resampling.BICUBIC)
                )
            )
            for c in x
        ]
    )


@pytest.mark.parametrize("photo", EMBEDDED[:6], ids=lambda p: p.name)
def test_bicubic_x4_of_our_own_set_agrees_with_pillow(photo):
    hr = D.crop_to_multiple(to_tensor(read_image(embedded_path(photo))), 4)
    low = [n // 4 for n in hr.shape[-2:]]
    inside = (Ellipsis, slice(16, -16), slice(16, -16))
    ours = imresize(hr, 1 / 4)
    theirs = pillow_bicubic(hr, low)
    assert (ours - theirs)[..., 4:-4, 4:-4].abs().max() < 1e-4
    up = imresize(ours, 4)
    their_up = pillow_bicubic(ours, list(hr.shape[-2:]))
    assert (up - their_up)[inside].abs().max() < 1e-4
    assert psnr_y(up, hr, 16) == pytest.approx(psnr_y(their_up, hr, 16), abs=0.001)


def by_matrices(x, h, w):
    "imresize by the resize matrices alone."
    y = C._resize_rows(x, h, h / x.shape[-2])
    return C._resize_rows(y.mT, w, w / x.shape[-1]).mT


@pytest.mark.parametrize(
    "shape", [(1, 3, 64, 96), (2, 3, 4, 4), (3, 5, 7), (1, 1, 3, 90), (1, 1, 1)]
)
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_fast_upsampling_equals_the_matrices(shape, factor):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    want = by_matrices(x, factor * shape[-2], factor * shape[-1])
    assert (
        imresize(x, factor).shape == want.shape and (imresize(x, factor) - want).abs().max() < 1e-6
    )
    assert torch.equal(imresize(x, size=tuple(want.shape[-2:])), imresize(x, factor))
    across = x.mT.contiguous().mT  # the same values, strides of a transposed tensor
    assert imresize(across, factor).allclose(imresize(x, factor), atol=1e-6, rtol=0)
    assert imresize(across, factor).is_contiguous()


def test_upsampling_a_large_image_keeps_its_positions():
    x = torch.rand(1, 1, 700, 1100, generator=torch.Generator().manual_seed(0))
    assert (imresize(x, 4) - by_matrices(x, 2800, 4400)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [4, 3, 1 / 4])
def test_half_precision_is_the_rounded_float32_result(dtype, scale):
    x = (torch.rand(1, 3, 24, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    assert imresize(x, scale).dtype == dtype and torch.equal(
        imresize(x, scale), imresize(x.float(), scale).to(dtype)
    )


def test_the_recipe_of_the_degraded_set_still_gives_its_pixels():
    root = Path(tocsr.__file__).parent
    m = json.loads((root / "assets/degraded.json").read_text())
    paths = {f"{p.name}.png": embedded_path(p) for p in EMBEDDED}

    def digest(x):
        return hashlib.sha256(to_array(x).tobytes()).hexdigest()

    rows = [r for r in m["crops"] if r[0] in paths][:12]
    assert rows
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, left, top, seed, low, high in rows:
            hr = to_tensor(read_image(paths[name])[top : top + m["size"], left : left + m["size"]])
            assert (
                digest(hr) == high and digest(D.degrade_realesrgan(hr, m["scale"], seed)) == low
            ), (name, left, top)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_of_an_image_and_of_its_flip_agree(scale):
    x = photo(side=96)[None]
    a = D.degrade_images(x, "bicubic", scale)
    b = D.degrade_images(x.flip(-1), "bicubic", scale).flip(-1)
    assert a.shape[-2:] == (96 // scale, 96 // scale)
    assert torch.allclose(a, b, atol=1 / 127)


@pytest.mark.parametrize("scale, size", [(None, None), (0.5, (4, 4)), (0, None), (None, (0, 3))])
def test_imresize_refuses_contradictions(scale, size):
    with pytest.raises(ValueError):
        imresize(torch.zeros(1, 8, 8), scale, size)


def test_imresize_rounds_sizes_up_but_not_past_whole_numbers():
    assert imresize(torch.zeros(1, 10, 9), 1 / 4).shape == (1, 3, 3)
    assert imresize(torch.zeros(1, 333, 999), 1 / 3).shape == (1, 111, 333)


def test_imresize_of_a_tiny_image_mirrors_as_often_as_needed():
    x = torch.tensor([[[1.0, 2.0]]])
    y = imresize(x, size=(1, 1))
    assert y.item() == pytest.approx(1.5)
    assert imresize(torch.ones(1, 1, 1), 8.0).allclose(torch.ones(1, 8, 8))


def test_a_seed_fixes_the_image_and_only_the_seed():
    x = photo()
    a = D.degrade_realesrgan(x, 4, 5)
    np.random.seed(1), torch.manual_seed(1)  # global generators play no part
    assert torch.equal(a, D.degrade_realesrgan(x, 4, 5))
    assert len({D.degrade_realesrgan(x, 4, s).numpy().tobytes() for s in range(8)}) == 8


@pytest.mark.parametrize("side", [16, 64, 96, 132])
@pytest.mark.parametrize("scale", [2, 4])
def test_every_draw_is_a_valid_8_bit_image(side, scale):
    x = photo(side=side)
    for seed in range(25):
        y = D.degrade_realesrgan(x, scale, seed)
        levels = (y + 1) * 127.5
        assert y.shape == (3, side // scale, side // scale) and y.dtype == torch.float32
        assert (
            levels.min() >= 0
            and levels.max() <= 255
            and (levels - levels.round()).abs().max() < 1e-3
        )


def test_a_pipeline_of_identities_is_a_resize_and_two_mild_jpegs():
    still = D.PassConfig(
        blur_prob=0, resize_probs=(0, 0, 1), gaussian_prob=1, gaussian=(0, 0), jpeg=(95, 95.5)
    )
    cfg = D.RealESRGANConfig(first=still, second=still, final_sinc_prob=0, modes=("area",))
    x = photo()
    y = D.degrade_realesrgan(x, 4, 0, cfg)
    assert (
        y - torch.nn.functional.avg_pool2d(x[None], 4)[0]
    ).abs().mean() < 2 / 127.5  # two 8-bit levels


def test_more_noise_and_lower_quality_hurt_more():
    x = photo(side=128)

    def error(**change):
        still = D.PassConfig(
            blur_prob=0, resize_probs=(0, 0, 1), gaussian_prob=1, gaussian=(0, 0), jpeg=(95, 95.5)
        )
        cfg = D.RealESRGANConfig(
            first=replace(still, **change), second=still, final_sinc_prob=0, modes=("area",)
        )
        ref = torch.nn.functional.avg_pool2d(x[None], 4)[0]
        return np.mean(
            [(D.degrade_realesrgan(x, 4, s, cfg) - ref).abs().mean().item() for s in range(4)]
        )

    clean = error()
    assert error(gaussian=(30, 30)) > 1.5 * clean
    assert error(gaussian_prob=0, poisson=(3, 3)) > 1.1 * clean
    assert error(jpeg=(5, 5.5)) > 1.1 * clean
    assert (
        error(blur_prob=1, sinc_prob=0, kernel_probs=(1, 0, 0, 0, 0, 0), sigma=(3, 3)) > 1.1 * clean
    )


def test_the_last_jpeg_and_the_last_sinc_leave_their_mark_in_either_order():
    x = photo(side=128)
    still = D.PassConfig(
        blur_prob=0, resize_probs=(0, 0, 1), gaussian_prob=1, gaussian=(0, 0), jpeg=(95, 95.5)
    )
    plain = D.RealESRGANConfig(first=still, second=still, final_sinc_prob=0, modes=("area",))
    coarse = replace(plain, second=replace(still, jpeg=(5, 5.5)))
    for seed in range(12):  # both orders occur
        ref = D.degrade_realesrgan(x, 4, seed, plain)
        assert (D.degrade_realesrgan(x, 4, seed, coarse) - ref).abs().mean() > 1 / 127.5
    sinc = [
        (
            D.degrade_realesrgan(x, 4, s, replace(plain, final_sinc_prob=1))
            - D.degrade_realesrgan(x, 4, s, plain)
        )
        .abs()
        .mean()
        .item()
        for s in range(12)
    ]
    assert np.mean(sinc) > 1 / 127.5


def test_draws_follow_the_published_shares():
    rng = np.random.default_rng(0)
    sizes = D.RealESRGANConfig().kernel_sizes
    sinc = np.mean([(D.draw_kernel(rng, D.PassConfig(), sizes) < 0).any() for _ in range(2000)])
    assert sinc == pytest.approx(0.1, abs=0.02)  # only a sinc kernel has negative weights
    final = np.mean([D.draw_final_sinc(rng, D.RealESRGANConfig()) is None for _ in range(2000)])
    assert final == pytest.approx(0.2, abs=0.03)
    assert sum(D.PassConfig().kernel_probs) == pytest.approx(1)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.degrade_images(torch.zeros(1, 3, 16, 16), "jpeg"), ("jpeg", "bicubic")),
        (
            lambda: D.degrade_images(torch.zeros(1, 3, 3, 16), "bicubic"),
            ("3, 16", "smaller than 4"),
        ),
        (lambda: D.degrade_images(torch.zeros(1, 1, 16, 16), "bicubic"), ("3 channels",)),
        (lambda: D.degrade_images(torch.zeros(2, 3, 16, 16), "realesrgan"), ("seed", "2")),
        (
            lambda: D.degrade_images(torch.zeros(2, 3, 16, 16), "realesrgan", seeds=[1]),
            ("seed", "got 1"),
        ),
    ],
)
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError) as e:
        call()
    assert all(w in str(e.value) for w in words)


@pytest.mark.parametrize("side", [128, 512, 37])
@pytest.mark.parametrize("kind", ["bicubic", "realesrgan"])
def test_every_factor_works_for_every_size(side, kind):
    x = imresize(
        torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        size=(side, side),
    ).clamp(-1, 1)
    y = D.degrade_images(x, kind, 3, [0])
    assert y.shape[-2:] == (side // 3, side // 3)
    assert torch.equal(y, D.degrade_images(D.crop_to_multiple(x, 3), kind, 3, [0]))


def test_pairs_for_an_autoencoder_fit_both():
    hr = D.crop_to_multiple(torch.zeros(1, 3, 128, 512), math.lcm(3, 8))
    assert (
        hr.shape[-2:] == (120, 504)
        and imresize(D.degrade_images(hr, "bicubic", 3), 3).shape == hr.shape
    )


def test_adding_a_degradation_is_one_place(monkeypatch):
    row = D.Degradation(
        "dark",
        lambda hr, scale, seed: hr[..., ::scale, ::scale] * 0 - 1 + seed / 8,
        consistency_factor=2,
    )
    monkeypatch.setitem(D.DEGRADATIONS, "dark", row)
    y = D.degrade_images(torch.zeros(2, 3, 8, 8), "dark", 4, [0, 4])
    assert y.shape == (2, 3, 2, 2) and y[0].eq(-1).all() and y[1].eq(-0.5).all()
    assert D.degradation("dark").consistency_factor == 2
    with pytest.raises(ValueError, match="dark"):
        D.degradation("darker")


def test_what_may_be_trusted_follows_from_the_degradation():
    assert {n: d.consistency_factor for n, d in D.DEGRADATIONS.items()} == dict(
        bicubic=1, realesrgan=8, mixed=8
    )
