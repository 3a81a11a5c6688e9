"The weights of a finished run as a folder: complete, in half precision, with their records."

import json
from dataclasses import replace

import pytest
import torch

from tocsr.core.config import ProfileError, get_profile, override
from tocsr.core.files import StoreError, read_weights
from tocsr.core.store import run_stage
from tocsr.evaluation.findings import list_release_findings
from tocsr.evaluation.release_run import (
    gates_table,
    read_release,
    release_claims,
    release_evidence,
    with_release_run,
)
from tocsr.inference.pipeline import TOCSRPipeline
from tocsr.models.autoencoder import load_autoencoder
from tocsr.models.expansion import load_teacher_folder
from tocsr.models.generator import load_sr_model, sample_sr
from tocsr.stages.publish import FOLDERS, publish_run

LITTLE = dict(s4_steps=0, linear_crops=300, eval_samples=4)  # of stage teacher
FASTER = dict(
    ablations=False,
    onestep=dict(compare_bundled=False, regression=False),
    eval=dict(crops=1),
)


@pytest.fixture(scope="module")
def profile():
    "Profile smoke from scratch."
    scratch = dict(start="scratch")
    return get_profile(
        "smoke",
        autoencoder=scratch,
        teacher=scratch | LITTLE | dict(steps=2),
        compact=scratch,
        **FASTER,
    )


@pytest.fixture(scope="module")
def run(profile, tmp_path_factory):
    "The folder, the results of the stages, and the run store."
    found = {stage: run_stage(stage, profile) for stage in FOLDERS}
    folder = publish_run(profile, tmp_path_factory.mktemp("published") / "weights")
    results = {stage: a.results for stage, a in found.items()}
    return folder, results, found["teacher"].path.parents[1]


@pytest.fixture(scope="module")
def published(run):
    return run[0]


def test_the_folder_loads_like_the_bundled_one(published):
    teacher = load_teacher_folder(published / "teacher")
    assert teacher.unet.config.in_channels == 16
    assert load_autoencoder(published / "codec4").encode(torch.zeros(1, 3, 32, 32)).shape[1] == 4
    model = load_sr_model(published / "adapt")
    assert sample_sr(model, teacher.vae, torch.zeros(1, 3, 32, 32), 1).shape == (1, 3, 128, 128)
    pipe = TOCSRPipeline.from_pretrained(published / "onestep")
    assert pipe(torch.zeros(1, 3, 32, 32))[0][0].size == (128, 128)
    for file in published.rglob("*.safetensors"):
        assert {t.dtype for t in read_weights(file).values()} == {torch.float16}, file


def test_every_number_of_the_record_comes_from_the_run(published, run):
    record = json.loads((published / "record.json").read_text())
    entries = {w["name"]: w for w in record["weights"]}
    assert set(entries) == {"codec4", "codec16", "teacher", "compact", "adapt", "onestep"}
    for name, entry in entries.items():
        assert all((published / f).is_file() for f in entry["files"]), name
        assert len(entry["curve"]) > 0 and entry["hours"] > 0, name
    compact = run[1]["compact"]
    assert entries["compact"]["results"]["architecture"] == compact["architecture"]
    assert sum(entries["teacher"]["params"].values()) == compact["cost"]["teacher"]["params"]
    stages = {f.stem for f in (published / "stages").iterdir()}
    assert stages >= set(FOLDERS)
    card = (published / "README.md").read_text()
    assert "one run of profile `smoke`" in card
    assert json.loads((published / "stages/teacher.json").read_text())["curves"]["teacher"]


def test_an_unfinished_run_is_refused(profile, tmp_path):
    other = get_profile("smoke", **{**_scratch(), "seed": 77})
    with pytest.raises(ProfileError, match="stages without a result.*autoencoder"):
        publish_run(other, tmp_path / "w")
    with pytest.raises(ProfileError, match="compact.start='bundled'.*starts from scratch"):
        publish_run(get_profile("smoke"), tmp_path / "w")
    assert not (tmp_path / "w").exists()
    with pytest.raises(StoreError, match="exists"):
        publish_run(profile, tmp_path)


