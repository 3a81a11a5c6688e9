"Every test has a run store of its own and never writes into paper_figures/."

import signal

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background, and so in all children
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def private_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.delenv("TOCSR_PROFILE", raising=False)
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def nano():
    "The nano UNet with 16 latent channels, random weights, in evaluation mode."
    import torch

    from tocsr.core.config import UNetConfig
    from tocsr.models.diffusion import nano_unet

    torch.manual_seed(0)
    return nano_unet(UNetConfig(), 16).eval().requires_grad_(False)
