"""The training loop: finished trainings are remembered, limits and signals stop it at a checkpoint,
options do what they say.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tocsr.core.config import UNetConfig
from tocsr.core.store import TrainOptions
from tocsr.core.training import TrainingError, adamw, ema_decay, fit, step_generator
from tocsr.models.diffusion import diffusion_loss, nano_unet, noise_schedule

ROOT = Path(__file__).resolve().parents[1]

# A stage of three trainings, each from its own weights; every step leaves a line in `steps`. Forked
# after the imports, which take longer than all training.
STAGE = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from tocsr.core.config import get_profile
from tocsr.core.files import save_weights
from tocsr.core.store import run_stage, stage
from tocsr.core.time_limit import TimeLimitReached
from tocsr.core.training import fit, step_generator

RUNS, SMOKE = Path(os.environ["TOCSR_RUNS"]), get_profile("smoke", device="cpu")
torch.set_num_threads(1)

def wait_at(name, step):
    "Block for ever at the place that the file `stop` names."
    stop = RUNS/"stop"
    if stop.is_file() and stop.read_text() == f"{name} {step}":
        (RUNS/"waiting").touch()
        time.sleep(600)

@stage("three", data=False)
def run_three(run):
    losses = {}
    for name in ("first", "second", "third"):
        torch.manual_seed(len(name))
        net = nn.Linear(4, 1)
        def loss(step, models):
            with open(RUNS/"steps", "a") as f: f.write(f"{name} {step}\\\\n")
            wait_at(name, step)
            if os.environ.get("SLOW"): time.sleep(0.2)
            x = torch.randn(8, 4, generator=step_generator(len(name), step))
            return (models["net"](x) - x.sum(1, keepdim=True)).pow(2).mean()
        options = run.training(name)
        history = fit(dict(net=net), loss, 8, 0.05, options=options, ema=0.9, checkpoint_s=0)
        losses[name] = [h["loss"] for h in history]
        save_weights(run.dir/f"{name}.safetensors", net)
    return losses
""".replace("\\\\n", "\\n")

KILLS = (
    STAGE
    + """
def compute():
    child = os.fork()
    if child: return child
    try: run_stage("three", SMOKE)
    finally: os._exit(0)

for place in ("second 3", "third 5"):
    (RUNS/"stop").write_text(place)
    child = compute()
    while not (RUNS/"waiting").exists(): time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (RUNS/"waiting").unlink()
(RUNS/"stop").unlink()
os.waitpid(compute(), 0)
"""
)

WHOLE = STAGE + 'run_stage("three", SMOKE)\n'


def start(tmp_path: Path, text: str, runs: str, **env) -> subprocess.Popen:
    (tmp_path / runs).mkdir(exist_ok=True)
    (tmp_path / f"{runs}.py").write_text(text)
    env = (
        os.environ
        | dict(TOCSR_RUNS=str(tmp_path / runs), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        | env
    )
    return subprocess.Popen(
        [sys.executable, tmp_path / f"{runs}.py"], env=env, stderr=subprocess.PIPE, text=True
    )


def finish(child: subprocess.Popen) -> str:
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-3000:]
    return err


def steps(runs: Path) -> list[str]:
    return (runs / "steps").read_text().splitlines()


def result(runs: Path) -> tuple[dict, dict]:
    (folder,) = (runs / "three").iterdir()
    return json.loads((folder / "meta.json").read_text())["results"], {
        f.name: f.read_bytes() for f in folder.glob("*.safetensors")
    }


def test_a_killed_stage_does_not_repeat_finished_trainings(tmp_path):
    children = [start(tmp_path, WHOLE, "whole"), start(tmp_path, KILLS, "killed")]
    for child in children:
        finish(child)
    done = steps(tmp_path / "killed")
    assert [s for s in done if s.startswith("first")] == [f"first {i}" for i in range(8)]  # once
    assert [s for s in done if s.startswith("second")] == [
        f"second {i}" for i in (0, 1, 2, 3, 3, 4, 5, 6, 7)
    ]
    assert [s for s in done if s.startswith("third")] == [
        f"third {i}" for i in (0, 1, 2, 3, 4, 5, 5, 6, 7)
    ]
    assert (
        result(tmp_path / "killed") == result(tmp_path / "whole")
        and len(result(tmp_path / "whole")[1]) == 3
    )
    assert not list((tmp_path / "killed/.scratch/three").glob("*/"))  # committed: nothing is left


