"""Which small UNet uses all its stages? Candidates of one training time each.

    python tests/bench/bench_nano_scale.py --photos FOLDER --minutes 13 [CANDIDATE ...]

Every candidate is trained for the same CPU time on latents of the bundled 16-channel autoencoder
and evaluated on held-out photographs: the denoising error over the best linear denoiser's, and the
influence of every stage. Writes nano_scale.json next to this file; finished candidates are kept.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import time
from pathlib import Path

import torch

from tocsr.core.config import DataConfig, TeacherConfig, UNetConfig
from tocsr.core.store import TrainOptions
from tocsr.core.weights import bundled_weights
from tocsr.data.images import load_photos
from tocsr.data.latents import CachedLatents
from tocsr.evaluation.influence import noisy_half, relevant_parameters, stage_influence
from tocsr.models.autoencoder import load_autoencoder
from tocsr.models.diffusion import nano_unet, noise_schedule
from tocsr.stages.expansion_training import (
    best_linear_denoiser,
    evaluate_against_linear,
    timestep_weights,
    train_unet,
)

SIDE = 16  # latents: side of the crops on which candidates are compared
SCENES = dict(sizes=(1.0, 0.5, 0.3, 0.15), crop_sides=(16, 32))
BOTH = dict(initialization="identity", skip_dropout=0.4)
CANDIDATES = dict(
    groups32=dict(groups=32),  # as in release 0.1
    groups4=dict(),
    identity=dict(initialization="identity"),
    dropout=dict(skip_dropout=0.4),
    identity_dropout=BOTH,
    scenes=SCENES,
    identity_dropout_scenes=BOTH | SCENES,
    epsilon=BOTH | SCENES | dict(prediction="epsilon"),
)


def configure(changes: dict) -> tuple[UNetConfig, TeacherConfig]:
    "The configurations that a candidate's settings belong to."
    names = {f.name for f in dataclasses.fields(UNetConfig)}
    unet = UNetConfig(**{k: v for k, v in changes.items() if k in names})
    rest = {k: v for k, v in changes.items() if k not in names}
    return unet, TeacherConfig(**dict(batch=32, lr=1e-3, warmup=50, ema=0.999) | rest)


def encode(photos, sizes, folder: Path) -> CachedLatents:
    "Latents of photographs at these sizes, kept in `folder`."
    file = folder / f"latents_{photos.manifest_hash[:8]}_{'_'.join(map(str, sizes))}.pt"
    if not file.exists():
        vae = load_autoencoder(bundled_weights("codec16"))
        torch.save(CachedLatents.encode(vae, photos, sizes=sizes).maps, file)
    return CachedLatents(torch.load(file), 8)


def train(name: str, train_latents, held, *, minutes: float, folder: Path) -> dict:
    "Train a candidate for `minutes` of CPU time and evaluate it."
    unet_config, config = configure(CANDIDATES[name])
    schedule = noise_schedule(config.prediction)
    weights = timestep_weights(config.weighting, schedule, train_latents)
    options = TrainOptions(folder / name, device="cpu")

    def run(steps, unet, scratch):
        start = time.process_time()
        train_unet(
            unet,
            train_latents,
            schedule,
            steps,
            config,
            weights=weights,
            options=options.named(scratch),
            size=SIDE,
        )
        return (time.process_time() - start) / steps

    torch.manual_seed(0)
    seconds = run(12, nano_unet(unet_config, 16), "timing")
    steps = int(60 * minutes / seconds)
    torch.manual_seed(0)
    unet = nano_unet(unet_config, 16)
    seconds = run(steps, unet, "training")
    unet.eval()
    linear, _ = best_linear_denoiser(train_latents, held, schedule, 12_000)
    ratio = evaluate_against_linear(unet, schedule, linear, held, 10)
    influence = stage_influence(unet, held, schedule)
    return dict(
        candidate=name,
        settings=CANDIDATES[name],
        steps=steps,
        cpu_seconds_per_step=seconds,
        ratio=ratio["per_level"],
        ratio_mean=ratio["mean"],
        ratio_mean_interval=ratio["mean_interval"],
        influence=influence["stages"],
        influence_noisy_half=noisy_half(influence),
        relevant_parameters=relevant_parameters(unet, influence),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("candidates", nargs="*", default=list(CANDIDATES))
    parser.add_argument("--photos", required=True, help="folder of photographs")
    parser.add_argument("--minutes", type=float, default=13, help="CPU time per candidate")
    parser.add_argument("--limit", type=int, default=120, help="photographs at most")
    parser.add_argument("--scratch", type=Path, default=Path("runs/nano_scale"))
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    data = DataConfig(source=args.photos)
    photos = load_photos(data)
    parts = {}
    for part, count in (("train", args.limit), ("val", args.limit // 4)):
        split = photos.split(part)
        names = list(split.names)
        parts[part] = split.subset(names[:: max(1, len(names) // count)])
    out = Path(__file__).with_name("nano_scale.json")
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    done = {row["candidate"] for row in rows}
    generator = torch.Generator().manual_seed(5)
    held = encode(parts["val"], (1.0, 0.5), args.scratch).crops(256, SIDE, generator)
    for name in args.candidates:
        if name in done:
            continue
        sizes = CANDIDATES[name].get("sizes", (1.0,))
        latents = encode(parts["train"], sizes, args.scratch)
        rows.append(train(name, latents, held, minutes=args.minutes, folder=args.scratch))
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True)
        record = dict(
            minutes=args.minutes,
            photographs=len(parts["train"].names),
            threads=torch.get_num_threads(),
            machine=platform.processor() or platform.machine(),
            torch=torch.__version__,
            commit=commit.stdout.decode().strip(),
            rows=rows,
        )
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(name, rows[-1]["ratio_mean"], rows[-1]["influence_noisy_half"], flush=True)


if __name__ == "__main__":
    main()
