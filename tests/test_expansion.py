"Expansion of the latent space: widened autoencoders, the variants of table S4, the adapter."

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from tocsr.core.config import UNetConfig, get_profile, override
from tocsr.core.store import run_stage
from tocsr.models.autoencoder import LatentAutoencoder, PatchPCA
from tocsr.models.complexity import count_params, sd15_unet
from tocsr.models.diffusion import nano_unet, noise_schedule, null_context
from tocsr.models.expansion import (
    Teacher,
    expand_unet,
    fit_linear_adapter,
    load_teacher_folder,
    merge_linear_adapter,
    save_teacher,
    widen_autoencoder,
)
from tocsr.stages.expansion import load_teacher


def thin_kl(**changes):
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(32,) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **changes,
    )


@pytest.mark.parametrize(
    "model",
    [
        thin_kl,
        lambda: thin_kl(use_quant_conv=False, use_post_quant_conv=False),
        lambda: AutoencoderTiny(latent_channels=4),
    ],
)
@torch.no_grad()
def test_a_widened_autoencoder_keeps_its_function(model):
    torch.manual_seed(0)
    old = LatentAutoencoder(model()).eval()
    wide = widen_autoencoder(old, 16)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z_old = old.encode(x)
    z_new = wide.encode(x)
    assert z_new.shape[1] == wide.channels == 16 and old.channels == 4
    assert torch.allclose(z_new[:, :4], z_old, atol=1e-5)
    assert z_new[:, 4:].std() > 0
    assert torch.allclose(wide.decode(z_new), old.decode(z_old), atol=1e-4)
    if hasattr(old.model, "quant_conv"):
        log_variances = [v.model.encode(x).latent_dist.logvar for v in (old, wide)]
        assert torch.allclose(log_variances[1][:, :4], log_variances[0], atol=1e-5)


def test_what_cannot_be_widened_is_refused():
    vae = LatentAutoencoder(thin_kl())
    assert widen_autoencoder(vae, 4) is vae
    with pytest.raises(ValueError, match="4 latent channels to 2"):
        widen_autoencoder(vae, 2)
    with pytest.raises(ValueError, match="PatchPCA"):
        widen_autoencoder(LatentAutoencoder(PatchPCA(4)), 16)


@torch.no_grad()
def test_the_variants_have_the_parameters_of_table_s4():
    unet = sd15_unet(4)
    added = {"v1": 859.43, "v2": 859.46, "v3": 859.398}
    with torch.device("meta"):
        for variant, printed in added.items():
            expanded = expand_unet(unet, variant)
            millions = (count_params(expanded) - count_params(unet)) / 1e6
            assert millions == pytest.approx(printed - 859.395, abs=0.006)
            assert expanded.config.in_channels == expanded.config.out_channels == 16
    assert unet.config.in_channels == 4


@torch.no_grad()
def test_the_adapter_is_fitted_and_merged_exactly():
    torch.manual_seed(0)
    unet = nano_unet(UNetConfig(), 4).eval()
    true_B = torch.randn(16, 4)
    z_old = torch.randn(8, 4, 16, 16)
    z_new = torch.einsum("ck,bkhw->bchw", true_B, z_old)
    A, B = fit_linear_adapter(z_old, z_new)
    assert torch.allclose(B, true_B, atol=1e-4)
    merged = expand_unet(unet, "bridge", adapter=(A, B))
    assert torch.equal(merged.conv_in.weight, merge_linear_adapter(unet, A, B).conv_in.weight)
    inside = merged(z_new, 10, null_context(merged, 8)).sample
    outside = unet(z_old, 10, null_context(unet, 8)).sample
    assert torch.allclose(inside, torch.einsum("ck,bkhw->bchw", B, outside), atol=1e-4)
    assert count_params(merged) == count_params(expand_unet(unet, "v2"))


def test_unknown_variants_and_a_missing_adapter_are_refused():
    unet = sd15_unet(4)
    with pytest.raises(ValueError, match="v4"):
        expand_unet(unet, "v4")
    with pytest.raises(ValueError, match="fit_linear_adapter"):
        expand_unet(unet, "bridge")


@torch.no_grad()
def test_a_teacher_round_trips(tmp_path):
    torch.manual_seed(0)
    unet = nano_unet(UNetConfig(), 16).eval()
    teacher = Teacher(unet, noise_schedule("v_prediction"), LatentAutoencoder(thin_kl()))
    folder = save_teacher(teacher, tmp_path / "teacher")
    loaded = load_teacher_folder(folder)
    z = torch.randn(1, 16, 8, 8)
    context = null_context(unet, 1)
    assert torch.equal(loaded.unet(z, 5, context).sample, unet(z, 5, context).sample)
    assert loaded.schedule.config.prediction_type == "v_prediction"
    assert not loaded.vae.training
    half = load_teacher_folder(save_teacher(teacher, tmp_path / "half", torch.float16))
    assert half.unet.conv_in.weight.dtype == torch.float32
    assert unet.conv_in.weight.dtype == torch.float32
    assert (half.unet.conv_in.weight - unet.conv_in.weight).abs().max() < 1e-3


def test_a_teacher_is_rounded_to_half_precision_and_trained_further_from_its_folder(tmp_path):
    thin = dict(channels=(32,) * 4, heads=(1,) * 4, layers=1, groups=8)
    short = dict(start="scratch", steps=2, s4_steps=0, eval_samples=2, linear_crops=600)
    data = dict(patch=64, latent_crops=8)
    p = override(
        get_profile("smoke"),
        ablations=False,
        half_weights=True,
        data=data,
        unet=thin,
        teacher=short,
    )
    first = run_stage("teacher", p)
    weights = load_teacher(first).unet.state_dict()
    assert all(torch.equal(v, v.half().float()) for v in weights.values())
    folder = str(first.path / "teacher")
    further = run_stage("teacher", override(p, teacher=dict(start=folder)))
    again = load_teacher(further).unet.state_dict()
    change = [(again[k] - v).abs().max() for k, v in weights.items()]
    assert 0 < max(change) < 0.05  # begins where the folder ends
    with pytest.raises(ValueError, match=r"teacher.start: no folder .*missing"):
        run_stage("teacher", override(p, teacher=dict(start=str(tmp_path / "missing"))))
