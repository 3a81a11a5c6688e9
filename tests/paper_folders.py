"""Checkpoint folders of the paper's layouts with random weights: SD 1.5 (a UNet and a 4-channel
autoencoder) and a FLUX autoencoder of 16 channels, at full width or thin.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image

from tocsr.core.config import DataConfig
from tocsr.data.images import load_photos

FULL = dict(unet=(320, 640, 1280, 1280), vae=(128, 256, 512, 512), groups=32, context=768)
THIN = dict(unet=(32, 64, 128, 128), vae=(8, 16, 16, 16), groups=8, context=32)


def sd15_unet(size: dict) -> UNet2DConditionModel:
    "SD 1.5's configuration; 859.5 M parameters at full width."
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=size["unet"],
        cross_attention_dim=size["context"],
        attention_head_dim=8,
        norm_num_groups=size["groups"],
    )


def kl_autoencoder(size: dict, **config) -> AutoencoderKL:
    "The autoencoder of SD 1.5 and of FLUX; 83.7 M parameters at full width."
    levels = len(size["vae"])
    return AutoencoderKL(
        block_out_channels=size["vae"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        norm_num_groups=size["groups"],
        **config,
    )


def write_checkpoints(folder: Path, size: dict) -> tuple[Path, Path]:
    "Write sd15/{unet,vae,scheduler} and flux/vae; returns sd15 and flux/vae."
    torch.manual_seed(0)
    sd15 = folder / "sd15"
    flux = folder / "flux/vae"
    if (flux / "config.json").is_file():  # written last
        return sd15, flux
    sd15_unet(size).save_pretrained(sd15 / "unet")
    kl_autoencoder(size, scaling_factor=0.18215).save_pretrained(sd15 / "vae")
    DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ).save_pretrained(sd15 / "scheduler")
    kl_autoencoder(
        size,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(flux)
    return sd15, flux


def write_photographs(folder: Path, side: int, count: int = 12) -> Path:
    "Corners of embedded photographs, which encode faster than whole ones."
    folder.mkdir(exist_ok=True)
    embedded = load_photos(DataConfig())
    for i in range(count):
        photo = embedded.read(i % len(embedded))
        top = side * (i // len(embedded))
        Image.fromarray(photo[top : top + side, :side]).save(folder / f"{i}.png")
    return folder


def rehearsal(folder: Path, size: dict, patch: int) -> dict:
    "Overrides of profile `paper`: these checkpoints, two steps of everything, few samples."
    sd15, flux = write_checkpoints(folder, size)
    photographs = write_photographs(folder / "photographs", max(256, patch), count=6)
    two = dict(steps=2, batch=2)
    return dict(
        device="cpu",
        mixed_precision="no",
        validate_every=2,
        data=dict(source=str(photographs), patch=patch, latent_crops=16),
        autoencoder=dict(
            teacher=str(flux), shape=str(sd15 / "vae"), pca_patches=1_000, eval_images=2, **two
        ),
        unet=dict(
            checkpoint=str(sd15),
            context="ones",
            channels=size["unet"],
            context_dim=size["context"],
            groups=size["groups"],
        ),
        teacher=dict(
            expand_steps=2,
            joint_steps=2,
            batch=2,
            eval_samples=2,
            eval_levels=2,
            linear_crops=64,
        ),
        surrogates=dict(eval_batches=1, names=("R", "RA"), **two),
        search=dict(
            eps=(0.05, 1e6),
            iterations=4,
            initial=2,
            fidelity_samples=2,
            fidelity_batch=2,
            samples=2,
            sample_steps=2,
        ),
        compact=two,
        adapt=dict(sample_steps=(1, 2), **two),
        onestep=dict(teacher_steps=2, endpoints=4, **two),
        eval=dict(crops=2, crop=patch, metrics=("psnry", "ssim")),
    )
