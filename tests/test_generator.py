"The one-step generator: exactness of its parts, tiles, back-projection, baselines, methods."

from copy import deepcopy

import pytest
import torch
from torch import nn

from tocsr.core.config import UNetConfig, get_profile
from tocsr.core.image import imresize, upsample
from tocsr.evaluation.held_out import (
    evaluate_methods,
    upscale_with_bicubic,
    upscale_with_regression,
    upscale_with_steps,
    upscale_with_student,
)
from tocsr.models.autoencoder import LatentAutoencoder, fit_pca
from tocsr.models.complexity import count_macs
from tocsr.models.consistency import back_project
from tocsr.models.diffusion import ddim_sample, nano_unet, noise_schedule
from tocsr.models.generator import (
    ChannelAffine,
    OneStepGenerator,
    Refiner,
    SRModel,
    add_condition_channels,
    freeze_normalization_statistics,
    is_tileable,
    make_tileable,
    one_step,
    start_noise,
    upscale_in_one_step,
)
from tocsr.models.regression import RegressionNet, equal_cost_net
from tocsr.models.staged_unet import split_into_stages

THIN = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
SCHEDULER = noise_schedule("v_prediction")


@pytest.fixture(scope="module")
def vae():
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return LatentAutoencoder(fit_pca(images, 16)).eval()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return add_condition_channels(split_into_stages(nano_unet(THIN, 16)), 16).eval()


def call(unet, z_T, z_l):
    with torch.no_grad():
        return one_step(SRModel(unet, SCHEDULER), z_T, z_l)


def test_one_step_is_ddim_in_one_step(unet):
    z_T, z_l = torch.randn(2, 2, 16, 8, 8)
    scale = torch.linspace(1, 4, 16)
    z_0 = ddim_sample(unet, SCHEDULER, z_T, 1, z_l)
    assert torch.allclose(call(unet, z_T, z_l), z_0, atol=1e-4)
    with torch.no_grad():
        residual = one_step(SRModel(unet, SCHEDULER, scale), z_T, z_l)
    assert torch.allclose(residual, z_l + z_0 / scale[:, None, None], atol=1e-4)


def test_a_refiner_starts_as_the_identity_and_has_a_small_receptive_field():
    refiner = Refiner(1, 8)
    y, x = torch.rand(2, 2, 3, 16, 64)
    assert torch.equal(refiner(y, x), y)
    nn.init.dirac_(refiner.tail.weight)
    other = x.clone()
    other[..., :4] = 0
    with torch.no_grad():
        change = (refiner(y, other) - refiner(y, x)).abs().amax((0, 1, 2))
    assert change[:4].max() > 0
    assert change[20:].max() < 1e-6  # four convolutions at a quarter of the resolution: 16 pixels


def test_a_refiner_is_read_back(tmp_path):
    refiner = Refiner(2, 8)
    nn.init.normal_(refiner.tail.weight, 0, 0.1)
    refiner.save_pretrained(tmp_path)
    y, x = torch.rand(2, 1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(Refiner.from_pretrained(tmp_path)(y, x), refiner(y, x))


def test_frozen_statistics_are_those_of_the_data():
    "A single GroupNorm on data of known mean and variance."
    torch.manual_seed(0)
    net = split_into_stages(nano_unet(THIN, 16))
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    net.probe = norm
    x = torch.randn(64, 4, 8, 8) * torch.tensor([1, 1, 3, 3.0])[:, None, None] + 2
    weight = norm.weight.detach().clone()
    bias = norm.bias.detach().clone()
    frozen = freeze_normalization_statistics(net, lambda n: n.probe(x), 8).probe
    assert isinstance(frozen, ChannelAffine)
    group = x.unflatten(1, (2, 2))
    mean = group.mean((0, 2, 3, 4)).repeat_interleave(2)[:, None, None]
    std = group.var((0, 2, 3, 4), unbiased=False).sqrt().repeat_interleave(2)[:, None, None]
    want = (x - mean) / std * weight[:, None, None] + bias[:, None, None]
    assert torch.allclose(frozen(x), want, atol=2e-3)


def test_a_tileable_network_keeps_its_weights_and_is_local(unet):
    z_T, z_l = torch.randn(2, 2, 16, 8, 8)
    tileable = freeze_normalization_statistics(deepcopy(unet), lambda u: call(u, z_T, z_l), 8)
    assert is_tileable(tileable) and not is_tileable(unet)
    shapes = {k: v.shape for k, v in tileable.state_dict().items()}
    assert shapes == {k: v.shape for k, v in unet.state_dict().items()}
    whole = call(unet, z_T, z_l)
    naive = make_tileable(deepcopy(unet), 8)
    assert (call(tileable, z_T, z_l) - whole).std() < 0.5 * (call(naive, z_T, z_l) - whole).std()
    a, b = torch.randn(2, 1, 16, 256, 8)
    other = a.clone()
    other[..., 240:, :] *= 3
    change = [
        (call(u, a, b) - call(u, other, b))[..., :16, :].abs().max() for u in (unet, tileable)
    ]
    assert change[1] == 0 < change[0]
    assert call(tileable, a[..., :12, :], b[..., :12, :]).shape == (1, 16, 12, 8)


class PassThrough(nn.Module):
    "Replaces a residual block by the identity."

    def forward(self, x, temb):
        return x


def test_attention_is_restricted_to_windows(unet):
    "Attention in windows is that of the same positions cut out."
    tileable = make_tileable(deepcopy(unet), 8)
    block = next(b for s in tileable.stages.values() for b in s.blocks if b.attentions)
    x = torch.randn(1, block.resnet.out_channels, 8, 12)
    block.resnet = PassThrough()
    block.side = 4
    context = torch.ones(1, 1, 64)
    with torch.no_grad():
        whole = block(x, None, context)
        part = block(x[..., 4:8, 8:12], None, context)
    assert (part - x[..., 4:8, 8:12]).abs().max() > 0.01
    assert torch.allclose(whole[..., 4:8, 8:12], part, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (17, 9), (1, 1)])
