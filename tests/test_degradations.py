"Degradations: MATLAB's bicubic held to published numbers, the real-world pipeline to its contract."
import os
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from tocsr import degradations as D
from tocsr.images import read_image, to_tensor

DATA = Path(os.environ.get("TOCSR_TEST_DATA") or Path(__file__).resolve().parents[2]/"shared/data")


def luma(x, grey=False):
    """(3, h, w) in [-1, 1] -> BT.601 studio-range Y in grey levels; a single-channel file as it is.

    The published 26.00 dB of Set14 needs the second half: one of its files has one channel, and MATLAB code converts RGB files only.
    """
    if grey: return (x[0] + 1)*127.5
    w = torch.tensor([65.481, 128.553, 24.966])[:, None, None]
    return ((x + 1)/2*w).sum(0) + 16


def psnr_y(a, b, border, grey=False):
    d = (luma(a, grey) - luma(b, grey))[border:-border, border:-border]
    return (10*torch.log10(255**2/(d**2).mean())).item()


def photo(seed=0, side=96):
    "A smooth random grey picture with an edge, (3, side, side) in [-1, 1]."
    x = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = D.imresize(x, size=(side, side)).clamp(-1, 1)*.8
    x[:, :, side//2:] *= -1
    return x.expand(3, -1, -1).contiguous()


@pytest.mark.parametrize("name, published", [("Set5", 28.42), ("Set14", 26.00)])
def test_bicubic_x4_gives_the_published_psnr(name, published):
    folder = DATA/"bench"/name
    if not folder.is_dir(): pytest.skip(f"no {name} under {DATA}: set TOCSR_TEST_DATA")
    got = []
    for f in sorted(folder.glob("*.png")):
        hr = to_tensor(read_image(f))[None]
        sr = D._quantise(D.imresize(D.degrade(hr, "bicubic", 4), 4.))
        got.append(psnr_y(sr[0], hr[0], 4, grey=Image.open(f).mode == "L"))
    assert np.mean(got) == pytest.approx(published, abs=.02)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_of_an_image_and_of_its_flip_agree(scale):
    x = photo(side=96)[None]
    a, b = D.degrade(x, "bicubic", scale), D.degrade(x.flip(-1), "bicubic", scale).flip(-1)
    assert a.shape[-2:] == (96//scale, 96//scale)
    assert torch.allclose(a, b, atol=1/127)


@pytest.mark.parametrize("scale, size", [(None, None), (.5, (4, 4)), (0, None), (None, (0, 3))])
def test_imresize_refuses_contradictions(scale, size):
    with pytest.raises(ValueError): D.imresize(torch.zeros(1, 8, 8), scale, size)


def test_imresize_rounds_sizes_up_but_not_past_whole_numbers():
    assert D.imresize(torch.zeros(1, 10, 9), 1/4).shape == (1, 3, 3)
    assert D.imresize(torch.zeros(1, 333, 999), 1/3).shape == (1, 111, 333)


def test_imresize_of_a_tiny_image_mirrors_as_often_as_needed():
    x = torch.tensor([[[1., 2.]]])
    y = D.imresize(x, size=(1, 1))
    assert y.item() == pytest.approx(1.5)
    assert D.imresize(torch.ones(1, 1, 1), 8.).allclose(torch.ones(1, 8, 8))


def test_a_seed_fixes_the_image_and_only_the_seed():
    x = photo()
    a = D.realesrgan(x, 4, 5)
    np.random.seed(1), torch.manual_seed(1)  # global generators play no part
    assert torch.equal(a, D.realesrgan(x, 4, 5))
    assert len({D.realesrgan(x, 4, s).numpy().tobytes() for s in range(8)}) == 8


@pytest.mark.parametrize("side", [16, 64, 96, 132])
@pytest.mark.parametrize("scale", [2, 4])
def test_every_draw_is_a_valid_8_bit_image(side, scale):
    x = photo(side=side)
    for seed in range(25):
        y = D.realesrgan(x, scale, seed)
        levels = (y + 1)*127.5
        assert y.shape == (3, side//scale, side//scale) and y.dtype == torch.float32
        assert levels.min() >= 0 and levels.max() <= 255 and (levels - levels.round()).abs().max() < 1e-3


def test_a_pipeline_of_identities_is_a_resize_and_two_mild_jpegs():
    still = D.Pass(blur_prob=0, resize_probs=(0, 0, 1), gaussian_prob=1, gaussian=(0, 0), jpeg=(95, 95.5))
    cfg = D.RealESRGAN(first=still, second=still, final_sinc_prob=0, modes=("area",))
    x = photo()
    y = D.realesrgan(x, 4, 0, cfg)
    assert (y - torch.nn.functional.avg_pool2d(x[None], 4)[0]).abs().mean() < 2/127.5  # two grey levels


def test_more_noise_and_lower_quality_hurt_more():
    x = photo(side=128)
    def error(**change):
        still = D.Pass(blur_prob=0, resize_probs=(0, 0, 1), gaussian_prob=1, gaussian=(0, 0), jpeg=(95, 95.5))
        cfg = D.RealESRGAN(first=replace(still, **change), second=still, final_sinc_prob=0, modes=("area",))
        ref = torch.nn.functional.avg_pool2d(x[None], 4)[0]
        return np.mean([(D.realesrgan(x, 4, s, cfg) - ref).abs().mean().item() for s in range(4)])
    clean = error()
    assert error(gaussian=(30, 30)) > 1.5*clean
    assert error(gaussian_prob=0, poisson=(3, 3)) > 1.1*clean
    assert error(jpeg=(5, 5.5)) > 1.1*clean
    assert error(blur_prob=1, sinc_prob=0, kernel_probs=(1, 0, 0, 0, 0, 0), sigma=(3, 3)) > 1.1*clean


def test_the_last_jpeg_and_the_last_sinc_leave_their_mark_in_either_order():
    x = photo(side=128)
    still = D.Pass(blur_prob=0, resize_probs=(0, 0, 1), gaussian_prob=1, gaussian=(0, 0), jpeg=(95, 95.5))
    plain = D.RealESRGAN(first=still, second=still, final_sinc_prob=0, modes=("area",))
    coarse = replace(plain, second=replace(still, jpeg=(5, 5.5)))
    for seed in range(12):  # both orders occur
        ref = D.realesrgan(x, 4, seed, plain)
        assert (D.realesrgan(x, 4, seed, coarse) - ref).abs().mean() > 1/127.5
    sinc = [(D.realesrgan(x, 4, s, replace(plain, final_sinc_prob=1)) - D.realesrgan(x, 4, s, plain)).abs().mean().item() for s in range(12)]
    assert np.mean(sinc) > 1/127.5


def test_draws_follow_the_published_shares():
    rng, sizes = np.random.default_rng(0), D.RealESRGAN().kernel_sizes
    sinc = np.mean([(D.draw_kernel(rng, D.Pass(), sizes) < 0).any() for _ in range(2000)])
    assert sinc == pytest.approx(.1, abs=.02)  # only a sinc kernel has negative weights
    final = np.mean([D.draw_final_sinc(rng, D.RealESRGAN()) is None for _ in range(2000)])
    assert final == pytest.approx(.2, abs=.03)
    assert sum(D.Pass().kernel_probs) == pytest.approx(1)


@pytest.mark.parametrize("call, words", [
    (lambda: D.degrade(torch.zeros(1, 3, 16, 16), "jpeg"), ("jpeg", "bicubic")),
    (lambda: D.degrade(torch.zeros(1, 3, 18, 16), "bicubic"), ("18", "divisible")),
    (lambda: D.degrade(torch.zeros(1, 1, 16, 16), "bicubic"), ("3 channels",)),
    (lambda: D.degrade(torch.zeros(2, 3, 16, 16), "realesrgan"), ("seed", "2")),
    (lambda: D.degrade(torch.zeros(2, 3, 16, 16), "realesrgan", seeds=[1]), ("seed", "got 1")),
])
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError) as e: call()
    assert all(w in str(e.value) for w in words)
