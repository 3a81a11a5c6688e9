"Stages, surrogates and their cost: the paper's numbers, any UNet, real checkpoint layouts, and errors that say what is wrong."
import json
import math
import random
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from tocsr.complexity import count_macs, count_params, macs_by_kind, part_costs, sd15_unet, unet_inputs
from tocsr.diffusion import nano_unet, noise_schedule, null_context
from tocsr.expansion import Teacher, read_teacher, save_teacher
from tocsr.latents import LatentCodec
from tocsr.profiles import UNetConfig
from tocsr.store import StoreError
from tocsr.surrogates import (OUR_PAPER_ARCHITECTURE, PAPER_ARCHITECTURE, REMOVED, Architecture, Fidelity, Library, StageError, StageSpec, architecture_params, assemble,
                              build_network, build_surrogate, cut, default_designs, distill, distill_shared, fwkd_overhead, load_library, load_network, options, overhead_claim,
                              owners, paper_readings, save_library, save_network, shard, single_swaps, surrogate_library, trainable_copy)
from tocsr.training import TrainingError, step_generator


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return nano_unet(UNetConfig(), 16).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def library(nano):
    return surrogate_library(cut(nano), context=null_context(nano, 1))


def thin(**changes):
    "SD 1.5's topology, key names and head count, as thin as its group norms allow."
    torch.manual_seed(1)
    return UNet2DConditionModel(**{**dict(sample_size=64, in_channels=16, out_channels=16, block_out_channels=(32, 64, 128, 128), cross_attention_dim=768, attention_head_dim=8), **changes}).eval()


UNETS = {
    "three levels": dict(block_out_channels=(32, 64, 128), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
                         down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")),
    "two levels": dict(block_out_channels=(32, 32), cross_attention_dim=16, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    "uneven depth": dict(block_out_channels=(32, 64, 64), layers_per_block=(1, 3, 2), cross_attention_dim=16, attention_head_dim=2,
                         down_block_types=("CrossAttnDownBlock2D",)*3, up_block_types=("CrossAttnUpBlock2D",)*3),
    "SD 2 style": dict(block_out_channels=(32, 64, 64, 64), cross_attention_dim=32, attention_head_dim=(1, 2, 2, 2), use_linear_projection=True, upcast_attention=True),
    "plain middle, scale and shift": dict(block_out_channels=(32, 32), cross_attention_dim=16, mid_block_type="UNetMidBlock2D", resnet_time_scale_shift="scale_shift",
                                          down_block_types=("DownBlock2D",)*2, up_block_types=("UpBlock2D",)*2),
    "deep attention": dict(block_out_channels=(32, 64, 64), cross_attention_dim=16, attention_head_dim=2, transformer_layers_per_block=2,
                           down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")),
}


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (10, 13)])
def test_cut_is_bitwise_the_same(name, size):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[name]).eval()
    z, t, c = torch.randn(2, 4, *size), torch.tensor([1, 900]), torch.randn(2, 3, unet.config.cross_attention_dim)
    with torch.no_grad():
        a, b = unet(z, t, c).sample, cut(unet)(z, t, c).sample
        assert torch.equal(a, b)
        assert torch.equal(unet(z, 7, c, return_dict=False)[0], cut(unet)(z, 7, c, return_dict=False)[0])
    assert count_params(cut(unet)) == count_params(unet)


@pytest.mark.parametrize("name", UNETS)
def test_any_vector_assembles(name):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[name]).eval()
    teacher = cut(unet)
    library = surrogate_library(teacher)
    rng, space = random.Random(name), options(teacher, library)
    z, c = torch.randn(1, 4, 10, 13), torch.randn(1, 3, unet.config.cross_attention_dim)
    for _ in range(12):
        a = Architecture(tuple(rng.choice(o) for o in space.values()))
        net = assemble(teacher, library, a)
        with torch.no_grad(): out = net(z, 5, c).sample
        assert out.shape == z.shape and out.isfinite().all()
        assert count_params(net) == architecture_params(teacher, library, a) == count_params(build_network(dict(unet.config), a))
        assert Architecture.parse(str(a), teacher.levels) == a == net.architecture


def test_removal_needs_equal_channels():
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS["three levels"])
    library = surrogate_library(teacher := cut(unet))
    assert library.removable == ("Mid", "D3")       # E3 widens from 64 to 128
    with pytest.raises(StageError, match="E3 has no option 'none'"): assemble(teacher, library, teacher.architecture.swap(E3=REMOVED))


