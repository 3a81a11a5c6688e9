"""The plan: from the command line, from a folder with configurations alone, and with errors that
say what is wrong.
"""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from typer.testing import CliRunner

from tocsr.cli.main import app
from tocsr.cli.plan import (
    Machine,
    bare_networks,
    count_parts,
    make_plan,
    mean_cost,
    stage_phases,
)
from tocsr.core.config import get_profile, share_batch
from tocsr.models.complexity import activation_bytes, count_macs
from tocsr.models.surrogates import assemble
from tocsr.search.tabular import parse_subspace
from tocsr.stages.expansion_training import joint_batch

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
    "block_out_channels": [32, 64, 128, 128],
}


def call(*args):
    return CliRunner().invoke(app, ["plan", "--profile", "smoke", "--tflops", "0.5", *args])


@pytest.fixture
def folder(tmp_path):
    "SD 1.5's layout, thin, nothing but configurations."
    for part, config in (
        ("unet", SD15),
        (
            "vae",
            {
                "_class_name": "AutoencoderKL",
                "block_out_channels": [32, 32],
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
            },
        ),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_of_configurations_is_enough(folder):
    r = call("--gpus", "2", "--gpu-memory", "1000", "--teacher", str(folder), "--json")
    assert r.exit_code == 0, r.stderr
    plan = json.loads(r.stdout)
    assert plan["teacher"] == str(folder) and plan["rate"] == "stated" and not plan["misfits"]
    assert [s["stage"] for s in plan["stages"]][:5] == [
        "autoencoder",
        "teacher",
        "surrogates",
        "search",
        "compact",
    ]
    assert plan["hours"] == pytest.approx(sum(s["hours"] for s in plan["stages"])) and all(
        s["memory_gib"] > 0 and s["pflops"] > 0 for s in plan["stages"]
    )


def test_a_small_card_is_told_so(folder):
    r = call(
        "--gpus", "1", "--gpu-memory", "0.05", "--teacher", str(folder / "unet")
    )  # the UNet's own folder will do
    assert r.exit_code == 0 and "does not fit; largest batch" in r.stdout


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f / "none", ("no such folder", "none")),
        (lambda f: f / "vae", ("UNet2DConditionModel",)),
        (lambda f: (f / "unet/config.json").write_text("{") and f, ("config.json", "not JSON")),
        (
            lambda f: (
                (f / "unet/config.json").write_text(
                    json.dumps(SD15 | dict(class_embed_type="timestep"))
                )
                and f
            ),
            ("class_embed_type",),
        ),
    ],
)
def test_one_line_names_what_is_wrong(folder, change, words):
    r = call("--gpus", "1", "--gpu-memory", "80", "--teacher", str(change(folder)))
    assert r.exit_code == 1 and len(r.stderr.strip().splitlines()) == 1
    for w in words:
        assert w in r.stderr


@pytest.mark.parametrize(
    "args",
    [("--gpus", "1", "--gpu-memory", "-1"), ("--gpus", "1", "--gpu-memory", "80", "--tflops", "0")],
)
def test_a_rate_or_memory_of_nothing_is_refused(args):
    r = call(*args)
    assert r.exit_code == 1 and "must be positive" in r.stderr


def test_hours_follow_the_rate_and_processes_divide_them():
    p = get_profile("smoke", surrogates=dict(names=("R",)), eval=dict(crops=4))
    networks = bare_networks(p)
    one, four = (
        {
            s.stage: s
            for s in make_plan(p, Machine(n, 80, tflops=n / 2 + 0.5), networks=networks).stages
        }
        for n in (1, 4)
    )
    for name in ("adapt", "compact"):  # batch 4: one image per process
        assert four[name].batch == 1 and four[name].pflops == pytest.approx(one[name].pflops / 4)
    assert four["search"].pflops == one["search"].pflops, "the main process searches"
    for name, stage in four.items():
        assert stage.hours == pytest.approx(one[name].hours * stage.pflops / one[name].pflops / 2.5)


@pytest.mark.parametrize("processes", [1, 8])
def test_profile_paper_fits_80_gib_at_every_stage(processes):
    plan = make_plan(get_profile("paper"), Machine(processes, 80, tflops=150))
    assert (
        not plan.misfits
        and len(plan.stages) == 7
        and plan.params_M == pytest.approx(859.59, abs=0.01)
    )


def test_batches_are_shared_as_the_code_does():
    p = get_profile("paper")
    for processes in (1, 3, 8, 100):
        local = share_batch(p, "adapt", processes)
        seen = local.adapt.batch * local.accumulation * processes
        assert seen >= p.adapt.batch and local.accumulation <= p.accumulation
        if processes in (1, 8):
            assert seen == p.adapt.batch
    assert share_batch(p, "surrogates", 8) == p


def test_counted_activations_are_what_autograd_holds():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    held = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(torch.randn(2, 3, 16, 16)).sum()
    assert activation_bytes(net.to("meta"), torch.empty(2, 3, 16, 16, device="meta")) == sum(
        held.values()
    )


