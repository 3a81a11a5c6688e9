"""Time and memory by size, seams by tile, ONNX beside torch: one model, one process per memory figure, one run.

python tests/bench/bench_pipeline.py --out paper_figures/bench_pipeline.json        (the shipped weights: notebook 07 reads that file; --model FOLDER for others)
Numbers hold for the machine and the threads that the result names. Wall times are medians of warm calls, the whole path from array to array, consistency included.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
import numpy as np
import torch
from tocsr.export_onnx import export_onnx, load_onnx, missing
from tocsr.images import EMBEDDED, embedded_path, read_image, to_array, to_tensor
from tocsr.degradations import imresize
from tocsr.pipeline import OVERLAP, TOCSRPipeline, measure_peak, model_info, tile_difference, weight_hashes
from tocsr.store import machine, project_root, write_json

MPIXELS = (0.25, 0.5, 1, 2, 4, 8, 16)     # of the result
TILES = (64, 128, 256)
OVERLAPS = (16, 32, 64)                   # of a model that is not local
SIDE = 512                                # LR pixels of the picture for seams: its result has 2048


def photograph(side: int) -> np.ndarray:
    "A photograph repeated and cut to (side, side, 3)."
    a = read_image(embedded_path(next(p for p in EMBEDDED if p.name == "astronaut")))
    return np.tile(a, (-(-side//a.shape[0]), -(-side//a.shape[1]), 1))[:side, :side]


def seconds(f, repeats: int) -> float:
    "Median wall time of a warm call."
    f(); times = []
    for _ in range(repeats):
        t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    return statistics.median(times)


def by_size(pipe, repeats: int) -> list[dict]:
    "Seconds per result's megapixel; linear growth shows as one number in all rows."
    rows = []
    for m in MPIXELS:
        side = round((m*1e6)**.5/pipe.scale)
        s = seconds(lambda: pipe(photograph(side), output_type="np"), repeats if m <= 2 else 1)
        rows.append(dict(mpixel=(side*pipe.scale)**2/1e6, seconds=s, seconds_per_mpixel=s/((side*pipe.scale)**2/1e6)))
        print(rows[-1], flush=True)
    return rows


def by_tile(pipe) -> list[dict]:
    "Distance from the untiled result and seconds, for each tile and, where it matters, overlap."
    image, rows = photograph(SIDE), []
    for tile, overlap in [(t, o) for t in TILES for o in (OVERLAPS[:1] if pipe.local else OVERLAPS) if o < t]:
        t = time.perf_counter(); pipe(image, tile=tile, overlap=overlap, output_type="np"); t = time.perf_counter() - t
        rows.append(dict(tile=tile, overlap=overlap, default=(tile, overlap) == (pipe.tile, OVERLAP), seconds=t, **tile_difference(pipe, image, tile, overlap)))
        print(rows[-1], flush=True)
    return rows


def onnx(pipe, repeats: int) -> dict:
    "Seconds of torch and onnxruntime on 128 x 128 pixels, and their largest difference in grey levels."
    if lacking := missing(): return dict(skipped=f"{', '.join(lacking)} missing")
    image = to_array(imresize(to_tensor(photograph(512)), size=(128, 128)).clamp(-1, 1))
    with tempfile.TemporaryDirectory() as d:
        other = load_onnx(export_onnx(pipe, Path(d)/"model.onnx"))
        run = {k: lambda p=p: p(image, consistency=False, output_type="np").images[0] for k, p in dict(torch=pipe, onnx=other).items()}
        out = {f"{k}_s": seconds(f, repeats) for k, f in run.items()}
        return out | dict(ratio=out["onnx_s"]/out["torch_s"], max_difference=int(np.abs(run["torch"]().astype(int) - run["onnx"]()).max()))


def wheel() -> dict:
    "Size of the wheel that `pip wheel` builds of this repository."
    with tempfile.TemporaryDirectory() as d:
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", d, str(project_root())], check=True)
        return dict(mb=next(Path(d).glob("*.whl")).stat().st_size/1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; default the shipped weights")
    parser.add_argument("--out", type=Path, help="JSON with all numbers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("size", "tile", "memory", "onnx", "wheel"))
    a = parser.parse_args()
    pipe = TOCSRPipeline.from_pretrained(a.model)
    parts = dict(size=lambda: by_size(pipe, a.repeats), tile=lambda: by_tile(pipe), memory=lambda: measure_peak(a.model, 1024), onnx=lambda: onnx(pipe, a.repeats), wheel=wheel)
    out = dict(weights=weight_hashes(a.model), machine=machine(), threads=torch.get_num_threads(), dtype="float32", architecture=model_info(pipe).architecture)
    for name, part in parts.items():
        if a.only in (None, name): out[name] = part(); print(name, json.dumps(out[name]), flush=True)
    if a.out: write_json(a.out, out)


if __name__ == "__main__": main()
