"Speed: what is timed, in which order, and that ratios come from one run."

import json
import math
import time

import pytest
import torch
from typer.testing import CliRunner

from tocsr.cli.main import app
from tocsr.evaluation import methods, speed


def sleeper(name, seconds, order):
    "A method that works for `seconds` of CPU time and notes when."

    def f(lr, i):
        order.append(name)
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return torch.zeros(1, 3, 4 * lr.shape[-2], 4 * lr.shape[-1])

    return methods.SRMethod(name, name, name, lambda threads, dtype: f)


def test_methods_take_turns_and_ratios_are_theirs():
    order = []
    fast, slow = speed.bench_methods(
        [sleeper("fast", 0.02, order), sleeper("slow", 0.06, order)], sizes=(16,), repeats=3
    )
    assert order == ["fast", "slow"] * 4, "one uncounted call each, then in turns"
    assert fast["times the first"] == 1 and 2.3 < slow["times the first"] < 4
    assert (
        slow["Mpixel/s"] == pytest.approx(64 * 64 / 1e6 / slow["seconds"])
        and slow["seconds"] >= 0.05
    )


def test_every_row_states_its_circumstances(monkeypatch):
    before = torch.get_num_threads()
    rows = speed.bench_methods(
        ["bicubic"], sizes=(16, 32), threads=(1, 2), dtypes=("fp32", "bf16"), repeats=1
    )
    assert [(r["LR"], r["threads"], r["dtype"]) for r in rows] == [
        (f"{s}x{s}", t, d) for s in (16, 32) for t in (1, 2) for d in ("fp32", "bf16")
    ]
    assert (
        all("not available" in r["seconds"] for r in rows if r["dtype"] == "bf16")
        and torch.get_num_threads() == before
    )


def test_bf16_says_how_far_it_is_from_fp32():
    def load(threads, dtype):
        return lambda lr, i: torch.full((1, 3, 64, 64), 0.5 if dtype == "fp32" else 0.52)

    (row,) = speed.bench_methods(
        [methods.SRMethod("m", "m", "m", load)], sizes=(16,), dtypes=("bf16",), repeats=1
    )
    assert row["dB to fp32"] == pytest.approx(20 * math.log10(2 / 0.02), abs=0.01)


def test_the_command(monkeypatch):
    r = CliRunner().invoke(
        app, ["bench", "--model", "bicubic", "--sizes", "16,24", "--repeats", "1", "--json"]
    )
    found = json.loads(r.stdout)
    assert (
        r.exit_code == 0
        and [row["LR"] for row in found["rows"]] == ["16x16", "24x24"]
        and found["machine"]["cpu"]
    )
    text = (
        CliRunner()
        .invoke(app, ["bench", "--model", "bicubic", "--sizes", "16", "--repeats", "2"])
        .stdout
    )
    assert "median of 2 warm calls" in text and "with autoencoder" in text and "bicubic" in text
    for args, code, word in (
        (("--sizes", "8"), 1, "too small"),
        (("--sizes", "a"), 2, "whole numbers"),
        (("--threads", "0"), 2, "above 0"),
        (("--dtype", "int8"), 2, "fp32, bf16"),
        (("--model", "nope"), 1, "nope"),
    ):
        r = CliRunner().invoke(app, ["bench", *args])
        assert r.exit_code == code and word in r.stderr and "Traceback" not in r.stderr, (
            args,
            r.stderr,
        )
