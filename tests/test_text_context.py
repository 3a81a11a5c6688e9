"The empty prompt: from a text encoder, from files, and with every network that derives from it."

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tocsr.core.config import get_profile
from tocsr.core.store import TrainOptions
from tocsr.inference.pipeline import TOCSRPipeline
from tocsr.models.autoencoder import LatentAutoencoder, PatchPCA
from tocsr.models.diffusion import fixed_context, nano_unet, null_context, predict_epsilon
from tocsr.models.expansion import Teacher, expand_unet, load_teacher_folder, save_teacher
from tocsr.models.generator import (
    OneStepGenerator,
    add_condition_channels,
    load_sr_model,
    make_sr_model,
    save_sr_model,
)
from tocsr.models.staged_unet import StagedUNet, load_staged_unet, save_staged_unet
from tocsr.models.staged_unet import split_into_stages as split
from tocsr.models.surrogates import assemble, build_library, load_library, save_library
from tocsr.models.text_context import ContextError, load_context, read_context
from tocsr.search.fidelity import Fidelity
from tocsr.stages.distillation import NoisyLatents
from tocsr.stages.expansion_training import make_base_unet
from tocsr.stages.feature_distillation import distill_surrogates

WIDTH = 12


@pytest.fixture
def prompt():
    return torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def file(tmp_path, prompt):
    save_file(dict(context=prompt), tmp_path / "empty.safetensors")
    return tmp_path / "empty.safetensors"


@pytest.fixture
def profile(file):
    "A thin UNet whose profile names the file."
    p = get_profile("smoke", teacher=dict(prediction="epsilon"))
    thin = dict(channels=(8, 16), layers=1, heads=(1, 2), context_dim=WIDTH, groups=4)
    return replace(p, unet=replace(p.unet, context=str(file), **thin))


def test_files_of_every_format_hold_the_same(tmp_path, prompt, file):
    np.save(tmp_path / "a.npy", prompt[None].numpy())
    torch.save(prompt.double(), tmp_path / "a.pt")
    for name in (file, tmp_path / "a.npy", tmp_path / "a.pt"):
        assert torch.equal(load_context(name, WIDTH), prompt), name


class Pickled:
    pass


@pytest.mark.parametrize(
    "content, reason",
    [
        (torch.zeros(7, 13), r"\(7, 13\), the UNet reads \(tokens, 12\)"),
        (torch.zeros(2, 7, WIDTH), r"\(2, 7, 12\); \(tokens, width\)"),
        (torch.full((7, WIDTH), torch.nan), "not finite"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "2 entries"),
        (Pickled(), "holds more than tensors"),
    ],
)
def test_what_is_no_context_is_refused_by_name(tmp_path, content, reason):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ContextError, match=f"bad.pt.*{reason}"):
        load_context(tmp_path / "bad.pt", WIDTH)


def test_missing_and_damaged_files_are_refused_by_name(tmp_path, file):
    with pytest.raises(ContextError, match="no file .*gone.npy"):
        load_context(tmp_path / "gone.npy", WIDTH)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ContextError, match="empty.safetensors cannot be read"):
        load_context(file, WIDTH)
    with pytest.raises(ContextError, match="notes.txt is none of .safetensors"):
        read_context(tmp_path / "notes.txt")


