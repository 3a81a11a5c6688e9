"""Fine-tuning of the compact network: loss, held-out report, variants."""

import copy
from dataclasses import replace

import pytest
import torch

from tocsr.core.config import CompactConfig, UNetConfig, get_profile
from tocsr.core.files import StoreError
from tocsr.core.store import Artifact, TrainOptions
from tocsr.models.diffusion import nano_unet, noise_schedule
from tocsr.models.staged_unet import save_staged_unet, split_into_stages
from tocsr.models.surrogates import assemble, build_library
from tocsr.stages.finetune import (
    bundled_compact,
    finetune,
    finetune_loss,
    held_out_report,
    load_compact,
    retained_advantage,
)


@pytest.fixture(scope="module")
def networks():
    "A thin teacher of random weights, and a network with one surrogate."
    torch.manual_seed(0)
    thin = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1))
    teacher = split_into_stages(nano_unet(thin, 16).eval().requires_grad_(False))
    library = build_library(teacher, {"E1": ("R",)})
    start = assemble(teacher, library, str(teacher.architecture.swap(E1="R")))
    return teacher, start


def crops(n, generator):
    return torch.randn(n, 16, 8, 8, generator=generator)


def test_loss_is_equation_16_and_the_distance_to_the_teacher(networks):
    teacher, start = networks
    schedule = noise_schedule("epsilon")
    models = dict(net=copy.deepcopy(start).eval())

    def parts(distill, weights=None):
        loss = finetune_loss(
            teacher, schedule, crops, batch=4, distill=distill, weights=weights, seed=3
        )
        with torch.no_grad():
            return loss(0, models)

    plain = parts(0.0)
    assert set(plain) == {"loss", "eps"} and plain["loss"] == plain["eps"]
    both = parts(0.5)
    assert both["eps"] == plain["eps"] and both["output"] > 0
    assert both["loss"].item() == pytest.approx((both["eps"] + 0.5 * both["output"]).item())
    doubled = parts(0.5, torch.full((1000,), 2.0))
    for k in ("eps", "output"):
        assert doubled[k].item() == pytest.approx(2 * both[k].item(), rel=1e-5)
    same = finetune_loss(teacher, schedule, crops, batch=4, distill=1.0)
    assert same(0, dict(net=teacher))["output"] == 0


def test_finetuning_lowers_the_loss_and_leaves_the_library_alone(networks, tmp_path):
    teacher, start = networks
    before = {k: v.clone() for k, v in start.state_dict().items()}
    net = copy.deepcopy(start)
    loss = finetune_loss(teacher, noise_schedule("epsilon"), crops, batch=4, distill=1.0)
    cfg = CompactConfig(steps=12, batch=4, lr=1e-3)
    history = finetune(net, loss, cfg, TrainOptions(tmp_path, device="cpu"))
    assert history[-1]["eps"] < history[0]["eps"] and set(history[0]) >= {"loss", "eps", "output"}
    assert all(torch.equal(v, before[k]) for k, v in start.state_dict().items())


def test_retained_advantage():
    assert retained_advantage(0.9, 0.8) == pytest.approx(0.5)
    assert retained_advantage(0.8, 0.8) == 1 and retained_advantage(0.9, 1.1) is None


def test_held_out_report_against_the_teacher(networks):
    teacher, start = networks
    latents = torch.randn(6, 16, 8, 8)
    nets = dict(teacher=teacher, same=teacher, student=start)
    report = held_out_report(
        nets, noise_schedule("epsilon"), latents, [1.0, 2.0], torch.device("cpu")
    )
    assert report["same"] == report["teacher"] and report["same"]["excess"] == 0
    assert report["student"]["excess_se"] > 0
    for r in report.values():  # the ratio is the mean over levels of the error over the linear's
        assert r["ratio"] == pytest.approx(sum(r["per_level"]) / 2, rel=1e-5)


def test_variants_of_a_finished_stage(networks, tmp_path):
    save_staged_unet(tmp_path / "ours", networks[1])
    noise_schedule("epsilon").save_pretrained(tmp_path / "scheduler")
    artifact = Artifact(tmp_path, dict(results=dict(variants=["ours"])))
    net, schedule = load_compact(artifact)
    assert net.architecture == networks[1].architecture
    assert schedule.config.prediction_type == "epsilon"
    with pytest.raises(StoreError, match="choose one of ours"):
        load_compact(artifact, "paper")


def test_bundled_network_only_where_the_search_chose_it():
    profile = get_profile("cpu")
    said = []
    assert bundled_compact(profile, "[R-R-R]-[R-R-R]", said.append) is None
    assert "is left out" in said[0]
    scratch = replace(profile, compact=replace(profile.compact, start="scratch"))
    assert bundled_compact(scratch, "[R-R-R]-[R-R-R]", said.append) is None and len(said) == 1
    architecture = said[0].split("network is ")[1].split(", ")[0]
    net = bundled_compact(profile, architecture)
    assert str(net.architecture) == architecture
