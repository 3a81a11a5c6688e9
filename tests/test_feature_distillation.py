"""FwKD: independent surrogates, exact resume, a finished training is remembered, processes share
the library.
"""

from types import SimpleNamespace

import pytest
import torch

from tocsr.core.random import shared_step_generator
from tocsr.core.store import TrainOptions
from tocsr.core.time_limit import TimeLimitReached
from tocsr.core.training import TrainingError, step_generator
from tocsr.models.architecture import StageError
from tocsr.models.complexity import count_params
from tocsr.models.diffusion import TRAIN_TIMESTEPS, null_context
from tocsr.models.staged_unet import split_into_stages
from tocsr.models.surrogates import build_library
from tocsr.stages import feature_distillation
from tocsr.stages.feature_distillation import (
    assign_to_ranks,
    distill_surrogates,
    fwkd_overhead,
    overhead_claim,
    relative_feature_error,
    shard_library,
)

THREE = ("E1", "Mid", "D2")


@pytest.fixture(scope="module")
def teacher(nano):
    return split_into_stages(nano)


def random_batches(unet):
    def batch(step):
        g = shared_step_generator(0, step)
        z = torch.randn(2, 16, 8, 8, generator=g)
        return z, torch.randint(TRAIN_TIMESTEPS, (2,), generator=g), null_context(unet, 2)

    return batch


def train(
    teacher, nano, stages, folder, *, kill_at=None, steps=5, design="R", checkpoint=0, **options
):
    "Distill one surrogate per stage, optionally interrupted before a step."
    source = random_batches(nano)

    def batch(step):
        if step == kill_at:
            raise KeyboardInterrupt
        return source(step)

    library = build_library(teacher, {s: (design,) for s in stages})
    options = TrainOptions(folder, checkpoint_s=checkpoint, **options)
    return library, distill_surrogates(
        teacher, library, batch, steps=steps, lr=1e-3, options=options
    )


def same_weights(a, b):
    pairs = zip(a, b, strict=True)
    return all(
        all(map(torch.equal, x.state_dict().values(), y.state_dict().values()))
        for (_, _, x), (_, _, y) in pairs
    )


def test_surrogates_are_independent_and_training_resumes(nano, teacher, tmp_path):
    three, losses = train(teacher, nano, THREE, tmp_path / "a")
    _, own = train(teacher, nano, ("Mid",), tmp_path / "b")
    assert torch.equal(losses[:, 1], own[:, 0])
    with pytest.raises(KeyboardInterrupt):
        train(teacher, nano, THREE, tmp_path / "c", kill_at=3)
    resumed, losses2 = train(teacher, nano, THREE, tmp_path / "c")
    assert torch.equal(losses, losses2) and same_weights(three, resumed)
    assert all(p.grad is None for p in nano.parameters())


def test_a_finished_training_is_not_repeated(nano, teacher, tmp_path):
    first, losses = train(teacher, nano, THREE, tmp_path)
    again, losses2 = train(teacher, nano, THREE, tmp_path, kill_at=0)  # any step would raise
    assert torch.equal(losses, losses2) and same_weights(first, again)
    assert not any(p.requires_grad for _, _, m in again for p in m.parameters())


def test_the_result_of_another_recipe_is_not_taken(nano, teacher, tmp_path):
    _, short = train(teacher, nano, ("Mid",), tmp_path, steps=1)
    _, other = train(teacher, nano, ("Mid",), tmp_path, steps=1, design="RS")
    _, longer = train(teacher, nano, ("Mid",), tmp_path, steps=2)
    assert not torch.equal(short, other) and len(longer) == 2 and torch.equal(longer[:1], short)


def test_a_time_limit_stops_at_a_checkpoint_and_the_next_call_goes_on(
    nano, teacher, tmp_path, monkeypatch
):
    _, expected = train(teacher, nano, THREE, tmp_path / "a")
    left = iter([1e9, 1e9, 0.0])
    with monkeypatch.context() as m:
        m.setattr(feature_distillation, "time_left", lambda: next(left))
        with pytest.raises(TimeLimitReached, match="step 3 of 5"):
            train(teacher, nano, THREE, tmp_path / "b", checkpoint=1e9)
    lines = []
    _, resumed = train(teacher, nano, THREE, tmp_path / "b", log=lines.append)
    assert torch.equal(resumed, expected) and "resuming at step 3 of 5" in lines[0]


