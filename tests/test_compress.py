"A model of your own: refusals, bounds, the plain diffusers folder, and one call on the whole."

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from typer.testing import CliRunner

import tocsr
import tocsr.stages.compress as stages
from tocsr.cli.main import app
from tocsr.core.config import CompressConfig, UNetConfig, get_profile
from tocsr.core.store import run_stage
from tocsr.core.time_limit import TimeLimitReached
from tocsr.models.architecture import StageError
from tocsr.models.complexity import count_macs, count_params
from tocsr.models.diffusion import nano_unet, predict_epsilon
from tocsr.models.plain_unet import plain_config, to_plain_unet, why_not_plain
from tocsr.models.staged_unet import StagedUNet, capture_stage_io, split_into_stages
from tocsr.models.surrogates import assemble, build_library
from tocsr.search.network import as_architecture, as_vector, surrogate_space
from tocsr.search.space import SearchError, SearchProblem
from tocsr.stages.compress import (
    bounded_problem,
    compress,
    cost_bounds,
    load_model,
    model_fingerprint,
    prepare_model,
    search_within,
)
from tocsr.stages.search_inputs import SearchInputs

THIN = UNetConfig(channels=(8, 16, 16), layers=2, heads=(1, 2, 2), context_dim=12, groups=4)
FAST = dict(
    data=dict(patch=64),
    teacher=dict(eval_samples=4, eval_levels=2),
    surrogates=dict(names=("R", "RR", "RA", "RAA"), steps=2, batch=2),
    search=dict(iterations=2, fidelity_samples=4),
    compact=dict(steps=2, batch=2, weighting="epsilon"),
)


def thin_unet(**changes):
    torch.manual_seed(0)
    return nano_unet(THIN, changes.pop("channels", 4), **changes).eval()


def thin_vae(channels=4):
    torch.manual_seed(1)
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )


@pytest.fixture
def pipeline(tmp_path):
    "The folder of a thin Stable Diffusion with v prediction, and its context."
    root = tmp_path / "sd"
    thin_unet().save_pretrained(root / "unet")
    thin_vae().save_pretrained(root / "vae")
    DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", num_train_timesteps=400
    ).save_pretrained(root / "scheduler")
    np.save(tmp_path / "empty.npy", np.random.default_rng(0).normal(size=(7, 12)))
    return root


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            dict(
                addition_embed_type="text_time",
                projection_class_embeddings_input_dim=24,
                addition_time_embed_dim=4,
            ),
            "addition_embed_type='text_time' is not supported: added conditioning, as in SDXL",
        ),
        (dict(num_class_embeds=10), "num_class_embeds=10 is not supported: class embeddings"),
        (dict(in_channels=9), "reads 9 channels and returns 4.*inpainting"),
        (dict(channels=8), "autoencoder has 4 latent channels, the UNet 8"),
        (dict(center_input_sample=True), "center_input_sample=True is not supported"),
    ],
)
def test_unsupported_unets_are_refused_by_name(changes, reason):
    with pytest.raises(StageError, match=reason):
        load_model(thin_unet(**changes), vae=thin_vae(), scheduler="epsilon")


def test_unsupported_backbones_and_schedulers_are_refused_by_name(tmp_path):
    with pytest.raises(StageError, match="an Identity|a Identity"):
        load_model(torch.nn.Identity(), vae=thin_vae(), scheduler="epsilon")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(StageError, match="StableDiffusion3Pipeline without a unet/: transformer"):
        load_model(tmp_path)
    own = dict(vae=thin_vae())
    with pytest.raises(StageError, match="FlowMatchEulerDiscreteScheduler is not supported"):
        load_model(thin_unet(), scheduler=FlowMatchEulerDiscreteScheduler(), **own)
    with pytest.raises(StageError, match="prediction_type 'sample' is not supported"):
        load_model(thin_unet(), scheduler=DDIMScheduler(prediction_type="sample"), **own)
    with pytest.raises(StageError, match="does not say how it was trained"):
        load_model(thin_unet(), **own)


