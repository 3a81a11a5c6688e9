"Prediction types, loss, timesteps and DDIM."

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
    output_from_epsilon,
    predict_clean,
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
