"Prediction types, loss, timesteps and DDIM."

import re
from copy import deepcopy

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from tocsr.core.config import UNetConfig
from tocsr.models.diffusion import (
    PREDICTION_TYPES,
    ddim_sample,
    diffusion_loss,
    epsilon_output_scale,
    estimates_from_output,
    nano_unet,
    noise_schedule,
    null_context,
    output_from_epsilon,
    predict,
    predict_clean,
    predict_epsilon,
    set_context,
    signal_noise,
    uniform_timesteps,
)


class Oracle(nn.Module):
    "Returns the exact epsilon or v of a known clean latent."

    def __init__(self, z_0, schedule):
        super().__init__()
        self.z_0 = z_0
        self.schedule = schedule
        self.config = nano_unet(UNetConfig(), z_0.shape[1]).config
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, z_t, t, context):
        a, s = (v[:, None, None, None] for v in signal_noise(self.schedule, t))
        eps = (z_t - a * self.z_0) / s
        v = a * eps - s * self.z_0
        is_epsilon = self.schedule.config.prediction_type == "epsilon"
        return UNet2DConditionOutput(sample=eps if is_epsilon else v)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_network_that_knows_the_answer(kind):
    torch.manual_seed(0)
    z_0, noise = torch.randn(2, 2, 4, 8, 8)
    t = torch.tensor([20, 900])
    schedule = noise_schedule(kind)
    oracle = Oracle(z_0, schedule)
    assert diffusion_loss(oracle, z_0, t, noise, schedule) < 1e-6
    z_t = schedule.add_noise(z_0, noise, t)
    assert torch.allclose(predict_clean(oracle, z_t, t, schedule), z_0, atol=1e-3)
    for steps in (1, 4):
        assert torch.allclose(ddim_sample(oracle, schedule, noise, steps), z_0, atol=1e-2)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_conversions_agree_with_each_other_and_with_autograd(kind):
    torch.manual_seed(0)
    out, z_t = torch.randn(2, 3, 4, 2, 2)
    t = torch.tensor([0, 500, 999])
    schedule = noise_schedule(kind)
    out.requires_grad_()
    eps, z_0 = estimates_from_output(out, z_t, t, schedule)
    assert torch.allclose(schedule.add_noise(z_0, eps, t), z_t, atol=1e-4)
    assert torch.allclose(output_from_epsilon(eps, z_t, t, schedule), out, atol=1e-3)
    (slope,) = torch.autograd.grad(eps.sum(), out)
    assert torch.equal(slope, epsilon_output_scale(t, schedule).expand_as(slope))


def test_sampling_runs_on_the_device_of_the_latents():
    unet = nano_unet(UNetConfig(), 4).to("meta")
    noise = torch.empty(2, 4, 8, 8, device="meta")
    out = ddim_sample(unet, noise_schedule("v_prediction"), noise, 2)
    assert out.device.type == "meta" and out.shape == noise.shape


def test_timesteps_are_uniform_and_spread():
    schedule = noise_schedule()
    total = schedule.config.num_train_timesteps
    draws = torch.stack(
        [uniform_timesteps(8, torch.Generator().manual_seed(i), schedule) for i in range(200)]
    )
    assert draws.min() >= 0 and draws.max() < total
    assert draws.float().mean() == pytest.approx((total - 1) / 2, abs=15)
    slices = [len(set((d * 8 // total).tolist())) for d in draws]
    assert min(slices) >= 7  # one in (nearly) every eighth of the schedule


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="v_prediction"):
        noise_schedule("x0")


@pytest.fixture
def thin():
    "A UNet with cross-attention to 12 channels, epsilon prediction, random weights."
    torch.manual_seed(0)
    cfg = UNetConfig(channels=(8, 16), layers=1, heads=(1, 2), context_dim=12, groups=4)
    return nano_unet(cfg, 4).eval().requires_grad_(False)


def test_the_fixed_context_is_what_diffusers_own_forward_reads(thin):
    z = torch.randn(3, 4, 8, 8)
    t = torch.tensor([1, 500, 990])
    prompt = torch.randn(7, 12)
    schedule = noise_schedule()
    without = predict_epsilon(thin, z, t, schedule)
    ones = thin(z, t, encoder_hidden_states=torch.ones(3, 1, 12)).sample
    assert torch.equal(without, ones)
    theirs = thin(z, t, encoder_hidden_states=prompt.repeat(3, 1, 1)).sample
    set_context(thin, prompt)
    assert torch.equal(predict_epsilon(thin, z, t, schedule), theirs)
    assert not torch.allclose(theirs, without, atol=1e-3)
    a, s = (v[:, None, None, None] for v in signal_noise(schedule, t))
    clean = predict_clean(thin, z, t, schedule)
    assert torch.allclose(clean, (z - s * theirs) / a, rtol=1e-4, atol=1e-4)
    loss = diffusion_loss(thin, z, t, torch.zeros_like(z), schedule)
    z_t = schedule.add_noise(z, torch.zeros_like(z), t)
    theirs = thin(z_t, t, encoder_hidden_states=prompt.repeat(3, 1, 1)).sample
    assert loss.item() == pytest.approx(theirs.square().mean().item(), rel=1e-5)


def test_a_call_can_bring_a_context_of_its_own(thin):
    z = torch.randn(2, 4, 8, 8)
    t = torch.tensor([10, 700])
    prompts = torch.randn(2, 5, 12)
    schedule = noise_schedule("v_prediction")
    set_context(thin, torch.randn(7, 12))
    eps, z_0 = predict(thin, z, t, schedule, context=prompts)
    theirs = thin(z, t, encoder_hidden_states=prompts).sample
    assert torch.equal(eps, estimates_from_output(theirs, z, t, schedule)[0])
    assert torch.equal(z_0, predict_clean(thin, z, t, schedule, context=prompts))


def test_a_fixed_context_follows_the_unet_and_is_copied_with_it(thin):
    prompt = torch.randn(1, 7, 12)
    set_context(thin, prompt)
    copy = deepcopy(thin).double()
    assert torch.equal(null_context(copy, 2), prompt.double().expand(2, -1, -1))
    assert "fixed_context" not in thin.state_dict()  # diffusers reads the folder without a warning
    assert null_context(set_context(thin, None), 2).shape == (2, 1, 12)


@pytest.mark.parametrize("shape", [(7, 13), (2, 7, 12), (12,), (0, 12)])
def test_a_context_of_another_shape_is_refused(thin, shape):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape[-3:]))}.*\(tokens, 12\)"):
        set_context(thin, torch.zeros(shape))
