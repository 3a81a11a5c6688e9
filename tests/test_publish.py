"The weights of a finished run as a folder: complete, in half precision, with their records."

import json

import pytest
import torch

from tocsr.core.config import ProfileError, get_profile
from tocsr.core.files import StoreError, read_weights
from tocsr.core.store import run_stage
from tocsr.inference.pipeline import TOCSRPipeline
from tocsr.models.autoencoder import load_autoencoder
from tocsr.models.expansion import load_teacher_folder
from tocsr.stages.publish import FOLDERS, publish_run


@pytest.fixture(scope="module")
def profile():
    "Profile smoke from scratch."
    scratch = dict(start="scratch")
    return get_profile(
        "smoke",
        ablations=False,
        autoencoder=scratch,
        teacher=scratch | dict(steps=2),
        compact=scratch,
        onestep=dict(compare_bundled=False),
    )


@pytest.fixture(scope="module")
def run(profile, tmp_path_factory):
    "The folder and the results of the stages."
    found = {stage: run_stage(stage, profile).results for stage in FOLDERS}
    return publish_run(profile, tmp_path_factory.mktemp("published") / "weights"), found


@pytest.fixture(scope="module")
def published(run):
    return run[0]


def test_the_folder_loads_like_the_bundled_one(published):
    teacher = load_teacher_folder(published / "teacher")
    assert teacher.unet.config.in_channels == 16
    assert load_autoencoder(published / "codec4").encode(torch.zeros(1, 3, 32, 32)).shape[1] == 4
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


def _scratch():
    return {name: dict(start="scratch") for name in ("autoencoder", "teacher", "compact")}


def test_a_run_takes_over_a_published_teacher_with_its_record(published, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_WEIGHTS", str(published))
    given = dict(start="bundled")
    profile = get_profile(
        "smoke",
        ablations=False,
        autoencoder=given,
        teacher=given,
        compact=dict(start="scratch"),
        onestep=dict(compare_bundled=False),
    )
    for stage in FOLDERS:
        run_stage(stage, profile)
    folder = publish_run(profile, tmp_path / "w")
    before, after = (json.loads((f / "record.json").read_text()) for f in (published, folder))
    taken = [w for w in after["weights"] if w["name"] in after["given"]]
    assert taken == before["weights"][:3] and len(after["weights"]) == 6
    assert after["hours"]["teacher"] == before["hours"]["teacher"]
    assert after["hours"]["onestep"] != before["hours"]["onestep"]
    for file in ("teacher/unet/diffusion_pytorch_model.safetensors", "stages/teacher.json"):
        assert (folder / file).read_bytes() == (published / file).read_bytes()
    assert "come from an earlier run of profile `smoke`" in (folder / "README.md").read_text()
    monkeypatch.setenv("TOCSR_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="TOCSR_WEIGHTS=.* has no record.json"):
        run_stage("teacher", profile)