def test_log_and_callback_see_every_step(nano, teacher, tmp_path):
    seen = []
    lines = []
    _, losses = train(
        teacher,
        nano,
        ("E1", "D4"),
        tmp_path,
        callback=lambda step, metrics: seen.append((step, metrics)),
        log=lines.append,
    )
    assert [step for step, _ in seen] == list(range(5)) and len(lines) == 5
    for row, (_, metrics) in zip(losses, seen, strict=True):
        assert metrics["loss"] == pytest.approx(row.mean().item())
        assert [metrics["E1 R"], metrics["D4 R"]] == row.tolist() and 0 < metrics["lr"] <= 1e-3


def test_a_loss_that_is_not_finite_names_its_surrogate(nano, teacher, tmp_path):
    library = build_library(teacher, {"E1": ("R",), "D4": ("RR", "R")})
    with torch.no_grad():
        library.surrogates["D4"]["R"].blocks[0].resnet.conv2.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="D4 R is not finite at step 0"):
        distill_surrogates(
            teacher, library, random_batches(nano), steps=2, lr=1e-3, options=TrainOptions(tmp_path)
        )


def test_relative_error_of_zero_is_one():
    x = torch.randn(3, 4, 5, 5)
    skips = x, 100 * x
    assert torch.allclose(
        relative_feature_error((0 * x, (x, 0 * x)), (x, skips)).mean(), torch.tensor(1.0)
    )
    assert relative_feature_error((x, skips), (x, skips)).abs().max() == 0


def test_every_surrogate_has_one_rank_and_work_is_even(teacher):
    library = build_library(teacher)
    for world in (1, 2, 4):
        parts = [shard_library(library, r, world) for r in range(world)]
        names = [(s, d) for part in parts for s, d, _ in part]
        assert sorted(names) == sorted((s, d) for s, d, _ in library) and len(set(names)) == len(
            names
        )
        work = [sum(count_params(m) * 4.0**-m.shape.level for _, _, m in part) for part in parts]
        assert max(work) <= 1.3 * sum(work) / world
    assert assign_to_ranks(library, 3) == assign_to_ranks(library, 3)


def test_shared_generator_is_step_generator_of_one_process(monkeypatch):
    def draw(g):
        return torch.randn(3, generator=g)

    alone = draw(step_generator(5, 7))
    assert torch.equal(draw(shared_step_generator(5, 7)), alone)
    monkeypatch.setenv("RANK", "1")
    assert torch.equal(draw(shared_step_generator(5, 7)), alone) and not torch.equal(
        draw(step_generator(5, 7)), alone
    )


def test_more_processes_than_surrogates_is_an_error(teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(feature_distillation, "init_distributed", lambda: None)
    state = SimpleNamespace(process_index=0, num_processes=3, device=torch.device("cpu"))
    monkeypatch.setattr(feature_distillation, "PartialState", lambda **kw: state)
    few = build_library(teacher, {"Mid": ("R",), "D4": ("R/2",)})
    with pytest.raises(StageError, match="3 processes for 2 surrogates"):
        distill_surrogates(
            teacher, few, lambda step: None, steps=1, lr=1e-3, options=TrainOptions(tmp_path)
        )


def test_overhead_is_measured_without_training(nano, teacher):
    few = build_library(teacher, {"Mid": ("R",), "D4": ("R/2",)})
    before = {k: v.clone() for k, v in few.surrogates["D4"]["R/2"].state_dict().items()}
    cost = fwkd_overhead(teacher, few, random_batches(nano), rounds=3)
    assert all(
        torch.equal(v, before[k]) for k, v in few.surrogates["D4"]["R/2"].state_dict().items()
    )
    assert not any(p.requires_grad for _, _, m in few for p in m.parameters())
    assert 0 < cost["low"] <= cost["overhead"] <= cost["high"] and cost["teacher_s"] > 0
    claim = overhead_claim(dict(overhead=cost, surrogates=2))
    assert (
        claim["spread"][0] <= claim["ours"] <= claim["spread"][1]
        and "2 surrogates" in claim["reason"]
    )


def test_trained_surrogates_are_rounded_to_half_precision(nano, teacher, tmp_path):
    whole, _ = train(teacher, nano, THREE, tmp_path / "a")
    rounded, _ = train(teacher, nano, THREE, tmp_path / "b", half_weights=True)
    for (_, _, x), (_, _, y) in zip(whole, rounded, strict=True):
        for key, value in x.named_parameters():
            assert torch.equal(y.get_parameter(key), value.half().float()), key
