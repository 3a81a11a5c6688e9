"Baselines: found inside installed wheels, named when absent, as good as they are known to be."

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from benchmark_sets import find_set

from tocsr.core.image import imresize, read_image, to_tensor
from tocsr.data.degradations import degrade_images
from tocsr.evaluation import baselines as P
from tocsr.evaluation.metrics import measure

FILES = (
    Path(__file__).resolve().parents[2] / "shared/parts/peers2"
)  # where the maintainers keep the two that are on no index
if "TOCSR_BASELINES" not in os.environ and FILES.is_dir():
    os.environ["TOCSR_BASELINES"] = str(FILES)
WHEELS = [n for n, b in P.BASELINES.items() if b.wheel]
ABSENT = {n: P.missing_baseline(n) for n in P.BASELINES}


def need(name):
    if ABSENT[name]:
        pytest.skip(ABSENT[name])


@pytest.mark.parametrize("name", WHEELS)
def test_an_absent_wheel_is_a_reason_that_names_the_extra(name, monkeypatch):
    def gone(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(P, "find_spec", lambda n: object())
    monkeypatch.setattr(P, "files", gone)
    assert (
        P.missing_baseline(name)
        == f"package {P.find_baseline(name).wheel} is not installed (pip install tocsr[peers])"
    )
    with pytest.raises(P.BaselineError, match="tocsr.peers"):
        P.NcnnBaseline(name)
    monkeypatch.setattr(P, "files", lambda package: [])
    assert "lacks" in P.missing_baseline(name) and "constraints.txt" in P.missing_baseline(name)
    monkeypatch.setattr(P, "find_spec", lambda n: None)
    assert P.missing_baseline(name) == "package ncnn is not installed (pip install tocsr[peers])"


def test_wrong_names_and_inputs_are_one_line():
    with pytest.raises(P.BaselineError, match="span, animevideov3, x4plus"):
        P.NcnnBaseline("swinir")
    need("span")
    net = P.NcnnBaseline("span")
    for x in (torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8)):
        with pytest.raises(ValueError, match="one image"):
            net(x)


@pytest.mark.parametrize("name", P.BASELINES)
def test_sizes_and_repeatability(name):
    need(name)
    net = P.NcnnBaseline(name)
    small = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = imresize(small, size=(9, 13)).clamp(0, 1) * 2 - 1
    before = x.clone()
    first = net(x)
    junk = [torch.rand(1, 3, 64, 64) for _ in range(8)]  # whatever reuses a freed buffer
    assert (
        first.shape == (1, 3, 36, 52)
        and torch.equal(net(x), first)
        and torch.equal(x, before)
        and len(junk) == 8
    )
    assert (P.NcnnBaseline(name, bf16=True)(x) - first).abs().mean() < 0.1


@pytest.mark.parametrize(
    "name, db",
    [
        ("span", 32.20),
        ("animevideov3", 28.25),
        ("x4plus", 26.64),
        ("general", 26.64),
        ("general_wdn", 26.70),
    ],
)
def test_set5_is_what_it_is_known_to_be(name, db):
    need(name)
    files = find_set("Set5").hr
    hr = [to_tensor(read_image(p)) for p in files]
    net = P.NcnnBaseline(name)
    values = measure(["psnry"], [net(degrade_images(x[None], "bicubic"))[0] for x in hr], hr)[
        "psnry"
    ]
    assert sum(values) / 5 == pytest.approx(db, abs=0.03)


def test_files_on_no_index_are_verified_and_their_origin_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(P, "find_spec", lambda n: object())
    monkeypatch.setenv("TOCSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOCSR_BASELINES", str(tmp_path))
    monkeypatch.delenv("TOCSR_DOWNLOAD", raising=False)
    why = P.missing_baseline("general")
    assert (
        "RealESRGAN_General_x4_v3.param" in why
        and P.BASELINES_URL in why
        and "TOCSR_BASELINES" in why
    )
    (tmp_path / "RealESRGAN_General_x4_v3.param").write_text("other")
    assert "sha256 differs" in P.missing_baseline("general")
    (tmp_path / "RealESRGAN_General_x4_v3.param").unlink()
    monkeypatch.setenv("TOCSR_DOWNLOAD", "1")
    monkeypatch.setattr(P, "BASELINES_URL", "http://127.0.0.1:9/")
    assert "refused" in P.missing_baseline("general")
