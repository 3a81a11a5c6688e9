"Peers: found inside installed wheels, named when absent, as good as they are known to be."
import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path
import pytest
import torch
from tocsr import peers as P
from tocsr.degradations import degrade, imresize
from tocsr.images import FetchError, benchmark, read_image, to_tensor
from tocsr.metrics import measure

ABSENT = {n: P.missing_peer(n) for n in P.PEERS}
ROOT = os.environ.get("TOCSR_TEST_DATA") or Path(__file__).resolve().parents[2]/"shared"/"data"


def need(name):
    if ABSENT[name]: pytest.skip(ABSENT[name])


@pytest.mark.parametrize("name", P.PEERS)
def test_an_absent_wheel_is_a_reason_that_names_the_extra(name, monkeypatch):
    def gone(package): raise PackageNotFoundError(package)
    monkeypatch.setattr(P, "find_spec", lambda n: object()); monkeypatch.setattr(P, "files", gone)
    assert P.missing_peer(name) == f"package {P.peer(name).wheel} is not installed (pip install tocsr[peers])"
    with pytest.raises(P.PeerError, match="tocsr.peers"): P.PeerNet(name)
    monkeypatch.setattr(P, "files", lambda package: [])
    assert "lacks" in P.missing_peer(name) and "constraints.txt" in P.missing_peer(name)
    monkeypatch.setattr(P, "find_spec", lambda n: None)
    assert P.missing_peer(name) == "package ncnn is not installed (pip install tocsr[peers])"


def test_wrong_names_and_inputs_are_one_line():
    with pytest.raises(P.PeerError, match="span, animevideov3, x4plus"): P.PeerNet("swinir")
    need("span")
    net = P.PeerNet("span")
    for x in (torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8)):
        with pytest.raises(ValueError, match="one image"): net(x)


@pytest.mark.parametrize("name", P.PEERS)
def test_sizes_and_repeatability(name):
    need(name)
    net, x = P.PeerNet(name), imresize(torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), size=(9, 13)).clamp(0, 1)*2 - 1
    before, first = x.clone(), net(x)
    junk = [torch.rand(1, 3, 64, 64) for _ in range(8)]      # whatever reuses a freed buffer
    assert first.shape == (1, 3, 36, 52) and torch.equal(net(x), first) and torch.equal(x, before) and len(junk) == 8
    assert (P.PeerNet(name, bf16=True)(x) - first).abs().mean() < 0.1


@pytest.mark.parametrize("name, db", [("span", 32.20), ("animevideov3", 28.25), ("x4plus", 26.64)])
def test_set5_is_what_it_is_known_to_be(name, db):
    need(name)
    try: files = benchmark("Set5", ROOT, download=False).hr
    except FetchError as e: pytest.skip(str(e))
    hr, net = [to_tensor(read_image(p)) for p in files], P.PeerNet(name)
    values = measure(["psnry"], [net(degrade(x[None], "bicubic"))[0] for x in hr], hr)["psnry"]
    assert sum(values)/5 == pytest.approx(db, abs=0.03)
