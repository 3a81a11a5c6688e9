"""Start-up times as ratios to their lower bounds, so that the machine's speed and load cancel.

python tests/bench/test_startup.py      prints them
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELP = ["-m", "tocsr", "--help"]
IMPORT = ["-c", "from tocsr import TOCSRPipeline"]
NOTHING = ["-c", "pass"]
DIFFUSERS = ["-c", "from diffusers import DiffusionPipeline, ModelMixin"]


def cpu_seconds(arguments: list[str]) -> float:
    "CPU seconds of a Python process."
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def ratio(command: list[str], reference: list[str], repeats: int = 3) -> float:
    "Median over pairs of runs that follow each other; the first pair only warms the file cache."
    pairs = [(cpu_seconds(command), cpu_seconds(reference)) for _ in range(repeats + 1)]
    return statistics.median(a / b for a, b in pairs[1:])


def test_help_is_light():
    assert ratio(HELP, NOTHING) < 20  # half a second where python -c pass takes 25 ms


def test_the_pipelines_import_adds_little_to_diffusers():
    assert ratio(IMPORT, DIFFUSERS) < 2


if __name__ == "__main__":
    start = time.perf_counter()
    subprocess.run([sys.executable, *HELP], check=True, capture_output=True, cwd=ROOT)
    print(
        f"tocsr --help: {time.perf_counter() - start:.2f} s, {ratio(HELP, NOTHING):.1f} "
        "times python -c pass"
    )
    print(f"import of the pipeline: {ratio(IMPORT, DIFFUSERS):.2f} times import diffusers")
