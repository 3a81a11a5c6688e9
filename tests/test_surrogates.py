"Surrogates: the paper's counts, any UNet, inheritance from the teacher, and the library on disk."

import math
import random

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from test_staged_unet import UNETS, thin

from tocsr.core.config import UNetConfig
from tocsr.core.files import StoreError
from tocsr.core.store import TrainOptions
from tocsr.models.architecture import (
    PAPER_ARCHITECTURE,
    REMOVED,
    TEXT_FREE_PAPER_ARCHITECTURE,
    Architecture,
    StageError,
)
from tocsr.models.autoencoder import LatentAutoencoder
from tocsr.models.complexity import count_macs, count_params, sd15_unet, unet_inputs
from tocsr.models.diffusion import nano_unet, noise_schedule, null_context
from tocsr.models.expansion import Teacher, load_teacher_folder, save_teacher
from tocsr.models.staged_unet import build_staged_unet, capture_stage_io, split_into_stages
from tocsr.models.surrogates import (
    SurrogateLibrary,
    architecture_params,
    assemble,
    build_library,
    build_surrogate,
    default_designs,
    load_library,
    paper_readings,
    save_library,
    stage_options,
    trainable_copy,
)
from tocsr.search.fidelity import Fidelity
from tocsr.stages.feature_distillation import distill_surrogates


@pytest.fixture(scope="module")
def library(nano):
    return build_library(split_into_stages(nano), context=null_context(nano, 1))


@pytest.mark.parametrize("name", UNETS)
def test_any_vector_assembles(name):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[name]).eval()
    teacher = split_into_stages(unet)
    library = build_library(teacher)
    rng = random.Random(name)
    space = stage_options(teacher, library)
    z = torch.randn(1, 4, 10, 13)
    c = torch.randn(1, 3, unet.config.cross_attention_dim)
    for _ in range(12):
        a = Architecture(tuple(rng.choice(o) for o in space.values()))
        net = assemble(teacher, library, a)
        with torch.no_grad():
            out = net(z, 5, c).sample
        assert out.shape == z.shape and out.isfinite().all()
        bare = build_staged_unet(unet.config, a)
        assert count_params(net) == architecture_params(teacher, library, a) == count_params(bare)
        assert (
            Architecture.parse(str(a), teacher.levels) == a == net.architecture == bare.architecture
        )


def test_removal_needs_equal_channels():
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS["three levels"])
    teacher = split_into_stages(unet)
    library = build_library(teacher)
    assert library.removable == ("Mid", "D3")  # E3 widens from 64 to 128
    with pytest.raises(StageError, match="E3 has no option 'none'"):
        assemble(teacher, library, teacher.architecture.swap(E3=REMOVED))


def test_library_sizes_are_the_papers(nano):
    teacher = split_into_stages(sd15_unet(16))
    library = build_library(teacher)
    assert [len(library.surrogates[s]) for s in teacher.shapes] == [4, 4, 4, 4, 6, 4, 4, 4, 4]
    rng = random.Random(0)
    space = stage_options(teacher, library)
    inputs = unet_inputs(teacher, side=32)
    for _ in range(3):
        net = assemble(teacher, library, Architecture(tuple(rng.choice(o) for o in space.values())))
        with torch.no_grad():
            assert net(*inputs).sample.shape == (1, 16, 32, 32)
    three = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS["three levels"])
    shapes = split_into_stages(three).shapes.values()
    assert [len(default_designs(s)) for s in shapes] == [
        2,
        1,
        1,
        6,
        4,
        4,
        3,
    ]  # a thin teacher has fewer designs below it


# METHOD.md's counts: parameters in millions, GMACs at 64x64 latents and 77 tokens
@pytest.mark.parametrize(
    "architecture, params, gmacs",
    [
        ("[R-R-R]-[R^-RA^-RAA^]", 143.24, 145.3),
        ("[R-R-R]-[R^-RS^-RSS^]", 140.04, 142.1),
        (PAPER_ARCHITECTURE, 133.00, 141.1),
        (TEXT_FREE_PAPER_ARCHITECTURE, 129.80, 137.9),
    ],
)
def test_paper_network_at_sd15_shape(architecture, params, gmacs):
    row = {r["architecture"]: r for r in paper_readings()}[architecture]
    assert row["params"] / 1e6 == pytest.approx(params, rel=1e-3)
    assert row["macs"] / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_table_1_total():
    with torch.device("meta"):
        tiny = AutoencoderTiny(latent_channels=16)
        image = torch.empty(1, 3, 512, 512)
        latent = torch.empty(1, 16, 64, 64)
    autoencoder = count_macs(tiny.encoder, image) + count_macs(tiny.decoder, latent)
    net = build_staged_unet(sd15_unet(16).config, PAPER_ARCHITECTURE)
    assert (autoencoder + count_macs(net, *unet_inputs(net))) / 1e9 == pytest.approx(
        273.0, rel=1e-3
    )


