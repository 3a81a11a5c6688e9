"""Measure a pipeline: time by image size, tiles, memory, ONNX against torch, size of the wheel.

python tests/bench/bench_pipeline.py --out paper_figures/bench_pipeline.json

Without --model FOLDER it measures the bundled weights; notebook 07 reads that file. The numbers
hold for the machine and the threads that the result names. Wall times are medians of warm calls
from array to array, back-projection included. Each memory figure is measured in its own process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tocsr.core.files import project_root, write_json
from tocsr.core.image import imresize, read_image, to_array, to_tensor
from tocsr.core.store import machine
from tocsr.data.images import EMBEDDED, embedded_path
from tocsr.inference.model_info import measure_peak, model_info, tile_difference
from tocsr.inference.onnx_export import export_onnx, load_onnx, missing_packages
from tocsr.inference.pipeline import TOCSRPipeline, weight_hashes
from tocsr.inference.tiling import OVERLAP

MPIXELS = (0.25, 0.5, 1, 2, 4, 8, 16)  # of the result
TILES = (64, 128, 256)
OVERLAPS = (16, 32, 64)  # of a model that is not tileable
SIDE = 512  # LR pixels of the image for tiles: its result has 2048


def photograph(side: int) -> np.ndarray:
    "A photograph repeated and cut to (side, side, 3)."
    a = read_image(embedded_path(next(p for p in EMBEDDED if p.name == "astronaut")))
    return np.tile(a, (-(-side // a.shape[0]), -(-side // a.shape[1]), 1))[:side, :side]


def seconds(f, repeats: int) -> float:
    "Median wall time of a warm call."
    f()
    times = []
    for _ in range(repeats):
        t = time.perf_counter()
        f()
        times.append(time.perf_counter() - t)
    return statistics.median(times)


def by_size(pipe, repeats: int) -> list[dict]:
    "Seconds by size; with linear growth, seconds per megapixel are equal in all rows."
    rows = []
    for m in MPIXELS:
        side = round((m * 1e6) ** 0.5 / pipe.scale)
        upscale = partial(pipe, photograph(side), output_type="np")
        s = seconds(upscale, repeats if m <= 2 else 1)
        mpixel = (side * pipe.scale) ** 2 / 1e6
        rows.append(dict(mpixel=mpixel, seconds=s, seconds_per_mpixel=s / mpixel))
        print(rows[-1], flush=True)
    return rows


def by_tile(pipe) -> list[dict]:
    "Difference from the untiled result and seconds, by tile and, where it matters, overlap."
    image = photograph(SIDE)
    rows = []
    for tile, overlap in [
        (t, o) for t in TILES for o in (OVERLAPS[:1] if pipe.tileable else OVERLAPS) if o < t
    ]:
        t = time.perf_counter()
        pipe(image, tile=tile, overlap=overlap, output_type="np")
        t = time.perf_counter() - t
        rows.append(
            dict(
                tile=tile,
                overlap=overlap,
                default=(tile, overlap) == (pipe.tile, OVERLAP),
                seconds=t,
                **tile_difference(pipe, image, tile, overlap),
            )
        )
        print(rows[-1], flush=True)
    return rows


def onnx(pipe, repeats: int) -> dict:
    """Seconds of torch and onnxruntime on 128 x 128 pixels, and their largest difference in 8-bit
    levels.
    """
    if lacking := missing_packages():
        return dict(skipped=f"{', '.join(lacking)} missing")
    image = to_array(imresize(to_tensor(photograph(512)), size=(128, 128)).clamp(-1, 1))
    with tempfile.TemporaryDirectory() as d:
        other = load_onnx(export_onnx(pipe, Path(d) / "model.onnx"))
        run = {
            k: lambda p=p: np.asarray(p(image, consistency_factor=0).images[0]).astype(int)
            for k, p in dict(torch=pipe, onnx=other).items()
        }
        out = {f"{k}_s": seconds(f, repeats) for k, f in run.items()}
        return out | dict(
            ratio=out["onnx_s"] / out["torch_s"],
            max_difference=int(np.abs(run["torch"]() - run["onnx"]()).max()),
        )


def wheel() -> dict:
    "Size of the wheel that `pip wheel` builds of this repository."
    with tempfile.TemporaryDirectory() as d:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "--quiet",
                "--no-deps",
                "-w",
                d,
                str(project_root()),
            ],
            check=True,
        )
        return dict(mb=next(Path(d).glob("*.whl")).stat().st_size / 1e6)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder; default the bundled weights")
    parser.add_argument("--out", type=Path, help="JSON with all numbers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("size", "tile", "memory", "onnx", "wheel"))
    a = parser.parse_args()
    pipe = TOCSRPipeline.from_pretrained(a.model)
    parts = dict(
        size=lambda: by_size(pipe, a.repeats),
        tile=lambda: by_tile(pipe),
        memory=lambda: measure_peak(a.model, 1024),
        onnx=lambda: onnx(pipe, a.repeats),
        wheel=wheel,
    )
    out = dict(
        weights=weight_hashes(a.model),
        machine=machine(),
        threads=torch.get_num_threads(),
        dtype="float32",
        architecture=model_info(pipe).architecture,
    )
    for name, part in parts.items():
        if a.only in (None, name):
            out[name] = part()
            print(name, json.dumps(out[name]), flush=True)
    if a.out:
        write_json(a.out, out)


if __name__ == "__main__":
    main()
