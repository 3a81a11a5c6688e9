"""Profile `paper` from checkpoint folders to the one-step model: SD 1.5's and FLUX's layouts and
key names at thin width, killed in the second training and resumed, and in two processes.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from launcher import launch_command
from paper_folders import THIN, rehearsal, write_checkpoints
from safetensors import safe_open

from tocsr.core.files import read_weights
from tocsr.inference.pipeline import TOCSRPipeline

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("autoencoder", "teacher", "surrogates", "search", "compact", "adapt", "onestep")

SCRIPT = """
    import json
    import os
    import sys
    import time
    from pathlib import Path

    from tocsr.core import training
    from tocsr.core.config import get_profile
    from tocsr.core.store import run_stage

    pause_in = sys.argv[2] if len(sys.argv) > 2 else ""
    step = training._Training.step

    def pause(self, index, loader):
        if index == 1 and self.options.scratch.name == pause_in:
            (Path(os.environ["TOCSR_RUNS"]) / "paused").touch()
            time.sleep(600)
        return step(self, index, loader)

    training._Training.step = pause
    overrides = json.loads(Path(sys.argv[1]).read_text())
    print(run_stage("onestep", get_profile("paper", **overrides)).path)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    "Folder with checkpoints, profile.json and script.py."
    folder = tmp_path_factory.mktemp("paper")
    (folder / "profile.json").write_text(json.dumps(rehearsal(folder, THIN, patch=64)))
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    return folder


