"""What goes wrong outside of the code: kills, full disks, damaged and foreign files, photographs
that cannot be used, losses that are not finite.
"""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tocsr.core.config import DataConfig, ProfileError, get_profile
from tocsr.core.files import StoreError, load_weights, read_weights, save_weights
from tocsr.core.image import ImageError
from tocsr.core.store import run_stage, stage
from tocsr.data.images import load_photos

ROOT = Path(__file__).resolve().parents[1]

# A stage like the real ones, thin: a UNet with moving average, schedule and drawn noise,
# checkpointed after every step.
STAGE = """
import os
import sys
import time

import torch

from tocsr.core.config import UNetConfig, get_profile
from tocsr.core.files import save_weights
from tocsr.core.store import run_stage, stage
from tocsr.core.training import fit, step_generator
from tocsr.models.diffusion import diffusion_loss, nano_unet, noise_schedule

CFG = UNetConfig(channels=(8, 16), layers=1, heads=(1, 2), context_dim=8, groups=4)
STEPS = int(os.environ.get("STEPS", 10))

@stage("thin", config=lambda p: (p.teacher,), data=False)
def run_thin(run):
    with open(os.environ["TOCSR_RUNS"] + "/computed", "a") as f:
        f.write("x")
    torch.manual_seed(run.profile.seed)
    unet, schedule = nano_unet(CFG, 4), noise_schedule("v_prediction")

    def loss(step, models):
        g = step_generator(run.profile.seed, step)
        z, noise = torch.randn(2, 2, 4, 8, 8, generator=g)
        t = torch.randint(0, 1000, (2,), generator=g)
        return diffusion_loss(models["unet"], z, t, noise, schedule)

    settings = dict(ema=0.9, warmup=5, checkpoint_s=0, device="cpu")
    history = fit(dict(unet=unet), loss, STEPS, 1e-3, run.scratch / "fit", **settings)
    save_weights(run.dir / "unet.safetensors", unet)
    return dict(losses=[h["loss"] for h in history])

smoke = get_profile("smoke")
"""

# Twenty kills, each at a random moment after 0, 1 or 2 further checkpoints: before the first step,
# within one, while a checkpoint is written.
# Forked after the imports, which take longer than all the training.
KILLER = (
    STAGE
    + """
import random
import signal
from pathlib import Path

RUNS, moments, reached = Path(os.environ["TOCSR_RUNS"]), random.Random(0), []
torch.set_num_threads(1)

def compute():
    child = os.fork()
    if child:
        return child
    try:
        run_stage("thin", smoke)
    finally:
        os._exit(0)

def step():
    found = RUNS.glob(".scratch/thin/*/fit/step-*")
    return max((int(p.name[5:]) for p in found), default=0)

while len(reached) < 20:
    child, goal = compute(), step() + moments.randrange(3)
    while step() < goal:
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "finished before it was killed"
    assert not (RUNS / "thin").exists(), "half a result"
    reached.append(step())
os.waitpid(compute(), 0)
print(*reached)
print(next((RUNS / "thin").iterdir()))
"""
)


def script(tmp_path, text, runs, **popen):
    "Run `text` as a program of its own on the store `runs`."
    path = tmp_path / "program.py"
    path.write_text(text)
    runs.mkdir(exist_ok=True)
    env = os.environ | dict(TOCSR_RUNS=str(runs), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, path],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def finish(child):
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-2000:]
    return out


DONE = STAGE + 'a = run_stage("thin", smoke); print(a.path)\n'


def test_killed_twenty_times_ends_in_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "120")
    numbers, killed = finish(script(tmp_path, KILLER, tmp_path / "killed")).splitlines()
    reached = list(map(int, numbers.split()))
    killed = Path(killed)
    assert len(reached) == 20 and reached == sorted(reached) and len(set(reached)) > 5, (
        f"a kill lost a checkpoint, or met no progress: {reached}"
    )
    whole = Path(finish(script(tmp_path, DONE, tmp_path / "whole")).strip())
    assert killed.name == whole.name and killed != whole
    assert (killed / "unet.safetensors").read_bytes() == (whole / "unet.safetensors").read_bytes()
    a, b = (json.loads((p / "meta.json").read_text()) for p in (killed, whole))
    assert (
        a["results"] == b["results"]
        and a["files"]["unet.safetensors"] == b["files"]["unet.safetensors"]
    )
    assert (
        len((tmp_path / "killed/computed").read_text()) > 10
        and (tmp_path / "whole/computed").read_text() == "x"
    )


def test_two_processes_on_one_store_compute_once(tmp_path):
    runs = tmp_path / "shared"
    a = script(tmp_path, DONE, runs)
    b = script(tmp_path, DONE, runs)
    path = finish(a)
    assert path == finish(b) and [str(p) for p in (runs / "thin").iterdir()] == [path.strip()]
    assert (runs / "computed").read_text() == "x"


def full_disk():
    "Limit the files of this process to 64 KiB, as on a full disk."
    import resource  # only on Unix

    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))