def test_sd15_shape_on_meta():
    unet = sd15_unet(16)
    teacher = cut(unet)
    inputs = unet_inputs(unet, side=32)
    with torch.no_grad(): assert teacher(*inputs).sample.shape == unet(*inputs).sample.shape == (1, 16, 32, 32)
    assert count_params(teacher) == count_params(unet) and count_macs(teacher, *inputs) == count_macs(unet, *inputs)
    assert str(teacher.architecture) == "[RARA-RARA-RARA-RR]-[RAR]-[RRR-RARARA-RARARA-RARARA]"
    library = surrogate_library(teacher)
    assert [len(library.surrogates[s]) for s in teacher.shapes] == [4, 4, 4, 4, 6, 4, 4, 4, 4]
    rng, space = random.Random(0), options(teacher, library)
    for _ in range(3):
        net = assemble(teacher, library, Architecture(tuple(rng.choice(o) for o in space.values())))
        with torch.no_grad(): assert net(*inputs).sample.shape == (1, 16, 32, 32)


# What METHOD counted: parameters in millions, GMACs at 64x64 latents and 77 tokens
@pytest.mark.parametrize("architecture,params,gmacs", [
    ("[R-R-R]-[R^-RA^-RAA^]", 143.24, 145.3), ("[R-R-R]-[R^-RS^-RSS^]", 140.04, 142.1), (PAPER_ARCHITECTURE, 133.00, 141.1), (OUR_PAPER_ARCHITECTURE, 129.80, 137.9)])
def test_paper_network_at_sd15_shape(architecture, params, gmacs):
    row = {r["architecture"]: r for r in paper_readings()}[architecture]
    assert row["params"]/1e6 == pytest.approx(params, rel=1e-3) and row["macs"]/1e9 == pytest.approx(gmacs, rel=1e-3)


def test_table_1_total():
    with torch.device("meta"): tiny = AutoencoderTiny(latent_channels=16)
    image, latent = torch.empty(1, 3, 512, 512, device="meta"), torch.empty(1, 16, 64, 64, device="meta")
    autoencoder = count_macs(tiny.encoder, image) + count_macs(tiny.decoder, latent)
    net = build_network(dict(sd15_unet(16).config), PAPER_ARCHITECTURE)
    assert (autoencoder + count_macs(net, *unet_inputs(net)))/1e9 == pytest.approx(273.0, rel=1e-3)


def test_counters_agree(nano, library):
    teacher = cut(nano)
    nets = [(nano, 16), (assemble(teacher, library, PAPER_ARCHITECTURE), 16), (sd15_unet(4), 64), (build_network(dict(sd15_unet(16).config), OUR_PAPER_ARCHITECTURE), 64)]
    for net, side in nets:
        inputs = unet_inputs(net, side, tokens=77)
        by_hand = sum(macs_by_kind(net, *inputs).values())
        assert by_hand == pytest.approx(count_macs(net, *inputs), rel=0.01)
        assert sum(r["macs"] + r["attention"] for r in part_costs(net, *inputs)) == by_hand
    assert count_params(sd15_unet(4)) == 859_520_964 and count_params(nano) == pytest.approx(8.6e6, rel=0.005)
    assert count_macs(nano, *unet_inputs(nano, 16, tokens=1)) == pytest.approx(0.24e9, rel=0.02)


def test_counting_leaves_the_module_alone(nano):
    before = {k: v.clone() for k, v in nano.state_dict().items()}
    count_macs(nano, *unet_inputs(nano, 8))
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in nano.state_dict().items())


