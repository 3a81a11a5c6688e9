"Test sets, interrupted runs, bad models, bad folders, the command."

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tocsr.cli.main import app
from tocsr.core.download import FetchError
from tocsr.core.image import ImageError, imresize, read_image, to_array, to_tensor
from tocsr.data.degradations import degrade_images
from tocsr.data.images import EMBEDDED, embedded_path, split_score
from tocsr.data.release import list_release_photos
from tocsr.evaluation import methods, runner, speed, sr_claims, test_sets
from tocsr.evaluation.metrics import measure

ROOT = os.environ.get("TOCSR_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"


def make_image(seed, h=64, w=80):
    return to_tensor(
        to_array(
            imresize(
                torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), size=(h, w)
            ).clamp(0, 1)
            * 2
            - 1
        )
    )


def save(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_array(x[0])).save(path)


@pytest.fixture
def folder(tmp_path):
    "A small set in StableSR's layout."
    for i in range(4):
        save(tmp_path / f"RealSRVal_crop128/test_HR/{i}.png", make_image(i))
        save(
            tmp_path / f"RealSRVal_crop128/test_LR/{i}.png",
            degrade_images(make_image(i), "bicubic"),
        )
    return tmp_path


def model(name, f):
    return methods.SRMethod(name, name, f"{name}-1", lambda threads, dtype: f)


def smooth(lr, i):
    return imresize(imresize(lr, 0.5), size=tuple(4 * n for n in lr.shape[-2:]))


# the degraded set


def test_the_packaged_recipe_uses_held_out_photographs_only():
    m = test_sets.packaged_manifest()
    names = [r[0] for r in m["crops"]]
    known = {p.name for p in (*EMBEDDED, *list_release_photos())}
    assert (
        len(names) == 100
        and m["size"] == 512
        and max(Counter(names).values()) <= test_sets.MAX_CROPS_PER_IMAGE
        and {Path(n).stem for n in names} <= known
    )
    assert all(split_score(n, m["split"]["seed"]) < m["split"]["val_share"] for n in names), (
        "a training photograph"
    )
    assert (
        len({r[3] for r in m["crops"]})
        == len({r[4] for r in m["crops"]})
        == len({tuple(r[:3]) for r in m["crops"]})
        == 100
    )
    assert len(set(names[:14])) == 14, "the first crops come from different photographs"


@pytest.fixture
def astronaut(tmp_path):
    "The one crop of the packaged recipe whose photograph every installation has."
    m = test_sets.packaged_manifest()
    row = next(r for r in m["crops"] if r[0] == "astronaut.png")
    photo = read_image(embedded_path(next(p for p in EMBEDDED if p.name == "astronaut")))
    Image.fromarray(photo).save(tmp_path / "astronaut.png")
    return tmp_path, dict(m, crops=[row])


def test_the_packaged_recipe_gives_the_same_pixels_here(astronaut):
    root, m = astronaut
    lr, hr = test_sets.degraded_set(root, m).pair(0)
    assert (
        lr.shape == (1, 3, 128, 128)
        and hr.shape == (1, 3, 512, 512)
        and test_sets.pixel_hash(lr) == m["crops"][0][4]
    )


def test_other_photographs_and_other_degradations_are_told_apart(astronaut):
    root, m = astronaut
    a = read_image(root / "astronaut.png")
    a[0, 0] ^= 1
    Image.fromarray(a).save(root / "astronaut.png")
    with pytest.raises(test_sets.EvalError, match="fetch-photos"):
        test_sets.degraded_set(root, m).pair(0)
    a[0, 0] ^= 1
    Image.fromarray(a).save(root / "astronaut.png")
    altered = dict(m, crops=[[*m["crops"][0][:4], "0" * 64, m["crops"][0][5]]])
    with pytest.raises(test_sets.EvalError, match="constraints.txt"):
        test_sets.degraded_set(root, altered).pair(0)
    free = test_sets.degraded_set(root, altered, verify=False)
    assert (
        free.pair(0)[0].shape == (1, 3, 128, 128)
        and free.keys != test_sets.degraded_set(root, altered).keys
        and "unverified" in free.degradation
    )


def test_missing_photographs_are_named(tmp_path):
    with pytest.raises(test_sets.EvalError, match="lacks 14 photograph.*astronaut.png"):
        test_sets.degraded_set(tmp_path)
    with pytest.raises(test_sets.EvalError, match="fetch-photos"):
        test_sets.degraded_set(None)


# pairs in folders


def test_all_three_layouts(folder):
    for name, where, hr, lr in (
        ("DIV2K-Val", "DIV2K_V2_val", "gt", "lq"),
        ("DRealSR", "DrealSRVal_crop128", "test_HR", "test_LR"),
        ("RealSR", "RealSRVal_crop128", "test_HR", "test_LR"),
    ):
        save(folder / where / hr / "0.png", make_image(0))
        save(folder / where / lr / "0.png", degrade_images(make_image(0), "bicubic"))
        s = test_sets.open_test_set(name, folder)
        assert s.names[0] == "0" and not s.whole and s.pair(0)[1].shape == (1, 3, 64, 80)