def test_what_is_finished_of_a_run_can_be_published(profile, run, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_RUNS", str(run[2]))
    other = override(profile, onestep=dict(steps=profile.onestep.steps + 1))
    with pytest.raises(ProfileError, match="onestep; compute.*--partial"):
        publish_run(other, tmp_path / "w")
    folder = publish_run(other, tmp_path / "w", partial=True)
    record = json.loads((folder / "record.json").read_text())
    assert record["missing"] == ["onestep"] and not (folder / "onestep").exists()
    assert {w["name"] for w in record["weights"]} >= {"teacher", "compact", "adapt"}
    assert "not computed yet: onestep." in (folder / "README.md").read_text()
    with pytest.raises(ProfileError, match="stages without a result"):
        publish_run(override(profile, seed=78), tmp_path / "none", partial=True)


def test_curves_are_means_of_steps_that_follow_each_other(published, run):
    points = json.loads((published / "stages/adapt.json").read_text())["curves"]["ours"]
    losses = run[1]["adapt"]["loss"]["ours"]
    assert points[-1][0] == len(losses) - 1
    assert points[0][1] == pytest.approx(losses[0], rel=1e-3)


def test_records_become_claims_and_gates(published, run):
    release = read_release(published)
    found = run[1]
    assert release.profile.name == "smoke" and set(release.results) >= set(FOLDERS)
    assert release.hours["teacher"] > 0
    claims = {c.id: c for c in release_claims(release)}
    assert all(id.startswith("release.") for id in claims)
    assert claims["release.compact.kept_advantage"].status == "not attempted"  # after few steps
    ratio = claims["release.teacher.mean_gate"]
    assert ratio.ours == found["teacher"]["ratio"]["mean"]
    assert ratio.status == ("met" if ratio.ours <= 0.65 else "missed")
    rows = gates_table(list(claims.values()))
    assert {r["stage"] for r in rows} >= {"vae", "teacher", "compact", "run"}
    assert all(r["status"] in ("**met**", "**missed**") and r["wanted"] for r in rows)


@pytest.mark.parametrize("kept, status", [(0.85, "missed"), (0.95, "met")])
def test_the_kept_advantage_has_an_interval_and_a_gate(published, kept, status):
    release = read_release(published)
    compact = release.results["compact"]
    rows = dict(teacher=dict(ratio=0.6), ours=dict(ratio=0.66, kept=kept, excess_se=0.01))
    results = release.results | dict(compact=compact | dict(held_out=rows))
    claims = {c.id: c for c in release_claims(replace(release, results=results))}
    claim = claims["release.compact.kept_advantage"]
    assert claim.ours == kept and claim.status == status
    assert claim.spread == pytest.approx((kept - 0.049, kept + 0.049))


def test_findings_of_the_release_run_replace_those_of_short_ones(published):
    release = read_release(published)
    claims = release_claims(release)
    own = {f.id: f for f in list_release_findings(release_evidence(release, claims))}
    short = [replace(f, note="short") for f in own.values()]
    other = replace(short[0], id="another")
    assert with_release_run([*short, other], release, claims) == [*own.values(), other]
    ids = {c.id for c in claims}
    assert {m.claim for f in own.values() for m in f.measurements if m.claim} <= ids


def test_a_folder_without_records_is_named(tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="record.json"):
        read_release(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert read_release() is None


def _scratch():
    return {name: dict(start="scratch") for name in ("autoencoder", "teacher", "compact")}


def test_a_run_takes_over_a_published_teacher_with_its_record(published, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_WEIGHTS", str(published))
    given = dict(start="bundled")
    profile = get_profile(
        "smoke",
        autoencoder=given,
        teacher=given | LITTLE,
        compact=dict(start="scratch"),
        **FASTER,
    )
    for stage in FOLDERS:
        run_stage(stage, profile)
    folder = publish_run(profile, tmp_path / "w")
    before, after = (json.loads((f / "record.json").read_text()) for f in (published, folder))
    taken = [w for w in after["weights"] if w["name"] in after["given"]]
    assert taken == before["weights"][:3] and len(after["weights"]) == 6
    assert after["hours"]["teacher"] == before["hours"]["teacher"]
    keys = [json.loads((f / "stages/onestep.json").read_text())["key"] for f in (published, folder)]
    assert keys[0] != keys[1]
    for file in ("teacher/unet/diffusion_pytorch_model.safetensors", "stages/teacher.json"):
        assert (folder / file).read_bytes() == (published / file).read_bytes()
    assert "come from an earlier run of profile `smoke`" in (folder / "README.md").read_text()
    monkeypatch.setenv("TOCSR_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="TOCSR_WEIGHTS=.* has no record.json"):
        run_stage("teacher", profile)
