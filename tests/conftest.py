"Every test has a run store of its own and never writes into paper_figures/."
import pytest


@pytest.fixture(autouse=True)
def private_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_RUNS", str(tmp_path/"runs"))
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.delenv("TOCSR_PROFILE", raising=False)
    return tmp_path/"runs"
