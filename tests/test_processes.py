"""Two processes of `accelerate launch` (gloo, CPU): stages are computed by all and written once,
training averages gradients, and a killed launch continues.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from launcher import launch_command
from PIL import Image

from tocsr.core.config import get_profile
from tocsr.core.distributed import check_rendezvous
from tocsr.core.files import StoreError, read_weights
from tocsr.core.training import fit, step_generator
from tocsr.data.images import load_photos

ROOT = Path(__file__).resolve().parents[1]


def start(folder: Path, text: str, *args) -> subprocess.Popen:
    "Start two processes of a script; their output goes to output.txt."
    (folder / "script.py").write_text(textwrap.dedent(text))
    env = os.environ | dict(
        PYTHONPATH=str(ROOT),
        TOCSR_RUNS=str(folder / "runs"),
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    return subprocess.Popen(
        [*launch_command(2), str(folder / "script.py"), str(folder), *args],
        stdout=open(folder / "output.txt", "w"),
        stderr=subprocess.STDOUT,
        env=env,
    )


def launch(folder: Path, text: str, *args, fails: bool = False, timeout: float = 600) -> str:
    "Run two processes of a script to the end; returns their output."
    code = start(folder, text, *args).wait(timeout)
    output = (folder / "output.txt").read_text()
    assert (code != 0) == fails, output[-4000:]
    return output


FAIL = """
    from tocsr.core.config import get_profile
    from tocsr.core.distributed import rank
    from tocsr.core.files import StoreError
    from tocsr.core.store import run_stage, stage

    @stage("broken", data=False, main_process_only=True)
    def run_broken(run):
        raise ValueError("no such option")

    @stage("half", data=False)
    def run_half(run):
        if rank() == 1:
            raise RuntimeError("a bad batch")
        (run.dir / "x.txt").touch()
        return {}

    try:
        run_stage("broken", get_profile("smoke"))
    except (ValueError, StoreError) as e:
        print(f"process {rank()}: {type(e).__name__}: {e}", flush=True)
    run_stage("half", get_profile("smoke"))
"""


def test_no_process_waits_for_one_that_failed(tmp_path):
    begin = time.monotonic()
    output = launch(tmp_path, FAIL, fails=True)
    assert "a bad batch" in output and not (tmp_path / "runs/half").exists()
    assert time.monotonic() - begin < 60
    assert "process 0: ValueError: no such option" in output
    assert "process 1: StoreError: process 0 failed: ValueError: no such option" in output


# The second process starts from other weights; those of the first count. One model is called as
# given to the loss, one by its own name, as the library's losses do.
WORK = """
    import sys
    import time
    from pathlib import Path

    import torch
    from torch import nn

    from tocsr.core.config import get_profile
    from tocsr.core.distributed import rank, world_size
    from tocsr.core.files import save_weights
    from tocsr.core.store import run_stage, stage
    from tocsr.core.training import TrainingError, fit, step_generator
    from tocsr.data.pairs import write_chunks

    out, first = Path(sys.argv[1]), sys.argv[2] == "first"

    def train(folder, stop=False, nan=False):
        torch.manual_seed(rank())
        net, plain = nn.Linear(3, 2), nn.Linear(2, 1)

        def loss(step, live):
            if stop and step == 7:
                (out / "waiting").touch()
                time.sleep(600)
            x = torch.randn(8, 3, generator=step_generator(0, step))
            error = (plain(live["net"](x)) - x.sum(1, keepdim=True)).pow(2).mean()
            return dict(loss=error * float("nan") if nan and rank() == 1 else error, error=error)

        models = dict(net=net, plain=plain)
        history = fit(models, loss, 12, 0.05, folder, ema=0.5, device="cpu", checkpoint_s=0)
        state = {f"{n}.{k}": v for n, m in models.items() for k, v in m.state_dict().items()}
        return state | dict(history=torch.tensor([h["error"] for h in history]))

    @stage("inner", data=False)
    def run_inner(run):
        killed = train(run.scratch / "net", stop=first)
        save_weights(out / f"killed-{rank()}.safetensors", killed)
        save_weights(out / f"whole-{rank()}.safetensors", train(run.scratch / "whole"))
        (run.dir / f"by-{rank()}.txt").touch()
        run.log("hello")
        return dict(processes=world_size())

    @stage("within", data=False)
    def run_within(run):
        return dict(processes=world_size())

    @stage("outer", upstream=("inner",), data=False, main_process_only=True)
    def run_outer(run):
        (run.dir / f"by-{rank()}.txt").touch()
        within = run_stage("within", run.profile).results["processes"]
        return dict(processes=world_size(), within=within)

    small = get_profile(
        "smoke",
        data=dict(source=str(out / "photos"), patch=64),
        autoencoder=dict(pca_patches=1000, eval_images=2, steps=2, compare_steps=1),
        unet=dict(channels=(32, 32, 64, 64), heads=(1, 1, 2, 2)),
        teacher=dict(
            base_steps=2,
            expand_steps=1,
            joint_steps=1,
            eval_levels=2,
            eval_samples=4,
            linear_crops=100,
        ),
        surrogates=dict(names=("R",), random_names=()),
    )
    run_stage("outer", small)
    try:
        train(out / "nan", nan=True)
    except TrainingError as e:
        print(f"process {rank()}: {e}", flush=True)

    def chunk(indices):
        return dict(x=torch.tensor(list(indices)), by=torch.full((len(indices),), rank()))

    write_chunks(out / "chunks", 200, chunk)
    a = run_stage("surrogates", small)
    print(f"process {rank()} holds {a.path}", flush=True)
