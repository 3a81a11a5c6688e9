"The staged UNet: bit for bit the diffusers UNet, refusals by name, and a diffusers model on disk."

import json
import stat

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tocsr.core.files import StoreError
from tocsr.core.weights import bundled_weights
from tocsr.models.architecture import PAPER_ARCHITECTURE, REMOVED, StageError
from tocsr.models.complexity import count_macs, count_params, sd15_unet, unet_inputs
from tocsr.models.diffusion import null_context
from tocsr.models.staged_unet import (
    Block,
    StagedUNet,
    build_stage,
    capture_stage_io,
    load_staged_unet,
    save_staged_unet,
    split_into_stages,
)
from tocsr.models.surrogates import assemble, build_library, trainable_copy


@pytest.fixture(scope="module")
def library(nano):
    return build_library(split_into_stages(nano), context=null_context(nano, 1))


def thin(**changes):
    "SD 1.5's topology, key names and head count, as thin as 32 norm groups allow."
    torch.manual_seed(1)
    config = dict(
        sample_size=64,
        in_channels=16,
        out_channels=16,
        block_out_channels=(32, 64, 128, 128),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    return UNet2DConditionModel(**{**config, **changes}).eval()


PLAIN_DOWN = "DownBlock2D"
PLAIN_UP = "UpBlock2D"
CROSS_DOWN = "CrossAttnDownBlock2D"
CROSS_UP = "CrossAttnUpBlock2D"
UNETS = {
    "three levels": dict(
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=(PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, PLAIN_UP),
    ),
    "two levels": dict(
        block_out_channels=(32, 32),
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=(CROSS_DOWN, PLAIN_DOWN),
        up_block_types=(PLAIN_UP, CROSS_UP),
    ),
    "uneven depth": dict(
        block_out_channels=(32, 64, 64),
        layers_per_block=(1, 3, 2),
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=(CROSS_DOWN,) * 3,
        up_block_types=(CROSS_UP,) * 3,
    ),
    "SD 2 style": dict(
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=(1, 2, 2, 2),
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "plain middle, scale and shift": dict(
        block_out_channels=(32, 32),
        cross_attention_dim=16,
        mid_block_type="UNetMidBlock2D",
        resnet_time_scale_shift="scale_shift",
        down_block_types=(PLAIN_DOWN,) * 2,
        up_block_types=(PLAIN_UP,) * 2,
    ),
    "deep attention": dict(
        block_out_channels=(32, 64, 64),
        cross_attention_dim=16,
        attention_head_dim=2,
        transformer_layers_per_block=2,
        down_block_types=(PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, PLAIN_UP),
    ),
    "six norm groups": dict(
        block_out_channels=(48, 60, 84),
        norm_num_groups=6,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=(CROSS_DOWN,) * 3,
        up_block_types=(CROSS_UP,) * 3,
    ),
}


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (10, 13)])
def test_split_is_bitwise_the_same(name, size):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[name]).eval()
    staged = StagedUNet.from_unet(unet)
    z = torch.randn(2, 4, *size)
    t = torch.tensor([1, 900])
    c = torch.randn(2, 3, unet.config.cross_attention_dim)
    with torch.no_grad():
        assert torch.equal(unet(z, t, c).sample, staged(z, t, c).sample)
        assert torch.equal(
            unet(z, 7, c, return_dict=False)[0], staged(z, 7, c, return_dict=False)[0]
        )
    assert count_params(staged) == count_params(unet)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(class_embed_type="timestep"), "class_embed_type"),
        (dict(num_class_embeds=3), "num_class_embeds"),
        (dict(time_cond_proj_dim=8), "time_cond_proj_dim"),
        (dict(dual_cross_attention=True), "dual_cross_attention"),
        (dict(center_input_sample=True), "center_input_sample"),
        (dict(attention_type="gated"), "attention_type"),
        (dict(mid_block_type=None), "mid_block_type"),
        (dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "UNetMidBlock2DSimpleCrossAttn"),
        (
            dict(down_block_types=(CROSS_DOWN, "AttnDownBlock2D", CROSS_DOWN, PLAIN_DOWN)),
            "AttnDownBlock2D",
        ),
    ],
)
def test_unknown_features_are_named(change, word):
    with pytest.raises(StageError, match=word):
        split_into_stages(thin(cross_attention_dim=32, **change))


def test_sd15_shape_on_meta():
    unet = sd15_unet(16)
    staged = split_into_stages(unet)
    inputs = unet_inputs(unet, side=32)
    with torch.no_grad():
        assert staged(*inputs).sample.shape == unet(*inputs).sample.shape == (1, 16, 32, 32)
    assert count_params(staged) == count_params(unet)
    assert count_macs(staged, *inputs) == count_macs(unet, *inputs)
    assert str(staged.architecture) == "[RARA-RARA-RARA-RR]-[RAR]-[RRR-RARARA-RARARA-RARARA]"


def test_captured_inputs_reproduce_every_stage(nano):
    staged = split_into_stages(nano)
    with torch.no_grad():
        captured = capture_stage_io(
            staged, torch.randn(2, 16, 16, 16), torch.tensor([1, 900]), null_context(nano, 2)
        )
        for name, (args, (x, skips)) in captured.items():
            again, again_skips = staged.stages[name](*args)
            assert torch.equal(x, again) and all(map(torch.equal, skips, again_skips))
    assert list(captured) == list(staged.shapes)
    assert not any(s._forward_hooks for s in staged.stages.values())


def test_a_design_of_other_norm_groups_is_built():
    "Groups follow the width: 84 / 4 = 21 channels take 3 of the teacher's 6 groups."
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS["six norm groups"])
    stage = build_stage(split_into_stages(unet).stages["E3"], "RS/4")
    assert (
        stage.blocks[0].resnet.norm2.num_groups == 3
        and stage.blocks[0].resnet.norm1.num_groups == 6
    )