def test_the_parts_of_a_pipeline_are_taken_as_they_are(pipeline):
    model = load_model(pipeline, context=pipeline.parent / "empty.npy")
    assert model.schedule.config.prediction_type == "v_prediction"
    theirs = DDIMScheduler.from_pretrained(pipeline / "scheduler")
    assert torch.equal(model.schedule.alphas_cumprod, theirs.alphas_cumprod)
    own = thin_unet()
    for name, v in own.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], v)
    z = torch.randn(2, 4, 8, 8)
    t = torch.tensor([3, 390])
    prompt = torch.from_numpy(np.load(pipeline.parent / "empty.npy")).float()
    v = own(z, t, encoder_hidden_states=prompt.expand(2, -1, -1)).sample
    a = theirs.alphas_cumprod[t][:, None, None, None]
    with torch.no_grad():
        eps = predict_epsilon(model.unet, z, t, model.schedule)
    assert torch.allclose(eps, a.sqrt() * v + (1 - a).sqrt() * z, atol=1e-5)


def test_the_fingerprint_follows_weights_context_and_schedule(pipeline):
    keys = {
        model_fingerprint(load_model(pipeline)),
        model_fingerprint(load_model(pipeline, context=torch.ones(7, 12))),
        model_fingerprint(load_model(pipeline, scheduler="epsilon")),
    }
    assert len(keys) == 3
    unet = thin_unet()
    with torch.no_grad():
        unet.conv_out.bias[0] += 1
    changed = load_model(unet, vae=pipeline / "vae", scheduler=pipeline / "scheduler")
    assert model_fingerprint(changed) not in keys
    assert model_fingerprint(load_model(pipeline)) in keys


