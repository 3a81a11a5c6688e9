"""Compare consistency factors on seven kinds of input: the source of the pipeline's default.

python tests/bench/bench_consistency.py PHOTOGRAPHS --out tests/bench/consistency.json

Crops of 512 pixels are cut out of a folder of photographs, degraded to 128 pixels in seven ways
and upscaled once. The results are back-projected with each factor, and PSNR-Y, ST-LPIPS and NIQE
are measured. Use photographs that no reported test set contains. About 20 minutes on one thread
with 12 crops.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from tocsr.core.files import write_json
from tocsr.core.image import read_image, to_tensor
from tocsr.core.store import machine
from tocsr.data.degradations import (
    add_gaussian_noise,
    blur_image,
    compress_jpeg,
    degrade_images,
    gaussian_kernel,
)
from tocsr.data.images import mean_gradient
from tocsr.evaluation.metrics import measure, summarize_values
from tocsr.inference.pipeline import TOCSRPipeline, weight_hashes
from tocsr.models.consistency import back_project

SCALE = 4
SIDE = 512
FACTORS = (0, 1, 2, 4, 8)
METRICS = ("psnry", "stlpips", "niqe")
COLUMNS = ("input", "consistency factor", *METRICS)


def crops(folder: Path, count: int) -> list[torch.Tensor]:
    """The most textured of nine crops of `count` photographs, spread evenly over the sorted file
    names.
    """
    found = []
    files = sorted(f for f in folder.iterdir() if f.suffix in (".webp", ".png", ".jpg"))
    for file in files[:: max(1, len(files) // (2 * count))]:
        image = read_image(file)
        if min(image.shape[:2]) < SIDE or len(found) == count:
            continue
        corners = [
            (top, left)
            for top in np.linspace(0, image.shape[0] - SIDE, 3).astype(int)
            for left in np.linspace(0, image.shape[1] - SIDE, 3).astype(int)
        ]
        candidates = [image[top : top + SIDE, left : left + SIDE] for top, left in corners]
        found.append(to_tensor(max(candidates, key=mean_gradient)))
    return found


def add_noise(x: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    "(3, h, w) in [0, 1] with Gaussian noise of `sigma` 8-bit levels."
    return add_gaussian_noise(x, np.random.default_rng(seed), sigma=sigma, gray=False)


INPUTS = {
    "clean": lambda x, seed: x,
    "JPEG 90": lambda x, seed: compress_jpeg(x, 90),
    "JPEG 60": lambda x, seed: compress_jpeg(x, 60),
    "noise 5": lambda x, seed: add_noise(x, 5, seed),
    "noise 10": lambda x, seed: add_noise(x, 10, seed),
    "blur": lambda x, seed: blur_image(x, gaussian_kernel(9, (0.8, 0.8))),
}  # changes to the bicubic LR image (3, h, w) in [0, 1]


def low_resolution(hr: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    "(3, h, w) -> (1, 3, h/4, w/4), both in [-1, 1], on 256 levels."
    if kind == "Real-ESRGAN":
        return degrade_images(hr[None], "realesrgan", SCALE, [seed])
    lr = (degrade_images(hr[None], "bicubic", SCALE)[0] + 1) / 2
    x = INPUTS[kind](lr, seed)
    return (x.clamp(0, 1) * 255).round()[None] / 127.5 - 1


def rows_of(pipe, hr: list[torch.Tensor], kind: str) -> list[dict]:
    "One row per factor with the metrics' means."
    results = {factor: [] for factor in FACTORS}
    for i, x in enumerate(hr):
        lr = low_resolution(x, kind, 7_000 + i)
        out = pipe((lr + 1) / 2, seed=i, consistency_factor=0, output_type="pt")
        sr = out.images[0][None] * 2 - 1
        for factor in FACTORS:
            results[factor].append((back_project(sr.clone(), lr, factor) if factor else sr)[0])
    rows = []
    for factor, images in results.items():
        values = measure(METRICS, torch.stack(images), torch.stack(hr), border=SCALE)
        means = {m: summarize_values(v)["mean"] for m, v in values.items()}
        rows.append({"input": kind, "consistency factor": factor, **means})
        print(rows[-1], flush=True)
    return rows


def markdown(rows: list[dict]) -> str:
    "The table with one line per input and factor."
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        numbers = " | ".join(f"{row[m]:.3f}" for m in METRICS)
        lines.append(f"| {row['input']} | {row['consistency factor']} | {numbers} |")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path, help="a folder of photographs")
    parser.add_argument("--model", help="a model folder; default: the bundled weights")
    parser.add_argument("--crops", type=int, default=12)
    parser.add_argument("--out", type=Path, help="JSON; a Markdown table is written next to it")
    args = parser.parse_args()
    pipe = TOCSRPipeline.from_pretrained(args.model)
    hr = crops(args.photographs, args.crops)
    rows = [row for kind in (*INPUTS, "Real-ESRGAN") for row in rows_of(pipe, hr, kind)]
    print(markdown(rows))
    if args.out:
        result = dict(
            weights=weight_hashes(args.model),
            machine=machine(),
            crops=len(hr),
            side=SIDE,
            rows=rows,
        )
        write_json(args.out, result)
        args.out.with_suffix(".md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
