"The two ways through the method: one table of plain fields, and pairs that are new at every step."

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tocsr.core import config
from tocsr.core.config import (
    PROFILES,
    WAY_TABLE,
    ProfileError,
    get_profile,
    override,
    way_departures,
)
from tocsr.core.store import TrainOptions
from tocsr.data.degradations import degrade_images
from tocsr.data.images import load_photos
from tocsr.data.pairs import FreshPairs, make_pairs
from tocsr.models.autoencoder import LatentAutoencoder, fit_pca
from tocsr.models.diffusion import ddim_sample, nano_unet, noise_schedule
from tocsr.models.generator import OneStepGenerator, SRModel, add_condition_channels, one_step
from tocsr.models.staged_unet import split_into_stages
from tocsr.stages.adaptation import load_pair_pool, train_multistep
from tocsr.stages.onestep import FreshTargets, distill_to_one_step
from tocsr.stages.student_recipes import PAPER_RECIPE, student_recipes

THIN = config.UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
# the paper's choices (METHOD: sections 1 to 3), typed here once more
PAPER = {
    "teacher.prediction": "epsilon",
    "teacher.weighting": "epsilon",
    "teacher.expansion": "v2",
    "teacher.lam_vae": 0,
    "search.method": "paper",
    "search.select": "nearest",
    "compact.variants": ("paper",),
    "adapt.variants": ("paper",),
    "adapt.fresh_pairs": True,
    "onestep.students": ("paper",),
    "onestep.fresh_noise": True,
    "onestep.consistency": False,
}


def value(profile, path):
    part, name = path.split(".")
    return getattr(getattr(profile, part), name)


@pytest.mark.parametrize("name", PROFILES)
def test_the_papers_way_in_every_profile(name):
    p = get_profile(name, "paper")
    assert p.way == "paper" and {k: value(p, k) for k in PAPER} == PAPER
    assert way_departures(p) == {}


@pytest.mark.parametrize("name", PROFILES)
def test_our_way_is_the_profile_as_it_is_built(name):
    assert get_profile(name, "ours") == config._BUILDERS[name]()
    assert override(get_profile(name, "paper"), way="ours") == get_profile(name, "ours")
    assert get_profile(name).way == ("paper" if name == "paper" else "ours")


def test_every_row_of_the_table_changes_its_field_and_has_a_reason():
    paths = [row.field for row in WAY_TABLE]
    assert len(set(paths)) == len(paths)
    ours, paper = get_profile("release", "ours"), get_profile("release", "paper")
    # in release: from scratch, no bundled model, no color jitter, no ablation of the one-step
    # losses; the bridge did not win
    equal = {"onestep.compare_bundled", "teacher.start", "compact.start", "teacher.expansion"}
    equal |= {"teacher.jitter", "onestep.ablation", "onestep.regression"}
    same = {p for p in paths if value(ours, p) == value(paper, p)}
    assert same <= equal
    assert all(len(row.reason) > 20 for row in WAY_TABLE)
    changed = {
        f
        for part in ("teacher", "search", "compact", "adapt", "onestep", "autoencoder")
        for f in _differences(ours, paper, part)
    }
    assert changed == set(paths) - same


def _differences(a, b, part):
    a, b = vars(getattr(a, part)), vars(getattr(b, part))
    return [f"{part}.{k}" for k in a if a[k] != b[k]]


def test_overrides_win_and_are_listed():
    p = get_profile("cpu", "paper", teacher=dict(expansion="bridge", batch=3))
    assert p.teacher.expansion == "bridge" and p.teacher.batch == 3 and p.teacher.lam_vae == 0
    assert way_departures(p) == {"teacher.expansion": ("v2", "bridge")}
    assert override(p, teacher=dict(lr=1.0)).teacher.expansion == "bridge"
    with pytest.raises(ProfileError, match="choose one of ours, paper"):
        get_profile("cpu", "theirs")


def test_results_of_changed_profiles_have_a_folder_of_their_own(monkeypatch, tmp_path):
    from tocsr.evaluation.plots import figures_dir

    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setenv("TOCSR_RUNS", str(tmp_path))
    names = [
        figures_dir(p).name
        for p in (
            get_profile("cpu"),
            get_profile("cpu", data=dict(source="/photos")),
            get_profile("cpu", "paper"),
            get_profile("cpu", data=dict(scale=3)),
        )
    ]
    assert names[:3] == ["paper_figures", "paper_figures", "cpu-paper"]
    assert names[3].startswith("cpu-") and len(names[3]) == 12


def test_stages_read_fields_and_not_the_way():
    from pathlib import Path

    import tocsr

    for file in (Path(tocsr.__file__).parent / "stages").glob("*.py"):
        text = file.read_text()
        assert ".way" not in text and "WAY_TABLE" not in text, file.name


@pytest.fixture(scope="module")
def photos():
    return load_photos(config.DataConfig(patch=64)).split("train")


@pytest.fixture(scope="module")
def vae(photos):
    crops = photos.crops(12, 128, torch.Generator().manual_seed(0))
    return LatentAutoencoder(fit_pca(crops, 16)).eval()