@pytest.mark.parametrize(
    "architecture",
    [
        "[RARA-RARA-RR]-[RAR]-[RRR-RARARA-RARARA]",
        "[R-RA-RR]-[RAR]-[RRR-RARA-RR]",
        "[RARA-RA-R]-[R]-[RR-RARA-RARARA]",
        "[RARA-RARA-RR]-[RRR-RARARA-RARARA]",
        "[RA-R]-[RR-RARA]",
    ],
)
def test_a_plain_unet_computes_the_same_and_loads_with_diffusers(tmp_path, architecture):
    teacher = split_into_stages(thin_unet())
    options = architecture.replace("[", "").replace("]", "").split("-")
    designs = {n: tuple(set(options) - {s.layout}) for n, s in teacher.shapes.items()}
    designs = {n: tuple(d for d in ds if _fits(d, teacher.shapes[n])) for n, ds in designs.items()}
    net = assemble(teacher, build_library(teacher, designs), architecture).eval()
    assert not why_not_plain(net)
    to_plain_unet(net).save_pretrained(tmp_path)
    plain = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert count_params(plain) == count_params(net)
    for side in (8, 12):
        inputs = torch.randn(2, 4, side, side), torch.tensor([3, 700]), torch.randn(2, 5, 12)
        with torch.no_grad():
            theirs = plain(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample
            assert torch.allclose(theirs, net(*inputs).sample, atol=1e-6)


def _fits(design, shape):
    from tocsr.models.architecture import StageSpec, design_fits

    return design_fits(StageSpec.parse(design), shape)


@pytest.mark.parametrize(
    "architecture, reason",
    [
        ("[R-RA-RR]-[RAR]-[RRR-RARA-R]", "D1 has 1 blocks, E1 has 1"),
        ("[R/2-RARA-RR]-[RAR]-[RRR-RARARA-RR]", "E1 is R/2"),
        ("[RAR-RARA-RR]-[RAR]-[RRR-RARARA-RARARA]", "E1 is RAR"),
        ("[RARA-RARA-RR]-[RS]-[RRR-RARARA-RARARA]", "Mid is RS"),
    ],
)
def test_what_diffusers_has_no_class_for_is_named(architecture, reason):
    net = StagedUNet(unet=dict(thin_unet().config), architecture=architecture)
    assert why_not_plain(net) == reason
    with pytest.raises(ValueError, match=f"no UNet2DConditionModel: {reason}"):
        to_plain_unet(net)


@pytest.fixture(scope="module")
def problem():
    "A search problem with a cheap f_acc, and rows as the stage of the surrogates measures them."
    teacher = split_into_stages(thin_unet())
    library = build_library(teacher)
    space = surrogate_space(teacher, library)
    rng = np.random.default_rng(0)
    scores = np.where(space.valid, rng.uniform(0.1, 1, space.valid.shape), 0.0)
    scores[:, 0] = 0

    def f_acc(a):
        w = scores[np.arange(len(a)), list(a)]
        return float(w.sum() + 0.1 * (w[:-1] * w[1:]).sum())

    args = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.ones(1, 1, 12)
    rows = []
    features = capture_stage_io(teacher, *args)
    for name, own in teacher.stages.items():
        for m in (own, *library.surrogates[name].values()):
            inputs = tuple(
                tuple(s for s in v) if isinstance(v, tuple) else v for v in features[name][0]
            )
            rows.append(dict(stage=name, design=m.spec.name, macs=count_macs(m, *inputs)))
    costs = dict(params=count_params(teacher), macs=count_macs(teacher, *args))
    return SearchProblem(space, f_acc, scores), teacher, library, rows, costs, args


@pytest.mark.parametrize("method", ["structured", "additive", "random"])
def test_the_search_stays_within_bounds_counted_on_the_whole_network(problem, method):
    problem, teacher, library, rows, costs, args = problem
    bounds = dict(params=costs["params"] / 3, macs=costs["macs"] / 2)
    bounded = bounded_problem(problem, bounds, rows, costs)
    found = search_within(bounded, method, 12)
    errors = [e.f_acc for e in found]
    assert errors == sorted(errors) and len({e.arch for e in found}) >= 8
    for e in found[:4]:
        net = assemble(teacher, library, as_architecture(problem.space, e.arch))
        assert count_params(net) <= bounds["params"]
        assert count_macs(net, *args) <= bounds["macs"] * (1 + 1e-9)
        assert as_vector(problem.space, net.architecture) == e.arch


def test_measured_latency_is_a_bound_like_the_others(problem):
    "With made-up milliseconds per stage, 5 of them outside of the stages."
    problem, _, _, rows, costs, _ = problem
    names = list(problem.space.stages)
    ms = {(r["stage"], r["design"]): 1 + 20 * r["macs"] / costs["macs"] for r in rows}
    timed = [r | dict(latency_ms=ms[r["stage"], r["design"]]) for r in rows]
    own = {n: ms[n, options[0]] for n, options in problem.space.stages.items()}
    measured = costs | dict(latency_ms=5 + sum(own.values()))
    bound = 0.7 * measured["latency_ms"]
    bounded = bounded_problem(problem, dict(latency_ms=bound), timed, measured)
    for e in search_within(bounded, "additive", 8):
        chosen = [problem.space.stages[n][o] for n, o in zip(names, e.arch)]
        total = 5 + sum(ms.get((n, o), 0.0) for n, o in zip(names, chosen))
        assert total <= bound * (1 + 1e-9)
    with pytest.raises(SearchError, match="latency_ms <= 5 cannot be met"):
        bounded_problem(problem, dict(latency_ms=5.0), timed, measured)


def test_a_candidate_over_the_bound_when_measured_as_a_whole_is_passed_over(problem, monkeypatch):
    problem, teacher, library, rows, costs, args = problem
    bounded = bounded_problem(problem, dict(params=costs["params"] / 2), rows, costs)
    found = search_within(bounded, "additive", 6)
    inputs = SearchInputs(teacher, library, None, args[0])
    times = iter((9.0, 7.0, 4.0))

    def measure(net, latents):
        return dict(params=count_params(net), latency_ms=next(times))

    monkeypatch.setattr(stages, "measure_costs", measure)
    best, measured = stages._accept(problem, inputs, found, dict(latency_ms=5.0))
    assert best is found[2] and measured["latency_ms"] == 4.0
    times = iter([9.0] * 10)
    with pytest.raises(SearchError, match="latency_ms 9 > 5"):
        stages._accept(problem, inputs, found, dict(latency_ms=5.0))


def test_the_search_finds_the_best_of_a_small_space(problem):
    "Against brute force over all architectures."
    problem, teacher, _, rows, costs, _ = problem
    names = list(problem.space.stages)
    small = {n: o[:3] if n in names[:4] else o[:1] for n, o in problem.space.stages.items()}
    space = replace(problem.space, stages=small)
    small_problem = replace(problem, space=space)
    small_problem = replace(
        small_problem, substitution_scores=np.where(space.valid, problem.weights[:, :3], 0)
    )
    bounded = bounded_problem(small_problem, dict(params=0.85 * costs["params"]), rows, costs)
    everything = bounded.all_vectors
    best = min(problem.f_acc(tuple(a)) for a in everything)
    found = search_within(bounded, "structured", 24)
    assert found[0].f_acc == pytest.approx(best)


def test_bounds_that_cannot_be_met_are_refused(problem):
    problem, _, _, rows, costs, _ = problem
    with pytest.raises(SearchError, match="params <= 10 cannot be met: the smallest architecture"):
        bounded_problem(problem, dict(params=10), rows, costs)
    loose = bounded_problem(problem, dict(params=2 * costs["params"]), rows, costs)
    with pytest.raises(SearchError, match="the model itself is within the bounds"):
        search_within(loose, "structured", 4)
    assert cost_bounds(CompressConfig(target_ratio=4.0, macs=3.0), dict(params=8.0)) == dict(
        params=2.0, macs=3.0
    )


def test_one_call_from_a_folder_to_a_compact_model(pipeline, tmp_path, capsys):
    context = pipeline.parent / "empty.npy"
    args = dict(context=context, target_ratio=2.5, profile="smoke", output=tmp_path / "out", **FAST)
    result = tocsr.compress(pipeline, "embedded", **args)
    rows = result.results["rows"]
    assert rows["model"]["params"] == count_params(thin_unet())
    assert rows["compact"]["params"] == count_params(result.unet)
    assert rows["model"]["params"] / rows["compact"]["params"] >= 2.5
    assert rows["model"]["f_acc"] == 0 < rows["assembled"]["f_acc"]
    assert rows["assembled"]["f_acc"] == pytest.approx(result.search["f_acc"], rel=1e-4)
    assert "| parameters (M) |" in capsys.readouterr().out
    unet = StagedUNet.from_pretrained(tmp_path / "out/unet")
    prompt = torch.from_numpy(np.load(context)).float()
    assert torch.allclose(unet.fixed_context[0], prompt)
    config = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["num_train_timesteps"] == 400
    assert AutoencoderKL.from_pretrained(tmp_path / "out/vae").config.latent_channels == 4
    card = (tmp_path / "out/README.md").read_text()
    assert result.results["architecture"] in card and result.table in card
    assert len(result.curve) == 2 and f"| 2 | {result.curve[1]:.5f} |" in card
    begin = time.perf_counter()
    again = compress(pipeline, "embedded", **args, show=False)  # from the store
    assert again.results == result.results and time.perf_counter() - begin < 30


def test_a_time_limit_stops_and_the_next_call_continues(pipeline, tmp_path):
    args = dict(target_ratio=2.5, profile="smoke", show=False, **FAST)
    with pytest.raises(TimeLimitReached):
        compress(pipeline, "embedded", time_limit=0.0, **args)
    p = get_profile("smoke", **FAST)
    model = prepare_model(load_model(pipeline))
    p = replace(p, compress=replace(model, target_ratio=2.5))
    p = replace(p, data=replace(p.data, source="embedded"))
    surrogates = run_stage("compress_surrogates", p)  # a stage by itself
    result = compress(pipeline, "embedded", output=tmp_path / "out", **args)
    assert result.folder.is_dir() and run_stage("compress_surrogates", p).key == surrogates.key


def test_a_foreign_folder_is_not_overwritten(pipeline, tmp_path):
    from tocsr.stages.compress import Compressed, write_model

    (tmp_path / "notes.txt").write_text("mine")
    empty = Compressed(tmp_path, None, None, None, {}, {}, [])
    with pytest.raises(StageError, match="was not written by compress"):
        write_model(tmp_path, empty, get_profile("smoke"))


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(at_most=dict(memory=1)), "unknown memory; choose from params, macs, latency_ms"),
        (dict(at_most=dict(params=1), target_ratio=2.0), "not both"),
        (dict(target_ratio=0.5), "above 1"),
    ],
)
def test_bounds_are_checked_before_anything_runs(pipeline, options, reason):
    with pytest.raises(ValueError, match=reason):
        compress(pipeline, "embedded", profile="smoke", **options)


def test_the_command_reports_errors_in_one_line(pipeline, tmp_path):
    def call(*args):
        return CliRunner().invoke(app, ["compress", *args])

    out = ["--out", str(tmp_path / "out"), "--profile", "smoke"]
    bad = call(str(pipeline), "embedded", *out, "--max-params", "many")
    assert bad.exit_code == 2 and "--max-params 'many'" in bad.output
    bad = call(str(pipeline / "unet"), "embedded", *out, "--vae", str(pipeline / "vae"))
    assert bad.exit_code == 1 and "does not say how it was trained" in bad.output
    assert len(bad.output.strip().splitlines()) == 1


def test_the_plain_configuration_keeps_what_differs_by_level():
    net = StagedUNet(unet=dict(thin_unet().config), architecture="[RA-R]-[RR-RARA]")
    config = plain_config(net)
    assert config["block_out_channels"] == [8, 16] and config["attention_head_dim"] == [1, 2]
    assert config["layers_per_block"] == [1, 1] and config["mid_block_type"] is None