@pytest.mark.parametrize("change,word", [
    (dict(class_embed_type="timestep"), "class_embed_type"), (dict(num_class_embeds=3), "num_class_embeds"), (dict(time_cond_proj_dim=8), "time_cond_proj_dim"),
    (dict(dual_cross_attention=True), "dual_cross_attention"), (dict(center_input_sample=True), "center_input_sample"), (dict(attention_type="gated"), "attention_type"),
    (dict(mid_block_type=None), "mid_block_type"), (dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "UNetMidBlock2DSimpleCrossAttn"),
    (dict(down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")), "AttnDownBlock2D")])
def test_unknown_features_are_named(change, word):
    with pytest.raises(StageError, match=word): cut(thin(cross_attention_dim=32, **change))


def test_s_is_exact_for_one_token_and_not_for_two(nano):
    teacher = cut(nano)
    z, t = torch.randn(2, 16, 16, 16), torch.tensor([20, 800])
    one, two = torch.randn(1, 1, 64), torch.randn(1, 2, 64)*10
    for context, exact in ((one, True), (two, False)):
        designs = {n: (s.layout.replace("A", "S"),) for n, s in teacher.shapes.items() if "A" in s.layout}
        library = surrogate_library(teacher, designs, context=context)
        a = teacher.architecture.swap(**{n: d[0] for n, d in designs.items()})
        with torch.no_grad(): gap = (assemble(teacher, library, a)(z, t, context.expand(2, -1, -1)).sample - nano(z, t, context.expand(2, -1, -1)).sample).abs().max()
        assert (gap < 1e-4) == exact


def test_whole_block_design_is_the_teacher(nano):
    "Built by the builder from its own letters, every stage inherits every weight."
    teacher = cut(nano)
    for name, stage in teacher.stages.items():
        copied = build_surrogate(stage, stage.shape.layout)
        assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), stage.state_dict().values())), name
        assert copied.slots == stage.slots


def test_teacher_start_beats_random_start_on_narrowing():
    "Keeping the strongest inner channels must leave a smaller error than random ones when weak channels carry nothing."
    torch.manual_seed(0)
    teacher = cut(thin(cross_attention_dim=32))
    stage = teacher.stages["E4"]
    for b in stage.blocks:
        with torch.no_grad(): b.resnet.conv2.weight[:, ::2] = 0      # every other inner channel is idle
    x, temb, c = torch.randn(2, 128, 4, 4), torch.randn(2, 128), torch.zeros(2, 1, 32)
    kept = build_surrogate(stage, "RR/2")
    for old, new in zip(stage.blocks, kept.blocks): assert torch.equal(new.resnet.conv2.weight, old.resnet.conv2.weight[:, 1::2])
    chance = build_surrogate(stage, "RR/2", init="random")
    with torch.no_grad():
        target = stage(x, temb, c)[0]
        error = lambda s: (s(x, temb, c)[0] - target).pow(2).mean()
        assert error(kept) < error(chance)


def test_designs_that_do_not_fit(nano):
    teacher = cut(nano)
    for stage, design, word in (("E4", "RA", "attention"), ("E1", "RRR", "residual"), ("E1", "R^", "decoders"), ("Mid", "R/3", "divided")):
        with pytest.raises(StageError, match=word): build_surrogate(teacher.stages[stage], design)
    with pytest.raises(StageError, match="'teacher' or 'random'"): build_surrogate(teacher.stages["E1"], "R", init="zeros")
    for bad in ("", "AR", "R//2", "r", "R/0"):
        with pytest.raises(StageError): StageSpec.parse(bad)
    for bad in ("", "R-R", "[R-R-R]", "[R-R-R][R-R-R]", "[R-R-R]-[R-R]", "[R-R-X]-[R-R-R]", "[R-R-R]-[R-R]-[R-R-R]"):
        with pytest.raises(StageError): Architecture.parse(bad)


def test_library_round_trip_and_strangers(nano, library, tmp_path):
    teacher = cut(nano)
    small = Library({"E1": {"R": library.surrogates["E1"]["R"]}, "D1": {"RSS": library.surrogates["D1"]["RSS"]}}, library.removable)
    save_library(tmp_path, small, teacher)
    back = load_library(tmp_path, teacher)
    assert options(teacher, back) == options(teacher, small) and len(back) == 2
    for s, n, m in back: assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), small.surrogates[s][n].state_dict().values()))
    with pytest.raises(StageError, match="trained for teacher"): load_library(tmp_path, cut(nano_unet(UNetConfig(), 16)))
    damaged = tmp_path/"D1.RSS.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(StoreError, match="truncated"): load_library(tmp_path, teacher)
    with pytest.raises(StoreError, match="no surrogate library"): load_library(tmp_path/"nowhere", teacher)


def test_network_round_trip(nano, library, tmp_path):
    teacher = cut(nano)
    net = assemble(teacher, library, "[R-RSRS/2-RARA]-[R/2]-[R-R-RA-RSS]")
    z, t, c = torch.randn(2, 16, 16, 16), torch.tensor([1, 2]), null_context(nano, 2)
    with torch.no_grad(): assert torch.equal(load_network(save_network(tmp_path, net))(z, t, c).sample, net(z, t, c).sample)
    assert json.loads((tmp_path/"config.json").read_text())["architecture"] == "[R-RSRS/2-RARA]-[R/2]-[R-R-RA-RSS]"
    own = trainable_copy(net)
    own(z, t, c).sample.sum().backward()
    assert own.conv_in.weight.grad is not None and nano.conv_in.weight.grad is None
    (tmp_path/"config.json").write_text("{}")
    with pytest.raises(StoreError, match="config"): load_network(tmp_path)