def test_a_full_disk_leaves_no_half_written_result(tmp_path):
    runs = tmp_path / "full"
    child = script(tmp_path, DONE, runs, preexec_fn=full_disk)
    _, err = child.communicate(timeout=120)
    assert child.returncode and "File too large" in err.splitlines()[-1], err[-500:]
    assert not (runs / "thin").exists() and not list(runs.rglob("*.tmp"))
    assert Path(finish(script(tmp_path, DONE, runs)).strip()).is_dir()  # with space again


def test_writing_to_a_full_disk_keeps_the_old_file(tmp_path):
    save_weights(tmp_path / "w.safetensors", dict(a=torch.ones(3)))
    code = textwrap.dedent(f"""
        from pathlib import Path

        import torch

        from tocsr.core.files import save_weights, write_json

        folder = Path({str(tmp_path)!r})
        for write, name, value in (
            (save_weights, "w.safetensors", dict(a=torch.ones(100_000))),
            (write_json, "w.json", list(range(100_000))),
        ):
            try:
                write(folder / name, value)
            except Exception as e:
                print(type(e).__name__, e)
    """)
    out = finish(script(tmp_path, code, tmp_path / "runs", preexec_fn=full_disk))
    assert out.count("too large") == 2 and torch.equal(
        load_file(tmp_path / "w.safetensors")["a"], torch.ones(3)
    )
    assert not (tmp_path / "w.json").exists() and not list(tmp_path.glob(".*.tmp*"))


class Bomb:
    "Pickled, it runs code when it is loaded."

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.fixture
def weights(tmp_path):
    path = save_weights(tmp_path / "w.safetensors", torch.nn.Conv2d(3, 8, 3))
    return path, path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[:20],
        lambda b: b"",
        lambda b: b"\x89PNG\r\n\x1a\n" + b,
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b + b"more",
    ],
    ids=["last byte", "header", "empty", "image", "length", "longer"],
)
def test_damaged_weights_are_named(weights, damage):
    path, data = weights
    path.write_bytes(damage(data))
    with pytest.raises(StoreError, match="w.safetensors.*truncated or not a safetensors"):
        load_weights(path, torch.nn.Conv2d(3, 8, 3))


def test_a_pickle_is_never_loaded(weights, tmp_path):
    path, _ = weights
    for dump in (
        lambda f: pickle.dump(Bomb(str(tmp_path / "boom")), f),
        lambda f: torch.save(dict(a=torch.ones(2)), f),
    ):
        with open(path, "wb") as f:
            dump(f)
        with pytest.raises(StoreError, match="not a safetensors"):
            read_weights(path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "module, words",
    [
        (torch.nn.Conv2d(3, 9, 3), "another shape"),
        (torch.nn.Conv2d(3, 8, 3, bias=False), "1 unknown"),
        (torch.nn.BatchNorm2d(8), "3 tensors missing"),
    ],
)
def test_wrong_shapes_are_named_and_nothing_is_loaded(weights, module, words):
    path, _ = weights
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(StoreError, match=words):
        load_weights(path, module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_nan_loss_stops_the_stage_and_names_the_step(tmp_path):
    text = STAGE.replace(
        "return diffusion_loss(models",
        "return (float('nan') if step == 7 else 1)*diffusion_loss(models",
    )
    child = script(tmp_path, text + 'run_stage("thin", smoke)\n', tmp_path / "nan")
    _, err = child.communicate(timeout=120)
    assert (
        child.returncode
        and "TrainingError" in err.splitlines()[-1]
        and "step 7" in err.splitlines()[-1]
        and "learning rate" in err.splitlines()[-1]
    )
    assert not (tmp_path / "nan/thin").exists()


@stage("bare", data=False)
def run_bare(run):
    return dict(x=1)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00\x01"])
def test_a_damaged_record_is_named(monkeypatch, text):
    monkeypatch.setattr(
        "tocsr.core.store.source_hash", lambda *f: "0"
    )  # a test's module is not the library's
    a = run_stage("bare", get_profile("smoke"))
    assert a.results == dict(x=1)
    (a.path / "meta.json").write_text(text)
    with pytest.raises(StoreError, match="meta.json is damaged.*delete"):
        run_stage("bare", get_profile("smoke"))
    for f in a.path.iterdir():
        f.unlink()
    assert run_stage("bare", get_profile("smoke")).results == dict(x=1)  # deleted, it is made again


def test_photographs_that_cannot_be_used_are_counted(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(ImageError, match="no usable photograph"):
        load_photos(DataConfig(source=str(folder)))
    with pytest.raises(ImageError, match="no such folder"):
        load_photos(DataConfig(source=str(folder / "none")))
    good = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    Image.fromarray(good).save(folder / "good.png")
    Image.fromarray(good[:40]).save(folder / "small.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    (folder / "text.jpg").write_text("not an image")
    photos = load_photos(DataConfig(source=str(folder)))
    assert list(photos.names) == ["good.png"] and sum(photos.skipped.values()) == 3, photos.report()


def test_unknown_profiles_and_fields_list_the_valid_ones(monkeypatch):
    with pytest.raises(ProfileError, match="'cup'.*smoke, cpu, release, gpu, paper"):
        get_profile("cup")
    monkeypatch.setenv("TOCSR_PROFILE", "big")
    with pytest.raises(ProfileError, match="'big'"):
        get_profile()
    with pytest.raises(ProfileError, match="'stpes'.*steps"):
        get_profile("smoke", teacher=dict(stpes=3))
