"Autoencoders behind one interface, and the linear denoiser at its theoretical minimum."

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny

from tocsr.models.autoencoder import (
    LatentAutoencoder,
    LowResAutoencoder,
    PatchPCA,
    fit_pca,
    freeze_encoder,
    initialize_from_pca,
    latent_factor,
    load_autoencoder,
    save_autoencoder,
)
from tocsr.models.linear_denoiser import LinearDenoiser, moments, translation_average


@pytest.fixture(scope="module")
def images():
    "Smooth images in place of photographs."
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(8, 3, 16, 16, generator=g), 64, mode="bicubic")
    return smooth.clamp(0, 1) * 2 - 1


def psnr(a, b):
    return -10 * math.log10((a - b).detach().div(2).square().mean())


def thin_kl(levels=4):
    "FLUX's layout, thin."
    return AutoencoderKL(
        latent_channels=16,
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def test_pca_is_orthonormal_half_whitened_and_exact_with_all_components(images):
    pca = fit_pca(images)
    z = pca.encode(images).latents
    variance = z.var((0, 2, 3))
    assert z.shape == (8, 16, 8, 8) and variance.mean() == pytest.approx(1, abs=0.05)
    assert (variance.diff() < 1e-3).all()
    raw = (z / pca.gain[:, None, None]).var((0, 2, 3))
    ratio = variance.square() / raw  # constant: half whitening means variance ~ sqrt(raw)
    assert ratio.std() / ratio.mean() < 0.05
    rows = pca.basis.flatten(1)
    assert torch.allclose(rows @ rows.T, torch.eye(16), atol=1e-5)
    qualities = []
    for channels in (4, 16, 192):
        m = fit_pca(images, channels)
        qualities.append(psnr(images, m.decode(m.encode(images).latents).sample))
    assert qualities[0] < qualities[1] < qualities[2] and qualities[2] > 60
    with pytest.raises(ValueError, match="more or larger images"):
        fit_pca(images[:1, :, :16, :16])


def test_low_resolution_autoencoder_starts_as_the_pca(images):
    pca = fit_pca(images)
    ae = initialize_from_pca(LowResAutoencoder(16), pca)
    assert torch.allclose(
        ae(images).sample, pca.decode(pca.encode(images).latents).sample, atol=1e-5
    )


@pytest.mark.parametrize(
    "model, factor",
    [
        (lambda: PatchPCA(4), 8),
        (lambda: PatchPCA(4, factor=4), 4),
        (lambda: LowResAutoencoder(4, 8, 8, (1, 1), (1, 1)), 8),
        (lambda: AutoencoderTiny(latent_channels=4), 8),
        (lambda: thin_kl(4), 8),
        (lambda: thin_kl(3), 4),
    ],
)
def test_the_factor_is_what_encoding_does(model, factor):
    vae = LatentAutoencoder(model())
    z = vae.encode(torch.zeros(1, 3, 32, 64))
    assert vae.factor == latent_factor(vae.model) == factor
    assert z.shape == (1, vae.channels, 32 // factor, 64 // factor)
    assert vae.decode(z).shape == (1, 3, 32, 64)
    with pytest.raises(ValueError, match=rf"\(30, 64\) are not multiples of {factor}"):
        vae.encode(torch.zeros(1, 3, 30, 64))


def test_scaling_and_shift_are_applied(images):
    flux = thin_kl()
    z = LatentAutoencoder(flux).encode(images)
    assert torch.allclose(z / 0.3611 + 0.1159, flux.encode(images).latent_dist.mode(), atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        lambda: LowResAutoencoder(4, 8, 8, (1, 1), (1, 1)),
        lambda: AutoencoderTiny(latent_channels=4),
        lambda: AutoencoderKL(latent_channels=4),
    ],
)
def test_a_frozen_encoder_gets_no_gradient(model):
    vae = freeze_encoder(LatentAutoencoder(model()))
    x = torch.rand(1, 3, 16, 16)
    assert not vae.encode(x).requires_grad and vae(x).requires_grad


def test_folders_round_trip_and_other_classes_are_refused(images, tmp_path):
    vae = LatentAutoencoder(initialize_from_pca(LowResAutoencoder(16), fit_pca(images)))
    loaded = load_autoencoder(save_autoencoder(vae, tmp_path / "vae"))
    assert torch.equal(loaded.encode(images), vae.encode(images)) and loaded.channels == 16
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="holds a UNet2DModel"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs(images, tmp_path, dtype):
    ae = initialize_from_pca(LowResAutoencoder(16, 16, 16, (1, 1), (1, 1)), fit_pca(images))
    save_autoencoder(LatentAutoencoder(ae), tmp_path)
    half = LatentAutoencoder(LowResAutoencoder.from_pretrained(tmp_path, torch_dtype=dtype))
    out = half(images.to(dtype))
    assert out.dtype == dtype and psnr(out.float(), ae(images).sample) > 35


def test_the_linear_denoiser_reaches_its_minimum_on_gaussian_data():
    torch.manual_seed(0)
    variances = torch.tensor([4.0, 1.0, 0.25, 0.01])
    rotation, _ = torch.linalg.qr(torch.randn(4, 4))
    data = (torch.randn(40_000, 4) * variances.sqrt() @ rotation.T).view(-1, 1, 2, 2)
    denoiser = LinearDenoiser.fit(data.split(1000))
    alpha = torch.full((40_000,), 0.8)
    sigma = torch.full((40_000,), 0.6)
    noise = torch.randn_like(data)
    error = (denoiser.epsilon(0.8 * data + 0.6 * noise, alpha, sigma) - noise).square().mean()
    assert error == pytest.approx(
        (0.64 * variances / (0.64 * variances + 0.36)).mean().item(), rel=0.03
    )
    sampled = denoiser.sample(40_000).flatten(1).T.cov()
    assert torch.allclose(sampled, data.flatten(1).T.cov(), atol=0.15)
    with pytest.raises(ValueError, match="fitted on crops"):
        denoiser.epsilon(torch.zeros(1, 1, 3, 3), alpha[:1], sigma[:1])


def test_translation_averaging_helps_on_stationary_data_without_bias():
    "Over a hundred groups of 40 crops the error of the covariance is halved."
    torch.manual_seed(0)
    waves = 3 * F.avg_pool2d(torch.randn(4000, 2, 8, 8), 3, 1)
    _, reference, shape = moments([waves])
    assert shape == (2, 6, 6)
    plain = []
    averaged = []
    for crops in waves.split(40):
        _, cov, _ = moments([crops])
        plain.append((cov - reference).norm())
        averaged.append((translation_average(cov, shape) - reference).norm())
    assert sum(averaged) < 0.5 * sum(plain)
    assert torch.allclose(translation_average(reference, shape), reference, atol=0.15)