@pytest.fixture
def stable_diffusion(tmp_path):
    "Tokenizer and text encoder with the layout of Stable Diffusion 1.5, random weights."
    pytest.importorskip("transformers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    tokenizer = CLIPTokenizer(vocab=words, merges=[], model_max_length=77)
    tokenizer.save_pretrained(tmp_path / "sd/tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=3,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "sd/text_encoder")
    return tmp_path / "sd"


def test_the_empty_prompt_is_that_of_diffusers_pipeline(stable_diffusion):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(stable_diffusion / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(stable_diffusion / "tokenizer"),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs, _ = pipe.encode_prompt("", "cpu", 1, False)
    ours = load_context(stable_diffusion, WIDTH)
    assert ours.shape == (77, WIDTH) and torch.allclose(ours, theirs[0], atol=1e-6)


def test_a_folder_without_a_text_encoder_is_refused(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "unet").mkdir()
    with pytest.raises(ContextError, match="has no readable tokenizer/ and text_encoder/"):
        load_context(tmp_path, WIDTH)


def test_a_checkpoint_takes_the_context_of_its_own_text_encoder(
    tmp_path, stable_diffusion, profile
):
    nano_unet(profile.unet, 4).save_pretrained(stable_diffusion / "unet")
    checkpoint = replace(profile.unet, checkpoint=str(stable_diffusion), context=None)
    unet, _ = make_base_unet(replace(profile, unet=checkpoint))
    assert torch.equal(fixed_context(unet)[0], load_context(stable_diffusion, WIDTH))
    alone = replace(checkpoint, checkpoint=str(stable_diffusion / "unet"))
    with pytest.raises(ContextError, match="unet was trained with text.*set unet.context"):
        make_base_unet(replace(profile, unet=alone))
    unet, _ = make_base_unet(replace(profile, unet=replace(alone, context="ones")))
    assert torch.equal(fixed_context(unet), torch.ones(1, 1, WIDTH))


def test_the_context_is_saved_with_the_teacher_and_what_derives_from_it(tmp_path, profile, prompt):
    "No step after the base UNet needs the file or a text encoder."
    base, schedule = make_base_unet(profile)
    wide = expand_unet(base, "v2", 16).eval().requires_grad_(False)
    teacher = Teacher(wide, schedule, LatentAutoencoder(PatchPCA(channels=16)))
    teacher = load_teacher_folder(save_teacher(teacher, tmp_path / "teacher"))
    assert torch.equal(fixed_context(teacher.unet)[0], prompt)
    net = split(teacher.unet)
    library = build_library(net, context=null_context(net, 1))
    compact = assemble(net, library, "[RA-R]-[R-RA]").eval()
    z = torch.randn(2, 16, 8, 8)
    t = torch.tensor([3, 900])
    theirs = compact(z, t, prompt.expand(2, -1, -1)).sample
    folder = save_staged_unet(tmp_path / "compact", compact)
    for again in (load_staged_unet(folder), StagedUNet.from_pretrained(folder)):
        assert torch.equal(predict_epsilon(again, z, t, schedule), theirs)
    sr = make_sr_model(add_condition_channels(compact, 16), schedule, target="latent", z_h=z, z_l=z)
    loaded = load_sr_model(save_sr_model(tmp_path / "sr", sr))
    assert torch.equal(predict_epsilon(loaded.unet, z, t, schedule, torch.zeros_like(z)), theirs)
    generator = OneStepGenerator(teacher.vae, loaded.unet, schedule)
    TOCSRPipeline.from_generator(generator, 4, 1).save_pretrained(tmp_path / "pipeline")
    unet = TOCSRPipeline.from_pretrained(tmp_path / "pipeline").network.unet
    assert torch.equal(null_context(unet, 2), prompt.expand(2, -1, -1))


def test_fidelity_and_feature_distillation_read_the_context(tmp_path, profile, prompt):
    base, schedule = make_base_unet(profile)
    net = split(base.eval().requires_grad_(False))
    latents = torch.randn(4, 4, 8, 8)
    fidelity = Fidelity.draw(net, schedule, latents)
    with torch.no_grad():
        own = net(fidelity.z_t, fidelity.t, prompt.expand(4, -1, -1)).sample
        other = net(fidelity.z_t, fidelity.t, torch.ones(4, 1, WIDTH)).sample
    assert torch.equal(fidelity.target, own) and not torch.allclose(own, other, atol=1e-3)
    seen = []
    net.stages["E1"].register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    batches = NoisyLatents(_Crops(latents), schedule, null_context(net, 2), 8, 0)
    library = build_library(net, {"E1": ("R",)}, context=null_context(net, 1))
    distill_surrogates(
        net, library, batches, steps=1, lr=1e-3, options=TrainOptions(tmp_path / "fwkd")
    )
    assert len(seen) == 1 and torch.equal(seen[0], prompt.expand(2, -1, -1))


class _Crops:
    "Latents in place of `CachedLatents`."

    def __init__(self, latents):
        self.latents = latents

    def crops(self, n, side, generator):
        return self.latents[:n]


def test_libraries_of_another_context_are_refused(tmp_path, profile):
    "The teacher's hash covers the context: its surrogates were trained with it."
    base, _ = make_base_unet(profile)
    net = split(base.eval())
    save_library(tmp_path / "library", build_library(net, {"E1": ("R",)}), net)
    load_library(tmp_path / "library", net)
    without, _ = make_base_unet(replace(profile, unet=replace(profile.unet, context=None)))
    with pytest.raises(ValueError, match="was trained with teacher"):
        load_library(tmp_path / "library", split(without.eval()))
