"Autoencoders behind one interface, and the linear denoiser at its theoretical minimum."

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny

from tocsr.core.config import TeacherConfig, get_profile, override
from tocsr.core.store import run_stage
from tocsr.data.latents import CachedLatents
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
from tocsr.models.diffusion import noise_schedule
from tocsr.models.linear_denoiser import (
    FrequencyDenoiser,
    LinearDenoiser,
    moments,
    translation_average,
)
from tocsr.stages.expansion import given_base_autoencoder, load_autoencoders
from tocsr.stages.expansion_training import fit_linear_denoiser


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


def stationary_data(n, side=6):
    "Periodic noise smoothed in space, with a shifted copy of channel 0 in channel 1; and its mean."
    white = torch.randn(n, 2, side, side, generator=torch.Generator().manual_seed(0))
    z = white + white.roll(1, -1) + 0.5 * white.roll(-1, -2)
    z[:, 1] += 0.7 * z[:, 0].roll(1, -1)
    return z + torch.tensor([0.5, -1.0])[:, None, None]


def test_the_denoiser_per_frequency_equals_the_full_one_on_stationary_data():
    z = stationary_data(60_000)
    full = LinearDenoiser.fit(z.split(2000))
    frequency = FrequencyDenoiser.fit(z.split(2000))
    assert frequency.shape == full.shape == (2, 6, 6)
    test = z[:300]
    for alpha, sigma in ((0.9, 0.3), (0.5, 0.85)):
        noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(1))
        levels = torch.full((300,), alpha), torch.full((300,), sigma)
        noisy = alpha * test + sigma * noise
        a, b = (d.epsilon(noisy, *levels) for d in (full, frequency))
        assert (a - b).square().mean() < 0.002 * a.square().mean()
        power = alpha**2 * full.variance
        least = (power / (power + sigma**2)).mean().item()
        assert (b - noise).square().mean().item() == pytest.approx(least, rel=0.04)
    sampled = frequency.sample(60_000, torch.Generator().manual_seed(2)).flatten(1)
    assert torch.allclose(sampled.T.cov(), z.flatten(1).T.cov(), atol=0.12)
    assert torch.allclose(sampled.mean(0), z.flatten(1).mean(0), atol=0.05)
    with pytest.raises(ValueError, match="fitted on crops"):
        frequency.epsilon(torch.zeros(1, 2, 5, 5), torch.ones(1), torch.ones(1))


def test_the_paper_s_latents_need_no_covariance_of_all_values():
    z = torch.randn(8, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    denoiser = FrequencyDenoiser.fit(z.split(4))
    assert sum(v.numel() for v in (denoiser.variance, denoiser.vectors)) < 65_536 * 20
    estimate = denoiser.epsilon(z[:2], torch.full((2,), 0.8), torch.full((2,), 0.6))
    assert estimate.shape == (2, 16, 64, 64) and estimate.isfinite().all()


@pytest.mark.parametrize(
    "kind, side, expected", [("auto", 8, "full"), ("auto", 48, "frequency"), ("frequency", 8, None)]
)
def test_the_profile_names_the_linear_baseline(kind, side, expected):
    maps = [torch.randn(4, 60, 60, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    latents = CachedLatents(maps, 8)
    held = latents.crops(8, side, torch.Generator().manual_seed(0))
    cfg = TeacherConfig(linear=kind, linear_crops=64)
    schedule = noise_schedule("epsilon")
    _, made = fit_linear_denoiser(latents, held, schedule, cfg)
    assert made["linear"] == (expected or kind)
    with pytest.raises(ValueError, match="TeacherConfig.linear"):
        fit_linear_denoiser(latents, held, schedule, TeacherConfig(linear="wiener"))


def thin_sd_kl(channels):
    "An `AutoencoderKL` with SD's layout, factor 8, as thin as its group norms allow."
    torch.manual_seed(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.18215,
    )


def test_a_given_base_autoencoder_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_RUNS", str(tmp_path / "runs"))
    folders = {}
    for channels in (4, 16):
        folders[channels] = str(tmp_path / f"kl{channels}")
        thin_sd_kl(channels).save_pretrained(folders[channels])
    names = dict(teacher=folders[16], shape=folders[4], start="scratch")
    sizes = dict(steps=2, batch=2, eval_images=2, compare_steps=1, pca_patches=2000)
    p = override(get_profile("smoke"), autoencoder=names | sizes, data=dict(patch=64), device="cpu")
    artifact = run_stage("autoencoder", p)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base, expanded = load_autoencoders(artifact, p)
    with torch.no_grad():
        assert torch.equal(base.encode(x), load_autoencoder(folders[4]).encode(x))
        assert torch.equal(base(x), load_autoencoder(folders[4])(x))
    assert expanded.channels == 16 and artifact.results["base"] == "given"
    assert "4ch" in artifact.results and "teacher_4ch" not in artifact.results
    other = override(p, autoencoder=dict(shape=folders[16]))
    with pytest.raises(ValueError, match="base_channels=4"):
        given_base_autoencoder(other.autoencoder)
    assert given_base_autoencoder(get_profile("smoke").autoencoder) is None