def fresh(vae, photos, **changes):
    options = dict(degradation="bicubic", patch=64, scale=4, seed=1) | changes
    return FreshPairs(vae, photos, **options)


def test_fresh_pairs_are_those_of_a_pool_and_never_the_same(tmp_path, vae, photos):
    pairs = fresh(vae, photos, degradation="realesrgan")
    pool = make_pairs(tmp_path, vae, photos, 6, degradation="realesrgan", patch=64, seed=1)
    drawn = [pairs.draw(step, 2, None) for step in range(3)]
    for name in ("hr", "lr"):
        stored = getattr(pool.first(6), name)
        assert (torch.cat([d[name] for d in drawn]) - stored).abs().max() < 1 / 127
    _, _, z_h, z_l = pairs.encode(drawn[1])
    assert (z_h - pool.batch([2, 3]).z_h).abs().max() < 0.05  # 8 bits and half precision
    assert (z_l - pool.batch([2, 3]).z_l).abs().max() < 0.05
    seen = torch.cat([d["hr"].flatten(1) for d in drawn])
    assert len(torch.unique(seen, dim=0)) == 6
    assert pool.latent_shape(pool.images([0, 1])) == pairs.latent_shape(drawn[0])


def test_processes_draw_different_pairs(vae, photos, monkeypatch):
    import tocsr.data.pairs as module

    pairs = fresh(vae, photos)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    images = []
    for rank in (0, 1):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        images += [pairs.draw(step, 2, None)["hr"] for step in (0, 1)]
    assert len(torch.unique(torch.cat(images).flatten(1), dim=0)) == 8


def test_bicubic_by_three_runs_for_any_patch(vae, photos):
    pairs = fresh(vae, photos, scale=3)
    batch = pairs.draw(0, 2, None)
    assert batch["hr"].shape[-1] == 48 and batch["lr"].shape[-1] == 16  # a multiple of 24
    assert torch.equal(batch["lr"], degrade_images(batch["hr"], "bicubic", 3))
    _, _, z_h, z_l = pairs.encode(batch)
    assert z_h.shape == z_l.shape == (2, 16, 6, 6)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return add_condition_channels(split_into_stages(nano_unet(THIN, 16)), 16).eval()


def test_training_on_fresh_pairs_is_resumed_exactly(tmp_path, vae, photos, unet):
    cfg = config.AdaptConfig(steps=4, batch=2, lr=2e-3)

    def train(folder, **options):
        model = SRModel(
            add_condition_channels(split_into_stages(nano_unet(THIN, 16)), 16),
            noise_schedule("epsilon"),
        )
        model.unet.load_state_dict(unet.state_dict())
        options = TrainOptions(tmp_path / folder, device="cpu", **options)
        train_multistep(model, fresh(vae, photos), cfg, options)
        return model.unet.state_dict()

    def stop(step, metrics):
        if step == 1:
            raise KeyboardInterrupt

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("cut", checkpoint_s=0, callback=stop)
    again = train("cut", checkpoint_s=0)
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


def test_fresh_targets_are_the_teachers_ddim_latents_of_new_noise(tmp_path, vae, photos, unet):
    teacher = SRModel(deepcopy(unet), noise_schedule("epsilon"))
    targets = FreshTargets(fresh(vae, photos), teacher, steps=3)
    generator = torch.Generator().manual_seed(5)
    first = targets.draw(0, 2, generator)
    batch = targets.complete(first)
    wanted = ddim_sample(unet, teacher.scheduler, batch["z_T"], 3, batch["z_l"])
    assert torch.allclose(batch["z_target"], wanted, atol=1e-5)
    assert not torch.equal(first["z_T"], targets.draw(1, 2, generator)["z_T"])
    student = OneStepGenerator(vae, unet, teacher.scheduler)
    before = one_step(student.model, batch["z_T"], batch["z_l"])
    curve = distill_to_one_step(
        student,
        None,
        targets,
        config.OneStepConfig(steps=1, batch=2),
        PAPER_RECIPE,
        TrainOptions(tmp_path, device="cpu"),
    )
    g = torch.Generator().manual_seed(0)
    own = targets.complete(targets.draw(0, 2, g))
    with torch.no_grad():
        model = SRModel(targets.teacher.unet, teacher.scheduler)
        loss = (one_step(model, own["z_T"], own["z_l"]) - own["z_target"]).pow(2).mean()
    assert curve[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert before.shape == batch["z_target"].shape


def test_students_follow_the_profile():
    cfg = get_profile("cpu", "paper").onestep
    assert student_recipes(cfg) == dict(paper=PAPER_RECIPE)
    ours = student_recipes(replace(cfg, students=("ours",)))
    assert list(ours) == ["ours"]
    with pytest.raises(ValueError, match="OneStepConfig.students"):
        student_recipes(replace(cfg, students=("hers",)))


def test_a_missing_pool_is_explained(tmp_path):
    artifact = SimpleNamespace(path=tmp_path, results=dict(pairs=0))
    with pytest.raises(Exception, match="adapt.fresh_pairs=False"):
        load_pair_pool(artifact)
