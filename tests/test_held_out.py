"""Held-out evaluation one image at a time: equal to all at once, resumable, divided among
processes.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from tocsr.core.append_log import AppendOnlyLog
from tocsr.core.config import get_profile, override
from tocsr.core.image import to_array, upsample
from tocsr.data.images import load_photos
from tocsr.data.pairs import HELD_OUT_DEGRADATION, HELD_OUT_SEED, HeldOutPairs, crop_pairs
from tocsr.evaluation.held_out import make_validation, measure_methods
from tocsr.evaluation.metrics import measure

METRICS = ("psnry", "ssim", "fd_gabor", "fid", "niqe")


@pytest.fixture(scope="module")
def profile():
    return get_profile("smoke", eval=dict(crops=3, crop=96))


def all_pairs(profile, factor):
    "All held-out pairs at once: HR (3, 3, 96, 96) and LR."
    return crop_pairs(
        load_photos(profile.data).split("val"),
        96,
        factor,
        degradation=profile.eval.degradation,
        scale=4,
        seed=profile.data.seed + HELD_OUT_SEED,
        indices=range(3),
        degradation_seeds=[HELD_OUT_DEGRADATION + i for i in range(3)],
    )


@pytest.mark.parametrize("factor, side", [(1, 96), (8, 96), (10, 80)])
def test_pairs_are_those_of_all_at_once(profile, factor, side):
    hr, lr = all_pairs(profile, factor)
    pairs = HeldOutPairs(profile, 96, factor)
    assert len(pairs) == 3 and hr.shape[-1] == side
    for i in range(3):
        one_hr, one_lr = pairs.pair(i)
        assert torch.equal(one_hr[0], hr[i]) and torch.equal(one_lr[0], lr[i])


def bicubic(lr, indices):
    return upsample(lr, 4)


def test_validation_writes_what_it_measures(profile, tmp_path):
    p = override(profile, data=dict(patch=96))
    validate = make_validation(bicubic, p, 8, tmp_path / "validation")
    assert not (tmp_path / "validation").exists()
    value = validate(40, {})["psnry"]
    pairs = HeldOutPairs(p, 96, 8)
    hr, lr = map(torch.cat, zip(*(pairs.pair(i) for i in range(len(pairs)))))
    measured = measure(("psnry",), upsample(lr, 4).clamp(-1, 1), hr, border=4)["psnry"]
    assert value == pytest.approx(sum(measured) / len(measured))
    with Image.open(tmp_path / "validation/step-00000040.png") as shown:
        rows = np.asarray(shown)
    assert rows.shape == (len(pairs) * 96, 3 * 96, 3)
    assert (rows[:96, :96] == rows[:96, 96:192]).all()  # bicubic twice
    assert (rows[:96, 192:] == to_array(hr)[0]).all()


def test_values_are_those_of_all_at_once(profile, tmp_path):
    hr, lr = all_pairs(profile, 1)
    expected = measure(METRICS, upsample(lr, 4), hr, border=4)
    pairs = HeldOutPairs(profile, 96, 1)
    found = measure_methods({"a / b": bicubic}, pairs, METRICS, tmp_path)["a / b"]
    for name, values in expected.items():
        if isinstance(values, str):
            assert isinstance(found.values[name], str), name
        else:
            assert found.values[name] == pytest.approx(values, rel=1e-6), name
    assert torch.allclose(found.images, upsample(lr, 4), atol=1e-6) and found.seconds > 0


def test_an_interrupted_evaluation_continues(profile, tmp_path):
    calls = []

    def stops(lr, indices):
        if indices == [2] and len(calls) < 4:
            raise KeyboardInterrupt
        calls.append(indices[0])
        return upsample(lr, 4)

    pairs = HeldOutPairs(profile, 96, 1)
    with pytest.raises(KeyboardInterrupt):
        measure_methods({"m": stops}, pairs, ("psnry",), tmp_path)
    assert calls == [0, 0, 1], "a warm-up and two images"
    calls.append(None)
    values = measure_methods({"m": stops}, pairs, ("psnry",), tmp_path)["m"].values
    assert calls[4:] == [2, 2] and len(values["psnry"]) == 3
    assert [r["image"] for r in AppendOnlyLog(tmp_path / "values-0.jsonl")] == [0, 1, 2]


def test_two_processes_take_every_other_image(profile, tmp_path, monkeypatch):
    from tocsr.evaluation import held_out

    pairs = HeldOutPairs(profile, 96, 1)
    whole = measure_methods({"m": bicubic}, pairs, ("psnry", "fd_gabor"), tmp_path / "one")["m"]
    seen = []

    def record(lr, indices):
        seen.append(indices[0])
        return upsample(lr, 4)

    def run(process: int):
        monkeypatch.setattr(held_out, "rank", lambda: process)
        return measure_methods({"m": record}, pairs, ("psnry", "fd_gabor"), tmp_path / "two")

    monkeypatch.setattr(held_out, "world_size", lambda: 2)
    monkeypatch.setattr(held_out, "wait_for_all", lambda: None)
    with monkeypatch.context() as alone:  # nothing to collect before the other process has run
        alone.setattr(held_out, "_collect", lambda *args, **kwargs: None)
        run(1)
    assert seen == [1, 1]
    both = run(0)["m"]
    assert seen[2:] == [0, 0, 2]
    assert both.values == whole.values and torch.equal(both.images, whole.images)