def toy_batch(unet, size=8):
    def batch(step):
        g = step_generator(0, step)
        return torch.randn(2, 16, size, size, generator=g), torch.randint(1000, (2,), generator=g), null_context(unet, 2)
    return batch


def test_distillation_is_independent_and_resumes(nano, tmp_path):
    teacher = cut(nano)
    def train(stages, folder, kill_at=None, steps=5):
        source = toy_batch(nano)
        def batch(step):
            if step == kill_at: raise KeyboardInterrupt
            return source(step)
        library = surrogate_library(teacher, {s: ("R",) for s in stages})
        return library, distill(teacher, library, batch, steps, 1e-3, folder, checkpoint_s=0)
    three, losses = train(("E1", "Mid", "D2"), tmp_path)
    alone, own = train(("Mid",), tmp_path)
    assert torch.equal(losses[:, 1], own[:, 0])
    with pytest.raises(KeyboardInterrupt): train(("E1", "Mid", "D2"), tmp_path, kill_at=3)
    resumed, losses2 = train(("E1", "Mid", "D2"), tmp_path)
    assert torch.equal(losses, losses2) and not list(tmp_path.iterdir())
    for (_, _, a), (_, _, b) in zip(three, resumed): assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert all(p.grad is None for p in nano.parameters())


def test_a_loss_that_is_not_finite_names_its_surrogate(nano, tmp_path):
    teacher = cut(nano)
    library = surrogate_library(teacher, {"E1": ("R",), "D4": ("RR", "R")})
    with torch.no_grad(): library.surrogates["D4"]["R"].blocks[0].resnet.conv2.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="D4 R is not finite at step 0"): distill(teacher, library, toy_batch(nano), 2, 1e-3, tmp_path)


def test_fidelity(nano, library):
    teacher = cut(nano)
    latents = torch.randn(20, 16, 8, 8)
    for prediction in ("epsilon", "v_prediction"):
        fidelity = Fidelity.draw(teacher, noise_schedule(prediction), latents, seed=3, batch=7)
        assert fidelity(nano).mean == 0
        r = fidelity(assemble(teacher, library, PAPER_ARCHITECTURE))
        assert r.mean > 0 and r.interval()[0] < r.mean and r.normalised == pytest.approx(r.mean/fidelity.target.pow(2).mean().item())
        assert fidelity(assemble(teacher, library, PAPER_ARCHITECTURE)) == r
        assert Fidelity.draw(teacher, noise_schedule(prediction), latents, seed=3, batch=20)(assemble(teacher, library, PAPER_ARCHITECTURE)).mean == pytest.approx(r.mean, rel=1e-4)
    swaps = single_swaps(fidelity, teacher, Library({"E1": library.surrogates["E1"]}, ("E4",)))
    assert set(swaps["E1"]) == set(default_designs(teacher.shapes["E1"])) and set(swaps["E4"]) == {REMOVED} and swaps["D1"] == {}
    broken = trainable_copy(teacher)
    with torch.no_grad(): broken.conv_out.bias.fill_(float("inf"))
    with pytest.raises(StageError, match="not finite"): fidelity(broken)


def test_checkpoint_folder_of_paper_layout(tmp_path):
    "An SD-1.5-like pipeline folder with a 16-channel AutoencoderKL: saved, loaded, cut, distilled, assembled."
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=16, block_out_channels=(32,)*4, down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4, layers_per_block=1,
                        scaling_factor=0.3611, shift_factor=0.1159)
    save_teacher(Teacher(thin(), noise_schedule("epsilon"), LatentCodec(vae)), tmp_path/"sd")
    source = read_teacher(tmp_path/"sd")
    theirs, ours = source.unet.state_dict(), sd15_unet(16).state_dict()
    assert theirs.keys() == ours.keys() and "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in theirs
    teacher = cut(source.unet.requires_grad_(False))
    with torch.no_grad(): z = source.codec.encode(torch.rand(2, 3, 64, 64)*2 - 1)
    t, c = torch.tensor([5, 700]), torch.randn(1, 77, 768).expand(2, -1, -1)
    with torch.no_grad(): assert torch.equal(teacher(z, t, c).sample, source.unet(z, t, c).sample)
    paper, ours = (Architecture.parse(a) for a in (PAPER_ARCHITECTURE, OUR_PAPER_ARCHITECTURE))
    designs = {n: tuple({o, ours.by_stage[n]} - {REMOVED}) for n, o in paper.by_stage.items()}
    library = surrogate_library(teacher, designs, context=c[:1])
    losses = distill(teacher, library, lambda step: (z, t, c), 3, 1e-3, tmp_path)
    assert losses.shape == (3, 8) and losses[-1].mean() < losses[0].mean()
    fidelity = Fidelity.draw(teacher, source.schedule, z)
    for a in (paper, ours): assert fidelity(assemble(teacher, library, a)).mean > 0
    save_library(tmp_path/"library", library, teacher)
    assert len(load_library(tmp_path/"library", cut(read_teacher(tmp_path/"sd").unet))) == 8