def test_unmatched_missized_and_damaged_pairs(folder):
    low = folder / "RealSRVal_crop128/test_LR"
    save(low / "2.png", make_image(9, 16, 16))
    with pytest.raises(test_sets.EvalError, match=r"2\.png: 16x16 px for 80x64 px"):
        test_sets.open_test_set("RealSR", folder)
    (low / "2.png").write_bytes((low / "3.png").read_bytes()[:60])
    with pytest.raises((ImageError, test_sets.EvalError), match=r"2\.png"):
        test_sets.open_test_set("RealSR", folder).pair(2)
    (low / "2.png").unlink()
    with pytest.raises(FetchError, match=r"unpaired.*2\.png"):
        test_sets.open_test_set("RealSR", folder)
    with pytest.raises(FetchError, match="StableSR"):
        test_sets.open_test_set("DRealSR", folder)


def test_keys_follow_the_pixels(folder):
    before = test_sets.open_test_set("RealSR", folder).keys
    save(folder / "RealSRVal_crop128/test_LR/1.png", degrade_images(make_image(7), "bicubic"))
    after = test_sets.open_test_set("RealSR", folder).keys
    assert [a == b for a, b in zip(before, after)] == [True, False, True, True]


@pytest.mark.parametrize("name, db", [("Set5", 28.42), ("Set14", 26.09)])
def test_bicubic_is_the_published_one(name, db):
    """Set14's published 26.00 takes the luma of its one single-channel file as it is; through RGB,
    as here, that file gains 1.3 dB.
    """
    try:
        s = test_sets.open_test_set(name, ROOT)
    except FetchError as e:
        pytest.skip(str(e))
    v = runner.evaluate_on_test_set(["bicubic"], s, ("psnry",), threads=1)["models"]["bicubic"][
        "values"
    ]["psnry"]
    assert np.mean(v) == pytest.approx(db, abs=0.02) and s.whole


# runs


def test_a_stopped_run_goes_on_and_ends_as_an_uninterrupted_one(folder):
    s, calls = test_sets.open_test_set("RealSR", folder), []

    def stops(lr, i):
        calls.append(i)
        if i == 2 and calls.count(2) == 1:
            raise KeyboardInterrupt
        return smooth(lr, i)

    with pytest.raises(KeyboardInterrupt):
        runner.evaluate_on_test_set([model("m", stops), "bicubic"], s, ("psnry",))
    assert calls == [0, 0, 1, 2]
    got = runner.evaluate_on_test_set([model("m", stops), "bicubic"], s, ("psnry",))
    assert calls == [0, 0, 1, 2, 2, 2, 3], (
        "finished images are not computed again; a new process warms up once"
    )
    want = measure(
        ["psnry"],
        [smooth(*s.pair(i)[:1], i)[0] for i in range(4)],
        [s.pair(i)[1][0] for i in range(4)],
    )["psnry"]
    assert (
        got["models"]["m"]["values"]["psnry"] == pytest.approx(want)
        and len(got["models"]["m"]["cpu_seconds"]) == 4
    )
    runner.evaluate_on_test_set([model("m", stops)], s, ("psnry", "psnr"))
    assert len(calls) == 7, "a new metric needs no new result"
    assert (
        runner.evaluate_on_test_set([model("m", stops)], s.first(2), ("psnry",))["models"]["m"][
            "values"
        ]["psnry"]
        == got["models"]["m"]["values"]["psnry"][:2]
    )


def test_a_damaged_log_is_named(folder, private_runs):
    s = test_sets.open_test_set("RealSR", folder).first(1)
    runner.evaluate_on_test_set(["bicubic"], s, ("psnry",))
    (file,) = private_runs.glob("eval/*/values.jsonl")
    file.write_text("garbage\n" + file.read_text())
    with pytest.raises(test_sets.EvalError, match="line 1"):
        runner.evaluate_on_test_set(["bicubic"], s, ("psnry",))


def test_other_weights_are_another_model(folder):
    s = test_sets.open_test_set("RealSR", folder).first(1)

    def value(key, f):
        return runner.evaluate_on_test_set(
            [methods.SRMethod("m", "m", key, lambda threads, dtype: f)], s, ("psnry",)
        )["models"]["m"]["values"]["psnry"][0]

    first = value("1", smooth)
    assert (
        value("1", lambda lr, i: imresize(lr, 4))
        == first
        != value("2", lambda lr, i: imresize(lr, 4))
    )