def test_back_projection_is_consistent_in_every_pixel(size):
    g = torch.Generator().manual_seed(0)
    small = imresize(torch.rand(1, 3, 6, 6, generator=g), size=size).clamp(0, 1)
    lr = ((small * 255).round() / 127.5 - 1) * 0.9
    start = torch.randn(1, 3, 4 * size[0], 4 * size[1], generator=g) * 0.3
    sr = back_project(start, lr)
    assert (imresize(sr, size=size) - lr).abs().mean() * 127.5 < 0.5
    assert sr.abs().max() <= 1


def test_a_large_consistency_factor_corrects_color_and_leaves_noise_out():
    g = torch.Generator().manual_seed(0)
    hr = imresize(torch.rand(2, 3, 16, 16, generator=g) * 1.6 - 0.8, 8)
    lr = imresize(hr, 1 / 4)
    noisy = lr + 0.2 * torch.randn(lr.shape, generator=g)
    shifted = hr + torch.tensor([0.1, -0.1, 0.05])[:, None, None]

    def error(y):
        return (y - hr).abs().mean()

    assert error(back_project(shifted, noisy, 8)) < 0.4 * error(shifted)
    assert error(shifted) < error(back_project(shifted, noisy, 1))
    assert back_project(shifted, noisy, 0) is shifted
    tiny = back_project(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 1, 1), 0.3), 8)
    assert torch.allclose(tiny, torch.full_like(tiny, 0.3), atol=1e-3)


def test_the_regression_network_starts_as_bicubic_and_costs_what_is_asked(vae, unet):
    generator = OneStepGenerator(vae, unet, SCHEDULER).eval()
    image = torch.empty(1, 3, 128, 128)
    macs = count_macs(generator, image, torch.empty(1, *generator.latent_shape(image)))
    for wanted in (macs, 10 * macs):
        net = equal_cost_net(wanted, 32)
        mine = count_macs(net, torch.empty(1, 3, 32, 32))
        step = count_macs(RegressionNet(2), torch.empty(1, 3, 32, 32))
        step -= count_macs(RegressionNet(1), torch.empty(1, 3, 32, 32))
        assert abs(mine - wanted) <= step / 2 or net.config.blocks == 1
    lr = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(net(lr), upsample(lr), atol=1e-6)


def test_a_latent_has_the_autoencoders_factor(unet):
    "A factor of 4: nothing in the generator may assume 8."
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    vae = LatentAutoencoder(fit_pca(images, 16, factor=4)).eval()
    vae.factor = 4
    generator = OneStepGenerator(vae, unet, SCHEDULER).eval()
    assert generator.latent_shape(torch.empty(1, 3, 64, 32)) == (16, 16, 8)
    assert upscale_in_one_step(generator, torch.rand(1, 3, 16, 16)).shape == (1, 3, 64, 64)


def test_methods_are_the_functions_they_name(vae, unet, monkeypatch):
    from tocsr.evaluation import held_out

    p = get_profile("smoke")
    hr = imresize(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 8) * 2 - 1
    lr = imresize(hr, 1 / 4)

    class FixedPairs:
        def __init__(self, p, side, factor):
            self.p = p

        def __len__(self):
            return 2

        def pair(self, i):
            return hr[i : i + 1], lr[i : i + 1]

    monkeypatch.setattr(held_out, "HeldOutPairs", FixedPairs)
    torch.manual_seed(0)
    net = RegressionNet(1, 8)
    nn.init.normal_(net.tail.weight, 0, 0.1)
    generator = OneStepGenerator(vae, unet, SCHEDULER).eval()
    common = dict(scale=4, seed=7, device="cpu", side=64)
    methods = [
        upscale_with_bicubic(4),
        upscale_with_regression(net, 64, trained_px=96, device="cpu"),
        upscale_with_steps("paper", generator.model, vae, steps=2, trained_px=96, **common),
        *upscale_with_student("student", generator, consistency_factor=8, trained_px=96, **common),
    ]
    rows, images, values = evaluate_methods(methods, p, 64, factor=8)
    names = ["bicubic", "L1 regression", "paper, 2 steps", "student", "student + consistency"]
    assert [r["method"] for r in rows] == list(values) == names
    assert [r["trained_px"] for r in rows] == [None, 96, 96, 96, 96]
    assert {r["evaluated_px"] for r in rows} == {64}
    assert list(images) == ["LR", *names, "HR"]
    x = upsample(lr)
    noise = start_noise((16, 8, 8), 7, [0, 1])
    with torch.no_grad():
        z_l = vae.encode(x)
        two = vae.decode(ddim_sample(unet, SCHEDULER, noise, 2, z_l))
        one = generator(x, noise)
        assert torch.allclose(images["L1 regression"], net(lr), atol=1e-5)
    assert torch.equal(images["bicubic"], x)
    assert torch.allclose(images["paper, 2 steps"], two, atol=1e-4)
    assert torch.allclose(images["student"], one, atol=1e-4)
    consistent = back_project(images["student"], lr, 8)
    assert torch.allclose(images["student + consistency"], consistent, atol=1e-5)
    vae_macs = count_macs(vae, hr[:1])
    macs = [r["macs_G"] * 1e9 - vae_macs for r in rows]
    assert macs[2] == pytest.approx(2 * macs[3])