def test_s_is_exact_for_one_token_and_not_for_two(nano):
    teacher = split_into_stages(nano)
    z = torch.randn(2, 16, 16, 16)
    t = torch.tensor([20, 800])
    one = torch.randn(1, 1, 64)
    two = torch.randn(1, 2, 64) * 10
    designs = {
        n: (s.layout.replace("A", "S"),) for n, s in teacher.shapes.items() if "A" in s.layout
    }
    text_free = teacher.architecture.swap(**{n: d[0] for n, d in designs.items()})
    for context, exact in ((one, True), (two, False)):
        net = assemble(teacher, build_library(teacher, designs, context=context), text_free)
        c = context.expand(2, -1, -1)
        with torch.no_grad():
            difference = (net(z, t, c).sample - nano(z, t, c).sample).abs().max()
        assert (difference < 1e-4) == exact


def test_whole_block_design_is_the_teacher(nano):
    "A surrogate with the design of its stage inherits every weight."
    teacher = split_into_stages(nano)
    for name, stage in teacher.stages.items():
        copied = build_surrogate(stage, stage.shape.layout)
        assert all(map(torch.equal, copied.state_dict().values(), stage.state_dict().values())), (
            name
        )
        assert copied.skip_indices == stage.skip_indices


def test_teacher_start_beats_random_start_on_narrowing():
    """Keeping the strongest inner channels must leave a smaller error than random ones when weak
    channels carry nothing.
    """
    torch.manual_seed(0)
    stage = split_into_stages(thin(cross_attention_dim=32)).stages["E4"]
    for b in stage.blocks:
        with torch.no_grad():
            b.resnet.conv2.weight[:, ::2] = 0  # every other inner channel is idle
    x = torch.randn(2, 128, 4, 4)
    temb = torch.randn(2, 128)
    c = torch.zeros(2, 1, 32)
    kept = build_surrogate(stage, "RR/2")
    for old, new in zip(stage.blocks, kept.blocks, strict=True):
        assert torch.equal(new.resnet.conv2.weight, old.resnet.conv2.weight[:, 1::2])
    chance = build_surrogate(stage, "RR/2", init="random")
    with torch.no_grad():
        target = stage(x, temb, c)[0]
        errors = [(s(x, temb, c)[0] - target).square().mean() for s in (kept, chance)]
    assert errors[0] < errors[1]


def test_a_decoder_reads_the_skip_of_the_block_it_descends_from(nano):
    """With its body zero, a surrogate is the shortcut of its skip: SD's last-block skips, or the
    first with ^.
    """
    teacher = split_into_stages(nano)
    with torch.no_grad():
        captured = capture_stage_io(
            teacher, torch.randn(1, 16, 16, 16), torch.tensor([1]), null_context(nano, 1)
        )
    args, _ = captured["D2"]
    x, temb, context, skips = args[:4]
    for design, block, index in (("R", 2, 0), ("R^", 0, 2)):
        surrogate = build_surrogate(teacher.stages["D2"], design)
        resnet = surrogate.blocks[0].resnet
        with torch.no_grad():
            resnet.conv2.weight.zero_()
            resnet.conv2.bias.zero_()
            expected = resnet.conv_shortcut(torch.cat([x, skips[index]], 1))
            got = surrogate.without_resampler()(x, temb, context, skips)[0]
        assert surrogate.skip_indices == (index,) and torch.equal(got, expected)
        own = teacher.stages["D2"].blocks[block].resnet.conv_shortcut.weight
        n = skips[index].shape[1]
        assert torch.equal(resnet.conv_shortcut.weight[:, -n:], own[:, -n:])


def test_designs_that_do_not_fit(nano):
    teacher = split_into_stages(nano)
    for stage, design, word in (
        ("E4", "RA", "attention"),
        ("E1", "RRR", "residual"),
        ("E1", "R^", "decoders"),
        ("Mid", "R/3", "divisible"),
    ):
        with pytest.raises(StageError, match=word):
            build_surrogate(teacher.stages[stage], design)
    with pytest.raises(StageError, match="'teacher' or 'random'"):
        build_surrogate(teacher.stages["E1"], "R", init="zeros")
    with pytest.raises(StageError, match="levels"):
        assemble(teacher, build_library(teacher, {}), Architecture.parse("[R-R]-[R-R]", levels=3))