def test_checkpointing_keeps_what_autograd_holds():
    "The same network with torch's own checkpointing, its tensors counted in a real forward pass."
    unet = UNet2DConditionModel(
        **(SD15 | dict(block_out_channels=(16, 32, 32, 32), norm_num_groups=4))
    )
    inputs = torch.randn(1, 4, 16, 16), torch.zeros(1).long(), torch.randn(1, 7, 768)
    held = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            held[t.untyped_storage().data_ptr()] = (t, t.untyped_storage().nbytes())
        return t

    unet.enable_gradient_checkpointing()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        unet(*inputs).sample.sum()
    real = sum(n for _, n in held.values())
    unet.disable_gradient_checkpointing()
    free = activation_bytes(unet.to("meta"), *inputs)
    counted = activation_bytes(unet, *inputs, checkpointing=True)
    assert real <= counted < 0.6 * free, "and one segment of the backward pass"


def test_autocast_keeps_half_precision_and_the_latent_size_follows_the_autoencoder(folder):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        x = torch.empty(5, 8)
    assert activation_bytes(net, x) == 4 * 5 * (8 + 16)
    half = 2 * 5 * (8 + 16) + 2 * 16 * 4  # with the second weight, for the gradient of its input
    assert activation_bytes(net, x, device="cuda", precision="bf16") == half
    networks = bare_networks(get_profile("smoke"), folder)  # its AutoencoderKL halves the side once
    parts = count_parts(get_profile("smoke"), networks, "cpu")
    side = get_profile("smoke").data.patch // 2
    inputs = (
        torch.empty(1, 16, side, side),
        torch.zeros(1),
        torch.empty(1, 1, networks.teacher.config.cross_attention_dim),
    )
    assert parts["teacher"].macs == count_macs(networks.teacher, *inputs)
    assert len(parts) == 5 + len(networks.library)


def test_a_hub_name_is_accepted(monkeypatch):
    asked = []

    def load_config(name, subfolder):
        asked.append((name, subfolder))
        if subfolder == "vae":
            raise OSError("offline\nand more")
        return SD15

    for kind in (UNet2DConditionModel, AutoencoderKL):
        monkeypatch.setattr(kind, "load_config", load_config)
    r = call("--gpus", "1", "--gpu-memory", "80", "--teacher", "someone/sd")
    assert asked == [("someone/sd", "unet"), ("someone/sd", "vae")]
    assert r.exit_code == 1 and "someone/sd cannot be read (offline)" in r.stderr


def test_encoder_and_decoder_share_the_autoencoders_parameters(folder):
    for source in (None, folder):
        networks = bare_networks(get_profile("smoke"), source)
        parts = count_parts(get_profile("smoke"), networks, "cpu")
        whole = sum(p.numel() for p in networks.encoder.model.parameters())
        assert parts["encoder"].params + parts["decoder"].params == whole
        assert 0.2 * whole < parts["decoder"].params < 0.9 * whole


def test_a_given_base_autoencoder_is_kept_and_not_trained():
    networks = bare_networks(get_profile("smoke"))
    parts = count_parts(get_profile("smoke"), networks, "cpu")
    found = {}
    for shape in ("lowres", "my/vae"):
        p = get_profile("smoke", autoencoder=dict(start="scratch", shape=shape, steps=7))
        (found[shape],) = stage_phases("autoencoder", p, parts, networks, Machine(1, 80))
    trained, given = found["lowres"], found["my/vae"]
    assert (trained.steps, given.steps) == (14, 7)
    assert given.frozen == 2 * trained.frozen == 2 * trained.trained


def test_the_mean_cost_is_that_of_all_architectures():
    "Every architecture of a small subspace; a removed level takes its resampling with it."
    p = get_profile("smoke")
    networks = bare_networks(p)
    parts = count_parts(p, networks, "cpu")
    lines = ("E1: RA", "E3: R", "deepest: R/2-R/2-R/2 none", "D2: RA R")
    space = parse_subspace(networks.teacher, networks.library, lines)
    macs = []
    for vector in space.vectors():
        net = assemble(networks.teacher, networks.library, space.architecture(vector))
        macs.append(count_macs(net, *networks.inputs))
    assert len(macs) == 36 and max(macs) == parts["teacher"].macs
    mean = sum(macs) / len(macs) / parts["teacher"].macs
    assert mean_cost(networks, parts, space.options) == pytest.approx(mean, rel=5e-3)


@pytest.mark.parametrize("option, count", [("--ablations", 10), ("--no-ablations", 7)])
def test_comparisons_are_planned_on_request(option, count):
    r = call("--gpus", "1", "--gpu-memory", "80", option, "--json")
    assert len(json.loads(r.stdout)["stages"]) == count, r.stderr


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_joint_phase_sees_a_quarter_of_the_batch_whatever_the_processes(processes):
    p = get_profile("paper")
    local = share_batch(p, "teacher", processes)
    batch, passes = joint_batch(local.teacher.batch, processes, local.accumulation)
    seen = batch * passes * processes
    assert seen == 16 if processes != 3 else 16 <= seen < 16 + 3 * passes
    smoke = get_profile("smoke")
    networks = bare_networks(smoke)
    parts = count_parts(smoke, networks, "cpu")
    joint = stage_phases("teacher", local, parts, networks, Machine(processes, 80))[1]
    assert (joint.name, joint.batch, joint.passes) == ("joint", batch, passes)
