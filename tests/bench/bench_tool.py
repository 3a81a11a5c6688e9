"""Start-up of the commands and cost of small tiles, as ratios that hold on any machine.

python tests/bench/bench_tool.py --out tool.json

Each command runs in a process of its own, in turns with its reference: the least that a process
must do for the same purpose. The first pair only warms the file cache; of the others the medians
are reported. The upscaled image has 16 x 16 pixels, so that its command is start-up.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 5  # of the whole upscale command on an idle machine
TILES = (16, 32, 64, 128)  # LR pixels
SIDE = 256  # LR pixels of the image for tiles


@dataclass(frozen=True)
class Startup:
    "A command and its reference, as arguments of Python."

    command: tuple[str, ...]
    reference: tuple[str, ...]


STARTUPS = dict(
    help=Startup(("-m", "tocsr", "--help"), ("-c", "pass")),
    pipeline=Startup(
        ("-c", "from tocsr import TOCSRPipeline"),
        ("-c", "from diffusers import DiffusionPipeline, ModelMixin"),
    ),
    upscale=Startup(
        ("-m", "tocsr", "upscale", "small.png", "-o", "x.png", "--overwrite"),
        ("-c", "import torch, diffusers"),
    ),
)


def run(arguments: tuple[str, ...], folder: Path) -> tuple[float, float]:
    "Wall and CPU seconds of a Python process."
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    call = [sys.executable, *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(call, check=True, capture_output=True, env=environment, cwd=folder)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(startup: Startup, repeats: int = 3) -> dict[str, float]:
    "Median seconds of a command and of its reference, and the medians of their ratios."
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(folder / "small.png")
        pairs = [
            (*run(startup.command, folder), *run(startup.reference, folder))
            for _ in range(repeats + 1)
        ][1:]
    wall, cpu, reference_wall, reference_cpu = (statistics.median(v) for v in zip(*pairs))
    return dict(
        wall_s=wall,
        cpu_s=cpu,
        reference_wall_s=reference_wall,
        reference_cpu_s=reference_cpu,
        wall_ratio=statistics.median(p[0] / p[2] for p in pairs),
        cpu_ratio=statistics.median(p[1] / p[3] for p in pairs),
    )


def tile_rows(repeats: int) -> list[dict]:
    "CPU seconds of one image by tile, and their ratios to the untiled call."
    import torch

    from tocsr.inference.pipeline import TOCSRPipeline

    pipe = TOCSRPipeline.from_pretrained()
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = []
    for tile in (None, *TILES):
        times = []
        for _ in range(repeats):
            start = time.process_time()
            pipe.upscale_tensor(x, tile=tile)
            times.append(time.process_time() - start)
        rows.append(dict(tile=tile, cpu_s=statistics.median(times)))
        rows[-1]["ratio"] = rows[-1]["cpu_s"] / rows[0]["cpu_s"]
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON with all numbers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=(*STARTUPS, "tiles"))
    a = parser.parse_args()
    found = {}
    for name, startup in STARTUPS.items():
        if a.only in (None, name):
            found[name] = measure(startup, a.repeats)
            print(name, json.dumps(found[name]), flush=True)
    if "upscale" in found:
        found["upscale"]["limit_s"] = LIMIT_S
        found["upscale"]["within_limit"] = found["upscale"]["wall_s"] <= LIMIT_S
    if a.only in (None, "tiles"):
        found["tiles"] = tile_rows(a.repeats)
    if a.out:
        from tocsr.core.files import write_json
        from tocsr.core.store import machine

        write_json(a.out, dict(machine=machine(), **found))


if __name__ == "__main__":
    main()