def test_every_surrogate_has_one_owner_and_work_is_even(library):
    for world in (1, 2, 4):
        parts = [shard(library, r, world) for r in range(world)]
        names = [(s, n) for part in parts for s, n, _ in part]
        assert sorted(names) == sorted((s, n) for s, n, _ in library) and len(set(names)) == len(names)
        work = [sum(count_params(m)*4.0**-m.shape.level for _, _, m in part) for part in parts]
        assert max(work) <= 1.3*sum(work)/world
    assert owners(library, 3) == owners(library, 3)


def test_more_processes_than_surrogates_is_an_error(nano, monkeypatch, tmp_path):
    from types import SimpleNamespace
    monkeypatch.setenv("WORLD_SIZE", "3"); monkeypatch.setattr("tocsr.surrogates.connect", lambda: None)
    monkeypatch.setattr("tocsr.surrogates.PartialState", lambda **kw: SimpleNamespace(process_index=0, num_processes=3, device=torch.device("cpu")))
    few = surrogate_library(cut(nano), {"Mid": ("R",), "D4": ("R/2",)})
    with pytest.raises(StageError, match="3 processes for 2 surrogates"): distill_shared(cut(nano), few, None, 1, 1e-3, tmp_path)


def test_overhead_is_measured_without_training(nano):
    few = surrogate_library(cut(nano), {"Mid": ("R",), "D4": ("R/2",)})
    before = {k: v.clone() for k, v in few.surrogates["D4"]["R/2"].state_dict().items()}
    cost = fwkd_overhead(cut(nano), few, lambda i: (torch.randn(2, 16, 8, 8), torch.tensor([1, 900]), null_context(nano, 2)), rounds=3)
    assert all(torch.equal(v, before[k]) for k, v in few.surrogates["D4"]["R/2"].state_dict().items())
    claim = overhead_claim(dict(overhead=cost, surrogates=2))
    assert claim["ours"] == cost["overhead"] and claim["spread"][0] <= claim["ours"] <= claim["spread"][1] and "bar 2.5" in claim["reason"]
    assert not any(p.requires_grad for _, _, m in few for p in m.parameters())


def test_rivals_of_equal_size_at_sd15_shape():
    "The narrowed teacher and the hand-made removal at the paper's budget, counted."
    from tocsr.ablations import ladder_sizes, narrow_config
    unet = sd15_unet(16)
    budget = count_params(unet)/6.6
    config = narrow_config({k: v for k, v in unet.config.items() if not k.startswith("_")}, budget)
    assert all(w % config["norm_num_groups"] == 0 and w % 8 == 0 for w in config["block_out_channels"])
    with torch.device("meta"): assert abs(math.log(count_params(UNet2DConditionModel.from_config(config))/budget)) < 0.05
    sizes = ladder_sizes(cut(unet))
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True) and min(abs(math.log(n/budget)) for n in sizes.values()) < 0.1


@pytest.mark.parametrize("name", ["three levels", "two levels", "uneven depth", "plain middle, scale and shift"])
def test_the_hand_made_ladder_fits_any_unet(name):
    from tocsr.ablations import hand_made, ladder_sizes
    torch.manual_seed(0)
    teacher = cut(UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[name]).eval())
    sizes = ladder_sizes(teacher)
    net = hand_made(teacher, min(sizes.values()))
    assert count_params(net) == min(sizes.values()) == sizes[net.architecture] < count_params(teacher)
    with torch.no_grad(): assert net(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, teacher.config.cross_attention_dim)).sample.isfinite().all()
