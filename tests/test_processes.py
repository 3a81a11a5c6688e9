"Two processes of `accelerate launch` (gloo, CPU): stages are computed once and by all, training averages gradients, and a launch that was killed goes on."
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
import torch
from tocsr.store import read_weights
from tocsr.training import fit, step_generator

ROOT = Path(__file__).resolve().parents[1]
# --multi_gpu is accelerate's name for torchrun; without a GPU tocsr connects the processes by gloo
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def start(folder: Path, text: str, *args) -> subprocess.Popen:
    "Two processes of a script; what they say goes to said.txt."
    (folder/"script.py").write_text(textwrap.dedent(text))
    env = os.environ | dict(PYTHONPATH=str(ROOT), TOCSR_RUNS=str(folder/"runs"), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen([*LAUNCH, str(folder/"script.py"), str(folder), *args], stdout=open(folder/"said.txt", "w"), stderr=subprocess.STDOUT, env=env)


def launch(folder: Path, text: str, *args, fails: bool = False, timeout: float = 300) -> str:
    "As `start`, to the end; what they said."
    code = start(folder, text, *args).wait(timeout)
    said = (folder/"said.txt").read_text()
    assert (code != 0) == fails, said[-4000:]
    return said


TRAIN = """
    import sys, torch
    from pathlib import Path
    from torch import nn
    from tocsr.adapt import write_chunks
    from tocsr.profiles import get_profile
    from tocsr.store import connect, need, on_main, rank, save_weights, stage, StoreError, world_size
    from tocsr.training import TrainingError, fit, step_generator
    out, die = Path(sys.argv[1]), sys.argv[2] == "die"
    connect("cpu")

    def train(folder, die=False, nan=False):
        torch.manual_seed(rank())                        # the second starts elsewhere; the first one's weights count
        net, plain = nn.Linear(3, 2), nn.Linear(2, 1)
        def loss(step, live):
            if die and step == 7 and rank() == 1: raise RuntimeError("a bad batch")
            x = torch.randn(8, 3, generator=step_generator(0, step))
            scale = float("nan") if nan and rank() == 1 else 1.
            parts = dict(fit=scale*(plain(live["net"](x)) - x.sum(1, keepdim=True)).pow(2).mean())   # one model as handed in, one by its own name, as our losses do
            return parts | dict(loss=parts["fit"])
        history = fit(dict(net=net, plain=plain), loss, 12, 0.05, folder, ema=0.5, device="cpu", checkpoint_s=0)
        return {**{f"net.{k}": v for k, v in net.state_dict().items()}, **{f"plain.{k}": v for k, v in plain.state_dict().items()}, "history": torch.tensor([h["loss"] for h in history])}

    save_weights(out/f"killed-{rank()}.safetensors", train(out/"killed", die))
    save_weights(out/f"whole-{rank()}.safetensors", train(out/"whole"))
    try: train(out/"nan", nan=True)
    except TrainingError as e: print(f"process {rank()}: {e}", flush=True)

    write_chunks(out/"chunks", 200, lambda numbers: dict(x=torch.tensor(list(numbers)), by=torch.full((len(numbers),), rank())))

    @stage("inner", data=False)
    def run_inner(run): return dict(processes=world_size())
    @stage("outer", data=False, alone=True)
    def run_outer(run):
        (run.dir/f"by-{rank()}.txt").touch()
        return dict(inner=need("inner", run.profile).results["processes"], processes=world_size())
    @stage("both", upstream=("outer",), data=False)
    def run_both(run):
        (run.dir/f"by-{rank()}.txt").touch(); run.log("hello")
        return dict(processes=world_size())
    @stage("broken", data=False, alone=True)
    def run_broken(run): raise ValueError("no such option")
    smoke = get_profile("smoke")
    a = need("both", smoke)
    print(f"process {rank()} holds {a.path}", flush=True)
    try: need("broken", smoke)
    except (ValueError, StoreError) as e: print(f"process {rank()}: {type(e).__name__}: {e}", flush=True)
"""


def one_process(folder: Path) -> dict:
    "What TRAIN's two processes should come to: one, with both batches in every step."
    torch.manual_seed(0)
    net, plain = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    def batch(step, process):
        os.environ["RANK"] = str(process)
        try: return torch.randn(8, 3, generator=step_generator(0, step))
        finally: del os.environ["RANK"]
    def loss(step, live):
        x = torch.cat([batch(step, 0), batch(step, 1)])
        return (plain(live["net"](x)) - x.sum(1, keepdim=True)).pow(2).mean()
    history = fit(dict(net=net, plain=plain), loss, 12, 0.05, folder, ema=0.5, device="cpu")
    return {**{f"net.{k}": v for k, v in net.state_dict().items()}, **{f"plain.{k}": v for k, v in plain.state_dict().items()}, "history": torch.tensor([h["loss"] for h in history])}


def test_training_and_stages(tmp_path):
    begin = time.monotonic()
    said = launch(tmp_path, TRAIN, "die", fails=True)                   # one fails: nobody waits for it for ever
    assert "a bad batch" in said and time.monotonic() - begin < 120
    assert [p.name for p in (tmp_path/"killed").iterdir()] == ["step-00000007"]
    assert {p.name for p in (tmp_path/"killed/step-00000007").glob("random*")} == {"random_states_0.pkl", "random_states_1.pkl"}
    said = launch(tmp_path, TRAIN, "live")
    killed, whole = ([read_weights(tmp_path/f"{n}-{r}.safetensors") for r in range(2)] for n in ("killed", "whole"))
    for got in (killed[0], killed[1], whole[1]):                        # bit for bit: both processes, resumed or not
        assert got.keys() == whole[0].keys() and all(torch.equal(v, whole[0][k]) for k, v in got.items())
    one = one_process(tmp_path/"one")                                   # and one process with both batches, up to the order of sums
    assert all(torch.allclose(v, whole[0][k], rtol=1e-4, atol=1e-5) for k, v in one.items()) and not list((tmp_path/"whole").iterdir())
    for r in range(2): assert f"process {r}: the loss is nan at step 0" in said
    chunks = [read_weights(f) for f in sorted((tmp_path/"chunks").glob("chunk-*"))]
    assert torch.cat([c["x"] for c in chunks]).tolist() == list(range(200)) and [c["by"][0].item() for c in chunks] == [0, 1, 0, 1]
    made = {n: json.loads(next((tmp_path/f"runs/{n}").glob("*/meta.json")).read_text()) for n in ("inner", "outer", "both")}
    assert {n: (m["processes"], m["results"]["processes"]) for n, m in made.items()} == dict(inner=(1, 1), outer=(1, 1), both=(2, 2)) and made["outer"]["results"]["inner"] == 1
    assert list(made["outer"]["files"]) == list(made["both"]["files"]) == ["by-0.txt"]
    both = next((tmp_path/"runs/both").iterdir())
    assert all(f"process {r} holds {both}" in said for r in range(2)) and (both/"log.txt").read_text().count("hello") == 1 and not (tmp_path/"runs/.scratch/both"/both.name).exists()
    assert "process 0: ValueError: no such option" in said and "process 1: StoreError: process 0 failed: ValueError: no such option" in said


STAGES = """
    import sys
    from tocsr.profiles import get_profile
    from tocsr.store import need, rank
    a = need("surrogates", get_profile("smoke"))
    print(f"process {rank()} holds {a.path}", flush=True)
"""


def test_launch_is_killed_and_started_again(tmp_path):
    first, runs = start(tmp_path, STAGES), tmp_path/"runs"
    while not list(runs.glob(".scratch/teacher/*/log.txt")):            # the first stage is done, the second at work
        assert first.poll() is None, (tmp_path/"said.txt").read_text()[-4000:]
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) != 0 and not (runs/"teacher").exists()
    autoencoder = next((runs/"autoencoder").iterdir())
    before = (autoencoder/"meta.json").read_bytes()
    said = launch(tmp_path, STAGES)
    assert (autoencoder/"meta.json").read_bytes() == before
    for name in ("autoencoder", "teacher", "surrogates"):
        folder, = (runs/name).iterdir()
        meta = json.loads((folder/"meta.json").read_text())
        assert meta["processes"] == 2 and meta["key"] == folder.name and all((folder/f).is_file() for f in meta["files"])
        assert not (runs/".scratch"/name/folder.name).exists()
    assert all(f"process {r} holds {folder}" in said for r in range(2))