def test_assembled_networks_share_weights_and_copies_do_not(nano, library):
    teacher = split_into_stages(nano)
    net = assemble(teacher, library, PAPER_ARCHITECTURE)
    assert net.conv_in is nano.conv_in and net.stages["E1"] is library.surrogates["E1"]["R"]
    own = trainable_copy(net)
    with torch.no_grad():
        own.conv_out.weight.zero_()
    assert nano.conv_out.weight.abs().sum() > 0 and all(p.requires_grad for p in own.parameters())
    assert teacher.stages["E3"].resampler is not None  # removed from the assembled network only


def test_library_round_trip_and_other_teachers(nano, library, tmp_path):
    teacher = split_into_stages(nano)
    some = {
        "E1": {"R": library.surrogates["E1"]["R"]},
        "D1": {"RSS": library.surrogates["D1"]["RSS"]},
    }
    small = SurrogateLibrary(some, library.removable)
    save_library(tmp_path, small, teacher)
    back = load_library(tmp_path, teacher)
    assert stage_options(teacher, back) == stage_options(teacher, small) and len(back) == 2
    for s, d, m in back:
        assert all(
            map(torch.equal, m.state_dict().values(), small.surrogates[s][d].state_dict().values())
        )
    with pytest.raises(StageError, match="trained with teacher"):
        load_library(tmp_path, split_into_stages(nano_unet(UNetConfig(), 16)))
    damaged = tmp_path / "D1.RSS.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(StoreError, match="truncated"):
        load_library(tmp_path, teacher)
    with pytest.raises(StoreError, match="no surrogate library"):
        load_library(tmp_path / "nowhere", teacher)


def test_checkpoint_folder_of_paper_layout(tmp_path):
    """An SD-1.5-like pipeline folder with a 16-channel AutoencoderKL: saved, loaded, split,
    distilled, assembled.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    save_teacher(
        Teacher(thin(), noise_schedule("epsilon"), LatentAutoencoder(vae)), tmp_path / "sd"
    )
    source = load_teacher_folder(tmp_path / "sd")
    theirs = source.unet.state_dict()
    ours = sd15_unet(16).state_dict()
    assert theirs.keys() == ours.keys()
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in theirs
    teacher = split_into_stages(source.unet.requires_grad_(False))
    with torch.no_grad():
        z = source.vae.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    t = torch.tensor([5, 700])
    c = torch.randn(1, 77, 768).expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(teacher(z, t, c).sample, source.unet(z, t, c).sample)
    paper, text_free = map(Architecture.parse, (PAPER_ARCHITECTURE, TEXT_FREE_PAPER_ARCHITECTURE))
    designs = {n: tuple({o, text_free.by_stage[n]} - {REMOVED}) for n, o in paper.by_stage.items()}
    library = build_library(teacher, designs, context=c[:1])
    losses = distill_surrogates(
        teacher,
        library,
        lambda step: (z, t, c),
        steps=3,
        lr=1e-3,
        options=TrainOptions(tmp_path / "scratch"),
    )
    assert losses.shape == (3, 8) and losses[-1].mean() < losses[0].mean()
    fidelity = Fidelity.draw(teacher, source.schedule, z)
    for a in (paper, text_free):
        assert fidelity(assemble(teacher, library, a)).mean > 0
    save_library(tmp_path / "library", library, teacher)
    again = split_into_stages(load_teacher_folder(tmp_path / "sd").unet)
    assert len(load_library(tmp_path / "library", again)) == 8


def test_baselines_of_equal_size_at_sd15_shape():
    "Parameters of the narrower teacher and of manual pruning at the paper's budget."
    from tocsr.stages.compact_study import ladder_sizes, narrow_config

    unet = sd15_unet(16)
    budget = count_params(unet) / 6.6
    config = narrow_config({k: v for k, v in unet.config.items() if not k.startswith("_")}, budget)
    assert all(
        w % config["norm_num_groups"] == 0 and w % 8 == 0 for w in config["block_out_channels"]
    )
    with torch.device("meta"):
        assert abs(math.log(count_params(UNet2DConditionModel.from_config(config)) / budget)) < 0.05
    sizes = ladder_sizes(split_into_stages(unet))
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert min(abs(math.log(n / budget)) for n in sizes.values()) < 0.1


@pytest.mark.parametrize(
    "name", ["three levels", "two levels", "uneven depth", "plain middle, scale and shift"]
)
def test_the_pruning_ladder_fits_any_unet(name):
    from tocsr.stages.compact_study import ladder_sizes, manually_pruned

    torch.manual_seed(0)
    teacher = split_into_stages(
        UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[name]).eval()
    )
    sizes = ladder_sizes(teacher)
    net = manually_pruned(teacher, min(sizes.values()))
    assert (
        count_params(net) == min(sizes.values()) == sizes[net.architecture] < count_params(teacher)
    )
    with torch.no_grad():
        out = net(
            torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, teacher.config.cross_attention_dim)
        ).sample
    assert out.isfinite().all()
