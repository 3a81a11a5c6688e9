"Two independent counters, SD 1.5's published size, and nothing changed by counting."

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import Attention
from torch import nn

from tocsr.core.config import UNetConfig
from tocsr.models.architecture import PAPER_ARCHITECTURE, TEXT_FREE_PAPER_ARCHITECTURE
from tocsr.models.complexity import (
    count_macs,
    count_params,
    latency_ms,
    macs_by_kind,
    part_costs,
    sd15_unet,
    unet_inputs,
)
from tocsr.models.diffusion import nano_unet, null_context
from tocsr.models.staged_unet import build_staged_unet, split_into_stages
from tocsr.models.surrogates import assemble, build_library


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return nano_unet(UNetConfig(), 16).eval().requires_grad_(False)


def test_counts_by_hand():
    assert count_params(nn.Conv2d(4, 320, 3)) == 4 * 320 * 9 + 320
    assert count_macs(nn.Conv2d(4, 8, 3, padding=1), torch.zeros(1, 4, 10, 10)) == 8 * 100 * 4 * 9
    assert count_macs(nn.Linear(5, 7), torch.zeros(2, 3, 5)) == 2 * 3 * 5 * 7
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1, stride=2))
    x = torch.zeros(2, 4, 10, 10)
    assert (
        sum(macs_by_kind(net, x).values())
        == count_macs(net, x)
        == 2 * (8 * 100 * 2 * 9 + 4 * 25 * 8)
    )


def test_attention_products_by_hand():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(query_dim=24, cross_attention_dim=10, heads=3, dim_head=4)

        def forward(self, x, c):
            return self.attention(x, encoder_hidden_states=c)

    inputs = torch.zeros(2, 5, 24), torch.zeros(2, 7, 10)
    kinds = macs_by_kind(Cross(), *inputs)
    assert kinds["attention"] == 2 * 2 * 5 * 7 * 12
    assert sum(kinds.values()) == count_macs(Cross(), *inputs)


def test_counters_agree(nano):
    teacher = split_into_stages(nano)
    library = build_library(teacher, context=null_context(nano, 1))
    nets = [
        (nano, 16),
        (assemble(teacher, library, PAPER_ARCHITECTURE), 16),
        (sd15_unet(4), 64),
        (build_staged_unet(sd15_unet(16).config, TEXT_FREE_PAPER_ARCHITECTURE), 64),
    ]
    for net, side in nets:
        inputs = unet_inputs(net, side, tokens=77)
        by_hand = sum(macs_by_kind(net, *inputs).values())
        assert by_hand == pytest.approx(count_macs(net, *inputs), rel=0.01)
        rows = part_costs(net, *inputs)
        assert sum(r["macs"] + r["attention"] for r in rows) == by_hand
        assert sum(r["params"] for r in rows) == count_params(net)


def test_published_sizes(nano):
    assert count_params(sd15_unet(4)) == 859_520_964
    assert count_params(nano) == pytest.approx(8.6e6, rel=0.005)
    assert count_macs(nano, *unet_inputs(nano, 16, tokens=1)) == pytest.approx(0.24e9, rel=0.02)
    sd16 = sd15_unet(16)
    kinds = macs_by_kind(sd16, *unet_inputs(sd16))
    total = count_macs(sd16, *unet_inputs(sd16))
    layers = sum(kinds.values()) - kinds["attention"]
    assert (round(total / 1e9, 1), round(layers / 1e9, 1)) == (401.9, 338.9)


def test_autoencoders_at_512_pixels():
    with torch.device("meta"):
        tiny = AutoencoderTiny(latent_channels=16)
        full = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        image = torch.empty(1, 3, 512, 512)
        latent = torch.empty(1, 16, 64, 64)
    costs = [count_macs(tiny.encoder, image), count_macs(tiny.decoder, latent)]
    costs += [count_macs(full.encoder, image), count_macs(full.decoder, latent[:, :4])]
    assert [round(c / 1e9, d) for c, d in zip(costs, (1, 1, 0, 0), strict=True)] == [
        61.2,
        70.7,
        558,
        1257,
    ]


def test_counting_does_not_change_the_module(nano):
    before = {k: v.clone() for k, v in nano.state_dict().items()}
    count_macs(nano, *unet_inputs(nano, 8))
    macs_by_kind(nano, *unet_inputs(nano, 8))
    assert all(
        v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in nano.state_dict().items()
    )
    assert not any(m._forward_hooks for m in nano.modules())


def test_latency_grows_with_the_image():
    small, large = (
        latency_ms(nn.Conv2d(16, 16, 3), torch.zeros(1, 16, s, s), repeats=7) for s in (8, 512)
    )
    assert 0 < small < large
