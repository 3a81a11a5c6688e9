"""Rehearse profile `paper` at full width with random weights: seconds and peak memory per stage.

python tests/bench/bench_paper_scale.py WORK_FOLDER --out tests/bench/paper_scale.json

The checkpoints have the shapes of SD 1.5 (a UNet of 859.5 M parameters, a 4-channel autoencoder)
and of FLUX's 16-channel autoencoder, and nothing is downloaded. Every stage takes four optimizer
steps of every training, in a process of its own, so that peaks are separate. On a CPU crops are
128 px and weights fp32 (20 GiB of memory, 30 GiB of disk, under an hour on two cores), on a CUDA
device 512 px and bf16. `--thin` tries the whole program at a tenth of the width in some minutes.

The estimates are those of `tocsr plan`: memory from shapes, seconds from single passes of the
networks, which are measured before the stages, in a process of their own. The last stages are
estimated for the architecture that the search found, once it is known. After every stage the
results so far are printed and written to `--out`. The same command continues after the last
finished stage; a stage whose code or configuration has changed since is run again, with all later
ones.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from paper_folders import FULL, THIN, rehearsal  # noqa: E402

from tocsr.cli.plan import (  # noqa: E402
    apply_rates,
    bare_networks,
    count_parts,
    plan_stage,
    stage_phases,
    this_machine,
)
from tocsr.core import training  # noqa: E402
from tocsr.core.config import Profile, get_profile  # noqa: E402
from tocsr.core.files import write_atomic, write_json  # noqa: E402
from tocsr.core.fingerprint import config_hash, source_hash  # noqa: E402
from tocsr.core.runtime import peak_bytes  # noqa: E402
from tocsr.core.store import Run, machine, run_stage, stage_key  # noqa: E402
from tocsr.search.fidelity import Fidelity  # noqa: E402

STAGES = ("autoencoder", "teacher", "surrogates", "search", "compact", "adapt", "onestep")
# stages of each estimate; the second one needs the architecture that the search found
PLANS = dict(plan=STAGES[:4], plan_found=STAGES[4:])
STEPS = 4  # of every training; the first one, which allocates memory, is left out of the seconds
SURROGATES = ("R", "RA")  # the whole library's training needs 32 GiB


def make_profile(folder: Path, device: str, thin: bool, patch: int | None = None) -> Profile:
    "Profile `paper` on checkpoints with random weights in `folder`."
    cuda = device == "cuda"
    patch = patch or (512 if cuda else 64 if thin else 128)
    changes = rehearsal(folder, THIN if thin else FULL, patch)
    changes |= dict(device=device, mixed_precision="bf16" if cuda else "no", accumulation=1)
    changes["validate_every"] = 0  # images are no part of the estimates
    changes["surrogates"]["names"] = SURROGATES
    for name in ("autoencoder", "surrogates", "compact", "adapt", "onestep"):
        changes[name]["steps"] = STEPS
    changes["teacher"] |= dict(expand_steps=STEPS, joint_steps=STEPS)
    if not cuda:
        for name in ("teacher", "compact", "adapt", "onestep"):
            changes[name]["ema"] = 0.0  # a moving average is one more copy of the weights
    return get_profile("paper", **changes)


class Stopwatch:
    "Seconds of every training step and of every architecture's evaluation, by name."

    def __init__(self, device: str, file: Path):
        "Continue the record in `file`: a finished training is not repeated after an interruption."
        self.device = device
        self.file = file
        record = json.loads(file.read_text()) if file.is_file() else {}
        self.seconds: dict[str, list[float]] = record.get("seconds", {})
        self.earlier_peak = record.get("peak_gib", 0.0)

    @property
    def peak(self) -> float:
        "Peak memory in GiB, also of an interrupted attempt."
        return max(self.earlier_peak, peak_gib(self.device))

    def time(self, name: str, call):
        "Call and record."
        start = time.perf_counter()
        result = call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        write_json(self.file, dict(seconds=self.seconds, peak_gib=self.peak))
        return result

    def lap(self, name: str):
        "A callback that records the seconds since its last call."
        last = time.perf_counter()

        def callback(step, metrics):
            nonlocal last
            now = time.perf_counter()
            self.seconds.setdefault(name, []).append(now - last)
            last = now

        return callback

    def watch(self):
        """Measure steps of `fit`, of FwKD and calls of `Fidelity`.

        Methods are replaced, and no functions: the keys of results cover those.
        """
        step = training._Training.step
        options = Run.training
        fidelity = Fidelity.__call__

        def timed_step(inner, index, loader):
            name = inner.options.scratch.name
            return self.time(name, partial(step, inner, index, loader))

        def timed_fwkd(run, name):
            "FwKD has a loop of its own: a step is the time between two callbacks."
            if not run.scratch.match("surrogates/*"):
                return options(run, name)
            return replace(options(run, name), callback=self.lap("FwKD"))

        def timed_fidelity(inner, net):
            return self.time("f_acc", partial(fidelity, inner, net))

        training._Training.step = timed_step
        Run.training = timed_fwkd
        Fidelity.__call__ = timed_fidelity


def peak_gib(device: str) -> float:
    "Peak memory of this process, or of the device."
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_bytes() / 2**30


def rehearse(stage: str, p: Profile, file: Path):
    "Run one stage in this process and write its row."
    key = stage_key(stage, p)
    watch = Stopwatch(p.device, file.with_suffix(".steps.json"))
    watch.watch()
    start = time.perf_counter()
    artifact = run_stage(stage, p)
    if stage_key(stage, p) != key:
        raise SystemExit(f"{stage}: the stopwatch changed the key of the result")
    row = dict(
        stage=stage,
        wall_s=time.perf_counter() - start,
        peak_gib=watch.peak,
        seconds=watch.seconds,
        key=key,
        commit=commit(),
    )
    if stage == "search":
        row["architecture"] = artifact.results["chosen"]["architecture"]
    write_json(file, row)


def read_current(file: Path, key: str) -> dict | None:
    "A finished part's row; None without one, or if it belongs to other code or configuration."
    row = json.loads(file.read_text()) if file.is_file() else {}
    return row if row.get("key") == key else None


def run_part(args, folder: Path, part: str, key: str) -> dict:
    "The row of a stage or of the plan, which a process of its own computes if it is missing."
    file = folder / f"{part}.json"
    if (row := read_current(file, key)) is not None:
        return row
    begun = folder / f"{part}.begun.json"
    if read_current(begun, key) is None:  # times of another code's attempt do not count
        file.with_suffix(".steps.json").unlink(missing_ok=True)
        write_json(begun, dict(key=key))
    command = [sys.executable, __file__, str(folder), "--part", part]
    command += ["--device", args.device] + ["--thin"] * args.thin
    env = os.environ | dict(TOCSR_RUNS=str(folder / "runs"))
    if subprocess.run(command, env=env).returncode:
        raise SystemExit(f"{part} failed; the same command continues from it")
    if (row := read_current(file, key)) is None:
        raise SystemExit(f"{part}: the code has changed while it ran; call the same command again")
    return row


def estimate(
    p: Profile,
    stages: tuple[str, ...],
    architecture: str | None = None,  # of the compact network; None: the paper's
    log=print,
) -> dict[str, dict]:
    """Memory and seconds of the steps that the stopwatch measures, as `tocsr plan` counts them.

    Passes are measured on this machine, before the stages and never during them.
    """
    networks = bare_networks(p, p.unet.checkpoint, architecture)
    machine = this_machine(p, networks, log)
    machine = replace(machine, processes=1)
    parts = apply_rates(count_parts(p, networks, machine.device), networks, machine.rates)
    found = {}
    for stage in stages:
        phases = stage_phases(stage, p, parts, networks, machine)
        steps = [f for f in phases if f.trained or stage == "search"]
        memory = plan_stage(stage, phases, p, parts, machine).memory_gib
        seconds = 3600 * plan_stage(stage, steps, p, parts, machine).hours
        found[stage] = dict(peak_gib=memory, steps_s=seconds)
    return found


COLUMNS = (
    "stage",
    "peak GiB",
    "estimate",
    "ratio",
    "seconds of its steps",
    "estimate",
    "ratio",
    "wall s",
)


def step_seconds(row: dict) -> float:
    "Seconds of all steps of a stage; of a training, the fastest step after the first one counts."
    per_step = ("f_acc",)  # every call is another network
    return sum(
        sum(v) if name in per_step or len(v) < 2 else len(v) * min(v[1:])
        for name, v in row["seconds"].items()
        if name != "f_acc" or row["stage"] == "search"
    )


def plan_key(p: Profile, architecture: str | None) -> str:
    "Hash of what the estimates depend on."
    return config_hash(p, source_hash(estimate), architecture)


def found_architecture(folder: Path) -> str:
    "The architecture in the finished search's row."
    return json.loads((folder / "search.json").read_text())["architecture"]


def markdown(result: dict) -> str:
    "One line per finished stage: measured, estimated, estimated over measured."
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in result["rows"]:
        plan = result["plan"][row["stage"]]
        steps = step_seconds(row)
        memory = plan["peak_gib"] / row["peak_gib"]
        seconds = f"{plan['steps_s'] / steps:.2f}" if steps else "no step timed"
        lines.append(
            f"| {row['stage']} | {row['peak_gib']:.1f} | {plan['peak_gib']:.1f} | {memory:.2f} "
            f"| {steps:.1f} | {plan['steps_s']:.1f} | {seconds} "
            f"| {row['wall_s']:.0f} |"
        )
    m = result["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
    made = ", ".join(sorted({row["commit"] for row in result["rows"]}))
    lines += ["", f"{where}; crops of {result['patch']} px; commit {made}."]
    if missing := [s for s in STAGES if s not in {row["stage"] for row in result["rows"]}]:
        lines += ["", f"Not finished: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def commit() -> str:
    "Commit of the code, marked if files differ from it."
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    changed = "+" if git(["git", "status", "--porcelain", "tocsr"]).stdout.strip() else ""
    return git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + changed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="checkpoints and results; keep it to continue")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--thin", action="store_true", help="a tenth of the width, to test this")
    parser.add_argument("--out", type=Path, help="JSON; a Markdown table is written next to it")
    parser.add_argument(
        "--part", choices=(*PLANS, *STAGES), help="this part alone, in this process"
    )
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    p = make_profile(folder, args.device, args.thin)
    if args.part in PLANS:
        architecture = found_architecture(folder) if args.part == "plan_found" else None
        found = estimate(p, PLANS[args.part], architecture, partial(print, flush=True))
        row = dict(key=plan_key(p, architecture), stages=found)
        return write_json(folder / f"{args.part}.json", row)
    if args.part:
        return rehearse(args.part, p, folder / f"{args.part}.json")
    result = dict(
        device=args.device,
        machine=machine(),
        patch=p.data.patch,
        rows=[],
        plan=run_part(args, folder, "plan", plan_key(p, None))["stages"],
    )
    for stage in STAGES:
        if stage not in result["plan"]:
            result["architecture"] = found_architecture(folder)
            key = plan_key(p, result["architecture"])
            result["plan"] |= run_part(args, folder, "plan_found", key)["stages"]
        result["rows"].append(run_part(args, folder, stage, stage_key(stage, p)))
        print(markdown(result), flush=True)
        if args.out:
            write_json(args.out, result)
            write_atomic(args.out.with_suffix(".md"), markdown(result))


if __name__ == "__main__":
    main()