@pytest.mark.parametrize(
    "f", [lambda lr, i: lr, lambda lr, i: imresize(lr, 4) * math.nan], ids=["size", "nan"]
)
def test_bad_results_name_the_method(folder, f):
    with pytest.raises(test_sets.EvalError, match="culprit returned"):
        runner.evaluate_on_test_set(
            [model("culprit", f)], test_sets.open_test_set("RealSR", folder), ("psnry",)
        )


def test_absent_methods_are_rows_with_a_reason(folder, monkeypatch):
    monkeypatch.setattr(
        methods,
        "missing_baseline",
        lambda name: "package ncnn is not installed (pip install tocsr[peers])",
    )
    r = runner.evaluate_on_test_set(
        ["bicubic", "span", "x4plus"],
        test_sets.open_test_set("RealSR", folder).first(2),
        ("psnry",),
    )
    rows = runner.result_table(r)
    assert (
        rows[1]["psnry"]
        == rows[2]["CPU seconds"]
        == "not available: package ncnn is not installed (pip install tocsr[peers])"
        and rows[0]["psnry"]["n"] == 2
    )
    claims = {
        c.id: c for c in sr_claims.sr_claims([dict(r, set="Set5")], "smoke", metrics=("psnry",))
    }
    assert (
        claims["sr.set5.psnry_span"].status == "not attempted"
        and "ncnn" in claims["sr.set5.psnry_span"].reason
        and claims["sr.set5.psnry_bicubic"].ours > 0
    )
    with pytest.raises(test_sets.EvalError, match="two methods"):
        runner.evaluate_on_test_set(
            ["bicubic", "bicubic"], test_sets.open_test_set("RealSR", folder), ("psnry",)
        )


def test_bars_use_pairs():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 3, 40)  # images differ much, methods little

    def entry(**v):
        return dict(
            title="t",
            key="k",
            dtype="fp32",
            values={k: x.tolist() for k, x in v.items()},
            seconds=[1.0] * 40,
            cpu_seconds=[1.0] * 40,
        )

    flat = np.full(40, 0.3)
    models = {
        n: entry(psnry=25 + hard + d, stlpips=flat + e, niqe=flat + e)
        for n, d, e in (
            (methods.RELEASED, 0.8, 0.05),
            ("x4plus", 0, 0),
            ("bicubic", 1, 0.3),
            ("span", 1, 0.2),
            ("animevideov3", 1, 0.2),
        )
    }
    got = {b["id"]: b for b in sr_claims.acceptance_targets(dict(set="degraded", models=models))}
    psnr = got["psnry_above_x4plus"]
    assert psnr["met"] == "yes" and psnr["value"]["high"] - psnr["value"]["low"] < 1e-6, (
        "the spread over images cancels"
    )
    assert (
        got["stlpips_way"]["value"]["mean"] == pytest.approx(5 / 6)
        and got["speedup_x4plus"]["met"] == "no"
    )


def test_committed_results_of_the_baselines_are_whole():
    for path in sorted(
        (Path(__file__).resolve().parents[1] / "paper_figures").glob("peers_*.json")
    ):
        r = runner.load_result(path)
        assert {"bicubic", "span", "animevideov3", "x4plus"} <= r["models"].keys() and r[
            "protocol"
        ]["machine"]["cpu"]
        for m in r["models"].values():
            assert all(
                isinstance(v, str) or len(v) == len(r["keys"]) for v in m["values"].values()
            ) and len(m["cpu_seconds"]) == len(r["keys"])
        if r["set"] == "degraded":
            assert (
                r["keys"]
                == [
                    test_sets._crop_key(row, Path(), True)
                    for row in test_sets.packaged_manifest()["crops"]
                ][: len(r["keys"])]
            )


# a saved pipeline, and the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from tocsr.core.config import UNetConfig
    from tocsr.inference.pipeline import TOCSRPipeline
    from tocsr.models.autoencoder import fit_pca
    from tocsr.models.diffusion import nano_unet, noise_schedule
    from tocsr.models.generator import add_condition_channels
    from tocsr.models.staged_unet import split_into_stages

    torch.manual_seed(0)
    cfg = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
    vae = fit_pca(torch.cat([make_image(i, 64, 64) for i in range(8)]))
    pipe = TOCSRPipeline(
        vae,
        add_condition_channels(split_into_stages(nano_unet(cfg, 16)), 16),
        noise_schedule("v_prediction"),
    )
    return pipe.save_pretrained(tmp_path_factory.mktemp("pipe") / "tiny")