LIMITED = (
    STAGE
    + """
try: run_stage("three", SMOKE, time_limit=float(sys.argv[1]) if sys.argv[1:] else None)
except TimeLimitReached as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""
)


def test_a_time_limit_stops_at_a_checkpoint_and_goes_on(tmp_path):
    child = start(
        tmp_path, LIMITED, "limited", SLOW="1", TOCSR_TIME_LIMIT="4"
    )  # 24 steps of 0.2 s: more than the limit
    _, err = child.communicate(timeout=120)
    assert child.returncode == 75 and "call again" in err.splitlines()[-1], err[-2000:]
    before = steps(tmp_path / "limited")
    (record,) = (tmp_path / "limited").glob(".scratch/three/*/interrupted.json")
    assert 0 < len(before) < 24 and "TimeLimitReached" in json.loads(record.read_text())["reason"]
    finish(start(tmp_path, LIMITED, "limited"))
    assert (
        len(steps(tmp_path / "limited")) == len(set(steps(tmp_path / "limited"))) == 24
    )  # no step twice


def test_sigterm_leaves_a_record(tmp_path):
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped/stop").write_text("second 3")
    child = start(tmp_path, WHOLE, "stopped")
    while not (tmp_path / "stopped/waiting").exists():
        assert child.poll() is None, child.stderr.read()[-2000:]
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    (record,) = (tmp_path / "stopped").glob(".scratch/three/*/interrupted.json")
    record = json.loads(record.read_text())
    assert (
        child.returncode == 143 and record["reason"] == "SystemExit: 143" and record["seconds"] > 0
    )


def train(folder, steps=5, models=None, **given):
    "A thin UNet, or other models, on noise."
    torch.manual_seed(0)
    cfg = UNetConfig(channels=(16, 16), layers=1, heads=(1, 1), context_dim=8)
    unet = nano_unet(cfg, 4)
    schedule = noise_schedule("v_prediction")

    def loss(step, models):
        g = step_generator(1, step)
        z = torch.randn(4, 4, 8, 8, generator=g)
        noise = torch.randn(4, 4, 8, 8, generator=g)
        t = torch.randint(0, 1000, (4,), generator=g)
        return diffusion_loss(models["unet"], z, t, noise, schedule)

    history = fit(dict(unet=unet), loss, steps, 1e-3, folder, device="cpu", **given)
    return unet.state_dict(), [h["loss"] for h in history]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    plain, losses = train(tmp_path / "plain")
    saved, again = train(tmp_path / "checkpointed", gradient_checkpointing=True)
    assert equal(plain, saved) and losses == again


def test_the_optimizer_is_any_callable(tmp_path):
    default, _ = train(tmp_path / "default")
    same, _ = train(
        tmp_path / "same",
        optimizer=lambda groups: torch.optim.AdamW(
            groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        ),
    )
    other, _ = train(
        tmp_path / "sgd", optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.9)
    )
    assert equal(default, same) and not equal(default, other)


def test_ema_is_limited_by_the_number_of_steps(tmp_path):
    assert ema_decay(0.999, 5) == 0.5
    weights = []

    def record(step, metrics):
        weights.append(net.weight.detach().clone())

    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    fit(
        dict(net=net),
        lambda step, m: m["net"](torch.ones(1, 2)).pow(2).sum(),
        40,
        0.1,
        tmp_path,
        ema=0.6,
        device="cpu",
        callback=record,
    )
    average = torch.zeros(1, 2)
    for k, w in enumerate(
        weights
    ):  # diffusers' decay of update k: (1 + k)/(10 + k), none at first, at most ours
        decay = min(0.6, (1 + k) / (10 + k)) if k else 0.0
        average = decay * average + (1 - decay) * w
    assert torch.allclose(net.weight, average, atol=1e-6)


def test_validation_reads_the_averaged_weights_and_changes_no_bit(tmp_path):
    plain, losses = train(tmp_path / "plain", steps=6, ema=0.5)
    seen = {}
    records = []

    def validate(steps, models):
        assert not models["unet"].training and not torch.is_grad_enabled()
        seen[steps] = {k: v.clone() for k, v in models["unet"].state_dict().items()}
        return dict(noise=torch.rand(()).item())

    validated, again = train(
        tmp_path / "validated",
        steps=6,
        ema=0.5,
        validate=validate,
        validate_every=3,
        callback=lambda step, metrics: records.append(metrics),
    )
    assert equal(plain, validated) and losses == again
    assert list(seen) == [3, 6] and equal(seen[6], validated) and not equal(seen[3], validated)
    assert [i for i, r in enumerate(records, start=1) if "val_noise" in r] == [3, 6]


def test_callback_and_trackers_see_every_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    _, losses = train(
        tmp_path / "fit",
        log_with=("tensorboard",),
        tracker_dir=tmp_path / "board",
        callback=lambda step, metrics: seen.append((step, metrics["loss"])),
    )
    assert seen == list(enumerate(losses))
    boards = [EventAccumulator(str(f)).Reload() for f in (tmp_path / "board").rglob("events*")]
    (board,) = (b for b in boards if "loss" in b.Tags()["scalars"])
    assert [(e.step, e.value) for e in board.Scalars("loss")] == seen


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    missing = next(
        (
            n
            for n in ("aim", "comet_ml", "dvclive", "swanlab")
            if not __import__("importlib.util").util.find_spec(n)
        ),
        None,
    )
    with pytest.raises((TrainingError, ValueError), match=missing):
        train(tmp_path, log_with=(missing,))


def test_workers_prepare_the_same_batches(tmp_path):
    def batches(step):
        return dict(
            x=torch.randn(8, 3, generator=step_generator(2, step)), by=torch.tensor(os.getpid())
        )

    processes = []
    out = []
    for workers in (0, 2):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1)

        def loss(step, models, batch, workers=workers):
            processes.append((workers, batch["by"].item()))
            return (models["net"](batch["x"]) - 1).pow(2).mean()

        fit(
            dict(net=net),
            loss,
            6,
            0.1,
            options=TrainOptions(tmp_path / str(workers), device="cpu", workers=workers),
            batches=batches,
        )
        out.append(net.weight.clone())
    assert torch.equal(*out)
    assert {p for w, p in processes if w == 0} == {os.getpid()} and len(
        {p for w, p in processes if w == 2} - {os.getpid()}
    ) == 2


def test_checkpoints_are_rarer_where_they_take_long(tmp_path, monkeypatch):
    from tocsr.core import training

    saves = []

    def slow_save(accelerator, scratch, step, inputs, history):
        saves.append(step)
        time.sleep(0.05)

    monkeypatch.setattr(training, "_save", slow_save)
    net = torch.nn.Linear(1, 1)

    def loss(step, models):
        time.sleep(0.01)
        return models["net"].weight.sum()

    fit(dict(net=net), loss, 100, 0.1, tmp_path, device="cpu", checkpoint_s=0.001)
    assert 1 <= len(saves) <= 3  # 1 s of training, 0.05 s a save: at most one a second


def test_finished_weights_are_safetensors_and_of_these_inputs(tmp_path):
    weights, _ = train(tmp_path)
    assert {f.name for f in (tmp_path / "finished").iterdir()} == {
        "unet.safetensors",
        "history.json",
    }
    assert equal(load_file(tmp_path / "finished/unet.safetensors"), weights)
    calls = []
    net = torch.nn.Linear(1, 1)
    for _ in range(2):  # the same recipe, other initial weights: trained, not read
        fit(
            dict(net=net),
            lambda step, m: calls.append(step) or m["net"].weight.sum(),
            2,
            0.1,
            tmp_path,
            device="cpu",
        )
    assert calls == [0, 1, 0, 1]


def test_the_default_optimizer_is_the_papers_adamw():
    optimizer = adamw([dict(params=[torch.nn.Parameter(torch.ones(1))])], weight_decay=0.1)
    assert (
        optimizer.defaults["betas"] == (0.9, 0.99)
        and optimizer.param_groups[0]["weight_decay"] == 0.1
    )


def test_final_parameters_are_rounded_to_half_precision_and_buffers_are_not(tmp_path):
    def trained(folder, **options):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        net.register_buffer("scale", torch.tensor(1 / 3))
        fit(
            dict(net=net),
            lambda step, m: (m["net"].weight * m["net"].scale - 0.1).pow(2).sum(),
            3,
            0.1,
            tmp_path / folder,
            device="cpu",
            **options,
        )
        return net.state_dict()

    whole, rounded = trained("whole"), trained("rounded", half_weights=True)
    again = trained("rounded", half_weights=True)  # read from the finished training
    for name in ("weight", "bias"):
        assert rounded[name].dtype == torch.float32
        assert torch.equal(rounded[name], whole[name].half().float())
    assert not torch.equal(rounded["weight"], whole["weight"])
    assert torch.equal(rounded["scale"], whole["scale"])
    assert all(torch.equal(again[k], v) for k, v in rounded.items())