def start(script: Path, runs: Path, *args, processes: int = 1) -> subprocess.Popen:
    "Start the script; output goes to runs/output.txt."
    runs.mkdir(exist_ok=True)
    env = os.environ | dict(
        PYTHONPATH=str(ROOT),
        TOCSR_RUNS=str(runs),
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    command = [sys.executable] if processes == 1 else launch_command(processes)
    return subprocess.Popen(
        [*command, str(script / "script.py"), str(script / "profile.json"), *args],
        stdout=open(runs / "output.txt", "w"),
        stderr=subprocess.STDOUT,
        env=env,
    )


def run(script: Path, runs: Path, **options):
    "Run the script to the end."
    code = start(script, runs, **options).wait(600)
    assert code == 0, (runs / "output.txt").read_text()[-4000:]


def weights(runs: Path) -> dict[str, torch.Tensor]:
    "All weights of the one-step model and of the networks that it comes from."
    found = {}
    for name in STAGES:
        (folder,) = (runs / name).iterdir()
        for file in sorted(folder.rglob("*.safetensors")):
            for k, v in read_weights(file).items():
                found[f"{name}/{file.relative_to(folder)}/{k}"] = v
    return found


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    "The run store of an uninterrupted run."
    runs = tmp_path_factory.mktemp("whole")
    run(script, runs)
    return runs


def test_folders_have_the_key_names_of_the_checkpoints(tmp_path):
    "Keys that SD 1.5's and FLUX's published files have, written out by hand."
    sd15, flux = write_checkpoints(tmp_path, THIN)
    expected = {
        sd15 / "unet": (
            "conv_in.weight",
            "time_embedding.linear_1.weight",
            "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight",
            "mid_block.resnets.1.conv2.weight",
            "up_blocks.3.attentions.2.proj_out.weight",
            "conv_norm_out.weight",
        ),
        sd15 / "vae": (
            "encoder.down_blocks.3.resnets.1.conv1.weight",
            "decoder.mid_block.attentions.0.to_q.weight",
            "quant_conv.weight",
            "post_quant_conv.weight",
        ),
        flux: ("decoder.up_blocks.0.upsamplers.0.conv.weight", "encoder.conv_out.weight"),
    }
    for folder, names in expected.items():
        with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as f:
            keys = set(f.keys())
            assert keys.issuperset(names), set(names) - keys
    assert not any("quant_conv" in k for k in keys), "FLUX's autoencoder has none"


def test_the_chain_ends_in_a_model_that_upscales(whole):
    results = {n: json.loads(next((whole / n).glob("*/meta.json")).read_text()) for n in STAGES}
    assert all(m["profile"]["way"] == "paper" for m in results.values())
    assert list(results["teacher"]["results"]["expansions"]) == ["v2"]
    assert results["adapt"]["results"]["variants"] == ["paper"]
    assert results["surrogates"]["results"]["overhead"] is None
    (student,) = (whole / "onestep").glob("*/paper")
    small = torch.rand(1, 3, 16, 16)
    (out,) = TOCSRPipeline.from_pretrained(student)(small, output_type="pt").images
    assert out.shape == (3, 64, 64) and out.isfinite().all()
    assert (whole / "output.txt").read_text().count("step 2: validation psnry") == 2


def test_killed_in_the_second_training_and_resumed(script, whole, tmp_path):
    first = start(script, tmp_path, "epsilon_only")  # after v2, in stage teacher
    deadline = time.monotonic() + 300
    while not (tmp_path / "paused").exists():
        assert first.poll() is None, (tmp_path / "output.txt").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert list(tmp_path.glob(".scratch/teacher/*/v2/finished/unet.safetensors"))
    run(script, tmp_path)
    assert "v2: already trained" in (tmp_path / "output.txt").read_text()
    resumed = weights(tmp_path)
    for name, value in weights(whole).items():
        assert torch.equal(resumed[name], value), name


def test_two_processes(script, tmp_path):
    run(script, tmp_path, processes=2)
    for name in STAGES:
        (folder,) = (tmp_path / name).iterdir()
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["processes"] == 2
        assert all((folder / f).is_file() for f in meta["files"])
    (student,) = (tmp_path / "onestep").glob("*/paper")
    assert all(
        v.isfinite().all() for v in read_weights(next(student.rglob("unet/*.safetensors"))).values()
    )


def test_the_rehearsal_measures_a_stage_and_estimates_all(tmp_path):
    sys.path.insert(0, str(ROOT / "tests/bench"))
    import bench_paper_scale as bench

    command = [sys.executable, bench.__file__, str(tmp_path), "--thin", "--device", "cpu"]
    env = os.environ | dict(TOCSR_RUNS=str(tmp_path / "runs"), OMP_NUM_THREADS="1")
    done = subprocess.run([*command, "--part", "autoencoder"], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    row = json.loads((tmp_path / "autoencoder.json").read_text())
    # one training: the other autoencoder is given
    assert {k: len(v) for k, v in row["seconds"].items()} == dict(both=bench.STEPS)
    assert 0.3 < row["peak_gib"] < 4
    profile = bench.make_profile(tmp_path, "cpu", thin=True)
    plan = bench.estimate(profile, bench.STAGES, log=lambda message: None)
    assert list(plan) == list(bench.STAGES)
    whole = "[RARA-RARA-RARA-RR]-[RAR]-[RRR-RARARA-RARARA-RARARA]"
    larger = bench.estimate(profile, ("adapt",), whole, log=lambda message: None)
    assert larger["adapt"]["steps_s"] > plan["adapt"]["steps_s"]
    assert all(v["peak_gib"] > 0.9 and v["steps_s"] > 0 for v in plan.values())
    result = dict(
        machine=dict(gpu=None, cpu="a CPU", cores=2, threads=1),
        patch=64,
        rows=[row | dict(peak_gib=2.0, wall_s=9.0, seconds=dict(a=[7.0, 3.0], b=[4.0, 4.0]))],
        plan=dict(autoencoder=dict(peak_gib=3.0, steps_s=7.0)),
    )
    text = bench.markdown(result)
    assert "| autoencoder | 2.0 | 3.0 | 1.50 | 14.0 | 7.0 | 0.50 | 9 |" in text
    assert "Not finished: teacher, surrogates" in text


def test_the_rehearsal_writes_after_every_stage_and_continues(tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "tests/bench"))
    import bench_paper_scale as bench

    out = tmp_path / "result.json"
    command = ["bench", str(tmp_path / "work"), "--thin", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    keys = {name: f"key of {name}" for name in STAGES}
    monkeypatch.setattr(bench, "stage_key", lambda stage, profile: keys[stage])
    started = []
    failing = {"adapt"}

    def run_part(command, env):
        part = command[command.index("--part") + 1]
        started.append(part)
        if part in failing:
            return subprocess.CompletedProcess(command, 1)
        profile = bench.make_profile(tmp_path / "work", "cpu", thin=True)
        if part in bench.PLANS:
            stages = dict.fromkeys(bench.PLANS[part], dict(peak_gib=3.0, steps_s=4.0))
            architecture = "found" if part == "plan_found" else None
            row = dict(key=bench.plan_key(profile, architecture), stages=stages)
        else:
            row = dict(stage=part, key=keys[part], wall_s=9.0, peak_gib=2.0, commit="abc")
            row["seconds"] = {} if part == "search" else dict(a=[2.0, 1.0])
            row |= dict(architecture="found") if part == "search" else {}
        (tmp_path / "work" / f"{part}.json").write_text(json.dumps(row))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench.subprocess, "run", run_part)
    monkeypatch.setattr(bench, "commit", lambda: "abc")
    with pytest.raises(SystemExit, match="adapt failed; the same command continues"):
        bench.main()
    done = ["autoencoder", "teacher", "surrogates", "search", "compact"]
    assert started == ["plan", *done[:4], "plan_found", "compact", "adapt"]
    assert [row["stage"] for row in json.loads(out.read_text())["rows"]] == done
    text = out.with_suffix(".md").read_text()
    assert "| compact | 2.0 | 3.0 | 1.50 | 2.0 | 4.0 | 2.00 | 9 |" in text
    assert "no step timed" in text and "Not finished: adapt, onestep." in text
    started.clear()
    failing.clear()
    keys["compact"] = "the code of compact has changed"
    bench.main()
    assert started == ["compact", "adapt", "onestep"]
    assert "Not finished" not in capsys.readouterr().out.split("commit abc")[-1]
    assert len(json.loads(out.read_text())["rows"]) == len(STAGES)