def test_a_saved_pipeline_is_a_method(folder, saved):
    r = CliRunner().invoke(
        app,
        [
            "eval",
            "--dataset",
            "RealSR",
            "--root",
            str(folder),
            "--model",
            str(saved),
            "--model",
            "bicubic",
            "--metrics",
            "psnry",
            "--limit",
            "2",
            "--threads",
            "1",
            "--json",
        ],
    )
    result = json.loads(r.stdout)
    assert (
        r.exit_code == 0
        and set(result["models"]) == {"tiny", "bicubic"}
        and len(result["images"]) == 2
        and result["protocol"]["threads"] == 1
    )
    assert str(folder) not in r.stdout and str(saved) not in r.stdout, (
        "no path of this machine in a result"
    )
    rows = speed.bench_methods([saved, "bicubic"], sizes=(16,), dtypes=("fp32", "bf16"), repeats=1)
    assert rows[2]["dB to fp32"] > 20 and rows[2]["seconds"] > 0


def test_the_table_in_the_terminal(folder):
    r = CliRunner().invoke(
        app,
        [
            "eval",
            "--dataset",
            "RealSR",
            "--root",
            str(folder),
            "--model",
            "bicubic",
            "--metrics",
            "psnry,lpips",
        ],
    )
    assert (
        r.exit_code == 0
        and "a part of the set" in r.stdout
        and "bicubic" in r.stdout
        and "not available: no file $TORCH_HOME" in r.stdout
    )


@pytest.mark.parametrize(
    "args, code, word",
    [
        (("--dataset", "Set6"), 2, "Set5, Set14"),
        (("--dataset", "RealSR", "--metrics", "psnrx"), 2, "psnry"),
        (("--dataset", "RealSR", "--metrics", ","), 2, "no metric"),
        (("--dataset", "RealSR", "--model", "nope"), 1, "nope"),
        (("--dataset", "RealSR", "--root", "nowhere"), 1, "StableSR"),
        (("--dataset", "degraded"), 1, "fetch-photos"),
        (("--dataset", "degraded", "--root", "nowhere"), 1, "lacks"),
        (("--dataset", "RealSR", "--limit", "0"), 2, "limit"),
        ((), 2, "dataset"),
    ],
)
def test_bad_input_is_one_line(args, code, word, monkeypatch):
    monkeypatch.delenv("TOCSR_DATA", raising=False)
    r = CliRunner().invoke(app, ["eval", *args])
    assert r.exit_code == code and word in r.stderr and "Traceback" not in r.stderr, r.stderr


def test_a_folder_without_a_model_is_an_error(folder):
    from tocsr.core.files import save_weights

    save_weights(folder / "other.safetensors", dict(x=torch.zeros(2)))
    (folder / "text.txt").write_text("no weights")
    for path in (folder, folder / "other.safetensors", folder / "text.txt"):
        r = CliRunner().invoke(
            app, ["eval", "--dataset", "RealSR", "--root", str(folder), "--model", str(path)]
        )
        assert (
            r.exit_code == 1
            and r.stderr.strip().splitlines()[-1].startswith("tocsr: ")
            and "Traceback" not in r.stderr
            and str(path) in r.stderr
        ), r.stderr
        assert "delete" not in r.stderr, "these files are the user's"


def test_the_released_model_has_one_name():
    assert (
        methods.open_method("tocsr").title == "TOC-SR (released)"
        and methods.open_method("tocsr").missing is None
    )
    assert "tocsr" in methods.NAMED_METHODS and not {"ours", "ours_damaged"} & set(
        methods.SR_METHODS
    )
    with pytest.raises(test_sets.EvalError, match="tocsr"):
        methods.open_method("ours_damaged")


def test_a_grid_of_crops(folder):
    def run(*a):
        return CliRunner().invoke(
            app,
            [
                "eval",
                "--dataset",
                "RealSR",
                "--root",
                str(folder),
                "--model",
                "bicubic",
                "--metrics",
                "psnry",
                *map(str, a),
            ],
        )

    r = run("--save-grid", folder / "a.png", "--crop", "2:8,0,32", "--crop", "4:0,0,64")
    assert r.exit_code == 0, r.stderr
    w, h = Image.open(folder / "a.png").size
    assert w >= 3 * 256 and h >= 2 * 2 * 256  # two rows of LR, bicubic, HR above their details
    assert (
        run("--save-grid", folder / "b.jpg").exit_code == 0
        and Image.open(folder / "b.jpg").size[1] > h
        and Image.open(folder / "b.jpg").format == "JPEG"
    )  # four rows
    for args, code, word in (
        (("--save-grid", folder / "c.gif"), 2, ".jpg"),
        (("--crop", "1:0,0,32"), 2, "--save-grid"),
        (("--save-grid", folder / "c.png", "--crop", "0:0,0,32"), 2, "NUMBER:LEFT"),
        (("--save-grid", folder / "c.png", "--crop", "1:0,0,999"), 1, "leaves"),
        (("--save-grid", folder / "c.png", "--crop", "9:0,0,32"), 1, "has 4"),
    ):
        r = run(*args)
        assert r.exit_code == code and word in r.stderr and "Traceback" not in r.stderr, r.stderr
    assert not (folder / "c.png").exists()