# As a diffusers model


ARCHITECTURE = "[R-RSRS/2-RARA]-[R/2]-[R-R-RA^-RSS]"


@pytest.fixture(scope="module")
def net(nano):
    torch.manual_seed(3)
    return StagedUNet(unet=dict(nano.config), architecture=ARCHITECTURE).eval()


def outputs(net, **kwargs):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, net.conv_in.in_channels, 16, 16, generator=g).to(net.dtype)
    with torch.no_grad():
        return net(z, torch.tensor([1, 900]), null_context(net, 2), **kwargs).sample


@pytest.mark.parametrize("load", [dict(), dict(low_cpu_mem_usage=False)])
def test_from_pretrained_is_bitwise_the_same(net, tmp_path, load):
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "StagedUNet" and config["architecture"] == ARCHITECTURE
    assert not any(k.startswith("_") for k in config["unet"])
    back, info = StagedUNet.from_pretrained(tmp_path, output_loading_info=True, **load)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not back.training
    assert torch.equal(outputs(back), outputs(net))
    assert back.config.cross_attention_dim == 64 and back.config["architecture"] == ARCHITECTURE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs(net, tmp_path, dtype):
    net.save_pretrained(tmp_path)
    half = StagedUNet.from_pretrained(tmp_path, torch_dtype=dtype)
    assert half.dtype == dtype and {p.dtype for p in half.parameters()} == {dtype}
    out = outputs(half)
    assert (
        out.dtype == dtype and (out.float() - outputs(net)).abs().max() < 0.1 * outputs(net).std()
    )


def test_built_from_config_alone(nano, net):
    with torch.device("meta"):
        assert StagedUNet.from_config(net.config).device.type == "meta"
    torch.manual_seed(7)
    fresh = StagedUNet.from_config(net.config)
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    assert {k: v.shape for k, v in fresh.state_dict().items()} == shapes
    out = outputs(fresh.eval())
    assert out.isfinite().all() and 0.05 < out.std() < 5
    scales = {k: v.std() for k, v in fresh.state_dict().items() if v.ndim > 1}
    for k, v in nano.state_dict().items():  # parts that were not replaced have diffusers' own scale
        if k in scales and v.ndim > 1:
            assert 0.5 < scales[k] / v.std() < 2, k
    with pytest.raises(StageError, match="E3 changes the number of channels"):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS["three levels"])
        StagedUNet(unet=dict(unet.config), architecture="[R-R]-[R]-[R-R-R]")


def test_widened_input_is_saved(net, tmp_path):
    wide = trainable_copy(net)
    wide.conv_in = torch.nn.Conv2d(32, wide.conv_in.out_channels, 3, padding=1)
    save_staged_unet(tmp_path, wide.eval())
    assert load_staged_unet(tmp_path).conv_in.in_channels == 32
    assert torch.equal(outputs(StagedUNet.from_pretrained(tmp_path)), outputs(wide))
    assert net.config.in_channels == 16


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less(net):
    live = trainable_copy(net)
    z = torch.randn(2, 16, 16, 16)
    c = null_context(net, 2)

    def step():
        held = {}
        live.zero_grad()

        def pack(t):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = live(z, torch.tensor([1, 900]), c).sample.square().mean()
        loss.backward()
        return sum(held.values()), [p.grad.clone() for p in live.parameters() if p.grad is not None]

    full, expected = step()
    live.enable_gradient_checkpointing()
    assert live.is_gradient_checkpointing
    on = [m for m in live.modules() if getattr(m, "gradient_checkpointing", False)]
    assert on and all(isinstance(m, Block) for m in on)
    kept, gradients = step()
    assert all(map(torch.equal, gradients, expected)) and len(gradients) == len(expected)
    assert kept < 0.5 * full
    live.disable_gradient_checkpointing()
    assert not live.is_gradient_checkpointing and step()[0] == full


def test_network_round_trip(nano, library, tmp_path):
    net = assemble(split_into_stages(nano), library, "[R-RSRS/2-RARA]-[R/2]-[R-R-RA-RSS]")
    folder = save_staged_unet(tmp_path, net)
    assert torch.equal(outputs(load_staged_unet(folder)), outputs(net))
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_mode & stat.S_IROTH
    again = save_staged_unet(tmp_path / "again", StagedUNet.from_pretrained(folder))
    assert (again / "config.json").read_text() == (
        folder / "config.json"
    ).read_text()  # no path in it
    own = trainable_copy(net)
    own(torch.randn(1, 16, 16, 16), 5, null_context(nano, 1)).sample.sum().backward()
    assert own.conv_in.weight.grad is not None and nano.conv_in.weight.grad is None
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(StoreError, match="truncated"):
        load_staged_unet(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(StoreError, match="config"):
        load_staged_unet(folder)
    with pytest.raises(StoreError, match="config.json is missing"):
        load_staged_unet(tmp_path / "nowhere")


def test_the_bundled_compact_network_loads_both_ways():
    folder = bundled_weights("compact")
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16}
    for net in (load_staged_unet(folder), StagedUNet.from_pretrained(folder)):
        state = net.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(v, stored[k].float()) for k, v in state.items())


def test_paper_network_from_config_at_sd15_shape():
    with torch.device("meta"):
        net = StagedUNet(unet=dict(sd15_unet(16).config), architecture=PAPER_ARCHITECTURE)
    assert count_params(net) == 132_996_816
    assert all(n in net.stages for n in ("E1", "E2", "E3")) and REMOVED in net.architecture.options
