"""The plan: from the command line, from a folder with configurations alone, and with errors that
say what is wrong.
"""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tocsr.cli.main import app
from tocsr.cli.plan import activation_bytes, count_parts, make_plan
from tocsr.core.config import get_profile
from tocsr.models.complexity import count_macs

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
        "tabular",
        "search",
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


def test_hours_follow_the_rate_and_processes_share_the_library_alone():
    smoke = get_profile("smoke")
    one = make_plan(smoke, gpus=1, gpu_memory_gib=80, tflops=1.0)
    four = make_plan(smoke, gpus=4, gpu_memory_gib=80, tflops=2.0)
    for a, b in zip(one.stages, four.stages, strict=True):
        if a.stage == "surrogates":
            assert b.hours < 0.4 * a.hours and b.memory_gib < a.memory_gib
        else:
            assert b.hours == pytest.approx(a.hours / 2)


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


def test_half_precision_halves_activations_and_the_latent_size_follows_the_autoencoder(folder):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        x = torch.empty(5, 8)
    assert activation_bytes(net, x) == 4 * 5 * (8 + 16) and activation_bytes(
        net, x, half=True
    ) == 2 * 5 * (8 + 16)
    parts, library, teacher = count_parts(
        get_profile("smoke"), folder
    )  # its AutoencoderKL halves the side once
    side = get_profile("smoke").data.patch // 2
    inputs = (
        torch.empty(1, 16, side, side),
        torch.zeros(1),
        torch.empty(1, 1, teacher.config.cross_attention_dim),
    )
    assert parts["teacher"].macs == count_macs(teacher, *inputs) and len(parts) == 5 + len(library)