"""


def photos(folder: Path):
    "Corners of six embedded photographs."
    folder.mkdir()
    embedded = load_photos(get_profile("smoke").data)
    for i in range(6):
        Image.fromarray(embedded.read(i)[:288, :288]).save(folder / f"{i}.png")


def one_process(folder: Path) -> dict:
    "The training of WORK in one process, with both batches in every step."
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    plain = torch.nn.Linear(2, 1)

    def batch(step, process):
        os.environ["RANK"] = str(process)
        try:
            return torch.randn(8, 3, generator=step_generator(0, step))
        finally:
            del os.environ["RANK"]

    def loss(step, live):
        x = torch.cat([batch(step, 0), batch(step, 1)])
        return (plain(live["net"](x)) - x.sum(1, keepdim=True)).pow(2).mean()

    history = fit(dict(net=net, plain=plain), loss, 12, 0.05, folder, ema=0.5, device="cpu")
    return {
        **{f"net.{k}": v for k, v in net.state_dict().items()},
        **{f"plain.{k}": v for k, v in plain.state_dict().items()},
        "history": torch.tensor([h["loss"] for h in history]),
    }


def test_a_launch_is_killed_and_started_again(tmp_path):
    photos(tmp_path / "photos")
    first = start(tmp_path, WORK, "first")
    runs = tmp_path / "runs"
    while not (tmp_path / "waiting").exists():  # in `fit`, after seven steps
        assert first.poll() is None, (tmp_path / "output.txt").read_text()[-4000:]
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) != 0 and not (runs / "inner").exists()
    (checkpoint,) = runs.glob(".scratch/inner/*/net/*")
    assert checkpoint.name == "step-00000007" and {p.name for p in checkpoint.glob("random*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    output = launch(tmp_path, WORK, "again")

    killed, whole = (
        [read_weights(tmp_path / f"{n}-{r}.safetensors") for r in range(2)]
        for n in ("killed", "whole")
    )
    for got in (killed[0], killed[1], whole[1]):  # bit for bit: both processes, resumed or not
        assert got.keys() == whole[0].keys() and all(
            torch.equal(v, whole[0][k]) for k, v in got.items()
        )
    one = one_process(
        tmp_path / "one"
    )  # and one process with both batches, up to the order of sums
    assert all(torch.allclose(v, whole[0][k], rtol=1e-4, atol=1e-5) for k, v in one.items())
    assert all(f"process {r}: the loss is nan at step 0" in output for r in range(2))
    chunks = [read_weights(f) for f in sorted((tmp_path / "chunks").glob("chunk-*"))]
    assert torch.cat([c["x"] for c in chunks]).tolist() == list(range(200)) and [
        c["by"][0].item() for c in chunks
    ] == [0, 1, 0, 1]

    for name in ("inner", "within", "outer", "autoencoder", "teacher", "surrogates"):
        (folder,) = (runs / name).iterdir()
        meta = json.loads((folder / "meta.json").read_text())
        assert (
            meta["key"] == folder.name
            and all((folder / f).is_file() for f in meta["files"])
            and not (runs / ".scratch" / name / folder.name).exists()
        )
        assert meta["processes"] == (1 if name in ("within", "outer") else 2)
        if name in ("inner", "outer"):
            assert list(meta["files"]) == ["by-0.txt"]
        if name == "inner":
            assert (folder / "log.txt").read_text().count("hello") == 1
        if name == "outer":
            assert meta["results"] == dict(processes=1, within=1)
    assert all(f"process {r} holds {folder}" in output for r in range(2))


MEET = """
    import os

    from tocsr.core.distributed import init_distributed, rank, run_on_main, world_size

    init_distributed("cpu")
    print(f"process {rank()} of {world_size()}: {run_on_main(lambda: 'from process 0')}")
"""


def alone(folder: Path, **variables) -> subprocess.Popen:
    "Start one process of MEET as no launcher does, by variables alone."
    (folder / "meet.py").write_text(textwrap.dedent(MEET))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "TORCHELASTIC"))}
    env |= dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **variables)
    return subprocess.Popen(
        [sys.executable, "meet.py"],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port() -> int:
    "A port that is free now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_world_size_that_a_cluster_left_behind_is_an_error(tmp_path):
    _, err = (child := alone(tmp_path, WORLD_SIZE="2")).communicate(timeout=300)
    line = err.strip().splitlines()[-1]
    assert child.returncode == 1 and "StoreError: WORLD_SIZE is 2, but RANK, MASTER_ADDR" in line
    assert "unset WORLD_SIZE" in line
    _, err = (child := alone(tmp_path, WORLD_SIZE="four")).communicate(timeout=300)
    assert child.returncode == 1 and "'four'" in err.strip().splitlines()[-1]


def test_processes_that_were_never_started_are_not_awaited(monkeypatch, capfd):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    begin = time.monotonic()
    with pytest.raises(StoreError, match="met no 1 others at 127.0.0.1.*in 2 s.*unset WORLD_SIZE"):
        check_rendezvous(timeout_s=2)
    assert time.monotonic() - begin < 30
    assert "process 0 waits for 1 others" in capfd.readouterr().err


def test_two_processes_without_a_launcher_meet(tmp_path):
    where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    both = [alone(tmp_path, RANK=str(r), LOCAL_RANK=str(r), **where) for r in range(2)]
    for r, child in enumerate(both):
        out, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        assert f"process {r} of 2: from process 0" in out
