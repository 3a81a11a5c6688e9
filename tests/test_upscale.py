"The command: image modes, what is kept and refused, continuing, interrupts, full disks."

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageCms
from typer.testing import CliRunner

from tocsr.cli import main
from tocsr.core.config import UNetConfig
from tocsr.core.files import save_weights
from tocsr.core.image import ImageError, imresize, to_tensor
from tocsr.inference import batch, image_files
from tocsr.inference.metadata import EXIF_IFD, EXIF_SIZE, Metadata
from tocsr.inference.pipeline import TOCSRPipeline
from tocsr.models.autoencoder import fit_pca
from tocsr.models.diffusion import nano_unet, noise_schedule
from tocsr.models.generator import add_condition_channels
from tocsr.models.staged_unet import split_into_stages

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A folder with a tiny untrained model."
    torch.manual_seed(0)
    cfg = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
    smooth = F.interpolate(torch.rand(8, 3, 16, 16), 64, mode="bicubic").clamp(0, 1) * 2 - 1
    unet = add_condition_channels(split_into_stages(nano_unet(cfg, 16)), 16)
    pipe = TOCSRPipeline(
        fit_pca(smooth),
        unet,
        noise_schedule("v_prediction"),
        consistency_factor=4,
        about=dict(license="a license"),
    )
    return pipe.save_pretrained(tmp_path_factory.mktemp("m") / "model")


def double(x, progress):
    "Stands for a model where only files matter."
    progress(1.0)
    return imresize(x, 2).clamp(-1, 1)


def make_image(h=12, w=16, seed=0):
    x = imresize(
        torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)), size=(h, w)
    ).clamp(0, 1)
    return Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy())


def call(*args):
    return CliRunner().invoke(main.app, list(map(str, args)))


def one(tmp_path, im, name, to=None, **kw):
    "An image saved, doubled, and opened again; notes."
    im.save(tmp_path / name, **kw)
    target = tmp_path / (to or f"big_{name}")
    (out,) = batch.upscale_files(batch.plan_jobs([str(tmp_path / name)], str(target)), double, 2)
    assert out.status == "done", out.error
    big = Image.open(target)
    big.load()
    return big, out


def test_the_command_writes_the_models_result(model, tmp_path):
    make_image().save(tmp_path / "a.png")
    r = call(
        "upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--model", model, "--device", "cpu"
    )
    assert r.exit_code == 0 and "64 x 48" in r.stdout and "1 of 1 image upscaled" in r.stderr, (
        r.stderr
    )
    want = np.asarray(TOCSRPipeline.from_pretrained(model)(make_image()).images[0]).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "b.png")).astype(int) - want).max() <= 1


def test_scale_strength_format_json_and_resuming(model, tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    make_image().save(tmp_path / "in/a.png")
    make_image(8, 8).save(tmp_path / "in/deep/b.jpg")
    (tmp_path / "in/c.png").write_text("no image")
    args = (
        "upscale",
        tmp_path / "in",
        "-o",
        tmp_path / "out",
        "--model",
        model,
        "--scale",
        1.5,
        "--strength",
        0,
        "--format",
        "webp",
        "--json",
    )
    r = call(*args)
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    assert (
        r.exit_code == 1
        and [x["status"] for x in rows[:-1]] == ["done", "failed", "done"]
        and rows[0]["result"] == [24, 18]
    )
    assert "c.png" in rows[1]["error"] and {
        k: rows[-1]["summary"][k] for k in ("total", "done", "failed")
    } == dict(total=3, done=2, failed=1)
    assert (
        Image.open(tmp_path / "out/deep/b.webp").size == (12, 12)
        and not (tmp_path / "out/c.webp").exists()
    )
    before = (tmp_path / "out/a.webp").stat().st_mtime_ns
    make_image().save(tmp_path / "in/c.png")
    again = call(*args)
    assert again.exit_code == 0 and [
        json.loads(line)["status"] for line in again.stdout.splitlines()[:-1]
    ] == ["unchanged", "done", "unchanged"]
    assert (tmp_path / "out/a.webp").stat().st_mtime_ns == before
    other = call(*args, "--seed", 3)
    assert (
        other.exit_code == 2
        and "--overwrite" in other.stderr
        and "2 more" in other.stderr
        and len(other.stderr.strip().splitlines()) == 1
    )
    assert (
        call(*args, "--seed", 3, "--overwrite").exit_code == 0
        and (tmp_path / "out/a.webp").stat().st_mtime_ns != before
    )


def test_consistency(model, tmp_path):
    make_image().save(tmp_path / "a.png")
    small = to_tensor(np.array(make_image()))[None]
    results = {}
    stderr = {}
    for i, flags in enumerate(
        (
            (),
            ("--consistency", 4),
            ("--consistency", 1),
            ("--clean",),
            ("--consistency", 8),
            ("--damaged",),
            ("--consistency", 0),
        )
    ):
        r = call(
            "upscale", tmp_path / "a.png", "-o", tmp_path / f"{i}.png", "--model", model, *flags
        )
        assert r.exit_code == 0, r.stderr
        results[flags] = to_tensor(np.array(Image.open(tmp_path / f"{i}.png")))[None]
        stderr[flags] = r.stderr

    def same(*flags):
        return torch.equal(*(results[f] for f in flags))

    assert (
        same((), ("--consistency", 4))
        and same(("--clean",), ("--consistency", 1))
        and same(("--damaged",), ("--consistency", 8))
    )

    def difference(flags):
        return (imresize(results[flags], 1 / 4) - small).abs().mean().item()

    assert difference(("--clean",)) < difference(()) / 2 < difference(("--consistency", 0)) / 2
    for flags, text in stderr.items():
        assert ("deprecated" in text) == (flags in (("--clean",), ("--damaged",))), text
    r = call(
        "upscale",
        tmp_path / "a.png",
        "-o",
        tmp_path / "b.png",
        "--model",
        model,
        "--clean",
        "--consistency",
        8,
    )
    assert r.exit_code == 2 and "--consistency 8" in r.stderr


def test_a_single_result_is_recognized(model, tmp_path):
    "Repeated, the command does nothing; with other settings the file is in the way."
    make_image().save(tmp_path / "a.png")
    args = ("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--model", model)
    assert call(*args).exit_code == 0
    before = (tmp_path / "b.png").stat().st_mtime_ns
    again = call(*args)
    assert (
        again.exit_code == 0
        and "there already" in again.stdout
        and (tmp_path / "b.png").stat().st_mtime_ns == before
    )
    other = call(*args, "--seed", 1)
    assert other.exit_code == 2 and "not the result of the same input and settings" in other.stderr


def test_help_texts_name_the_constants():
    text = " ".join(call("upscale", "--help").stdout.split())
    assert f"One of {', '.join(image_files.FORMATS)};" in text
    assert (
        f"default: {image_files.DEFAULT_QUALITY}." in text
        and f"default: {image_files.MAX_MEGAPIXELS}." in text
    )


def test_a_result_that_was_changed_or_came_from_another_input_is_in_the_way(tmp_path):
    make_image().save(tmp_path / "a.png")
    jobs = batch.plan_jobs([str(tmp_path / "a.png")], f"{tmp_path / 'out'}/")
    log = batch.ResultLog(tmp_path / "out")
    list(batch.upscale_files(jobs, double, 2, log))
    assert batch.finished_jobs(jobs, batch.ResultLog(tmp_path / "out"), {}, False) == set(jobs)
    make_image(seed=1).save(tmp_path / "a.png")
    with pytest.raises(image_files.UsageError, match="same input"):
        batch.finished_jobs(jobs, batch.ResultLog(tmp_path / "out"), {}, False)
    make_image().save(tmp_path / "a.png")
    jobs[0].target.write_bytes(b"by hand")
    with pytest.raises(image_files.UsageError, match="same input"):
        batch.finished_jobs(jobs, batch.ResultLog(tmp_path / "out"), {}, False)
    with open(tmp_path / "out" / batch.LOG_NAME, "a") as f:
        f.write('{"file": "b')  # cut off by a crash
    assert list(batch.ResultLog(tmp_path / "out").rows) == ["a.png"]
    list(batch.upscale_files(jobs, double, 2, batch.ResultLog(tmp_path / "out")))
    assert batch.finished_jobs(jobs, batch.ResultLog(tmp_path / "out"), {}, False) == set(jobs)


def process(*args, **kw):
    "The command in a process of its own."
    code = "from tocsr.cli.main import app; app()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONIOENCODING="utf-8:strict"),
        **kw,
    )


def test_standard_input_and_output(model, tmp_path):
    data = io.BytesIO()
    make_image().save(data, "JPEG")
    r = process("upscale", "-", "-o", "-", "--model", model, input=data.getvalue())
    assert (
        r.returncode == 0
        and (im := Image.open(io.BytesIO(r.stdout))).format == "JPEG"
        and im.size == (64, 48)
    ), r.stderr
    r = process(
        "upscale", "-", "-o", f"{tmp_path}/results/", "--model", model, input=data.getvalue()
    )
    assert r.returncode == 0 and [
        f.suffix
        for f in (tmp_path / "results").iterdir()
        if f.is_file() and not f.name.startswith(".")
    ] == [".png"], r.stderr


def test_a_name_that_is_no_utf8(model, tmp_path):
    (tmp_path / "in").mkdir()
    for name in (b"a.png", b"caf\xe9.png", b"z.png"):
        make_image().save(tmp_path / "in" / os.fsdecode(name))
    for how in ((), ("--json", "--overwrite")):
        r = process("upscale", tmp_path / "in", "-o", tmp_path / "out", "--model", model, *how)
        assert r.returncode == 0 and len(list((tmp_path / "out").glob("*.png"))) == 3, r.stderr
    assert [json.loads(line) for line in r.stdout.splitlines()]


def test_results_may_stand_above_the_inputs(model, tmp_path):
    (tmp_path / "in").mkdir()
    make_image().save(tmp_path / "in/a.png")
    assert call(
        "upscale", tmp_path / "in", "-o", tmp_path, "--model", model
    ).exit_code == 0 and Image.open(tmp_path / "a.png").size == (64, 48)


@pytest.mark.parametrize(
    "mode, name, back",
    [
        ("RGB", "a.jpg", "RGB"),
        ("L", "a.jpg", "L"),
        ("L", "a.png", "L"),
        ("1", "a.png", "L"),
        ("P", "a.png", "RGB"),
        ("P", "a.gif", "RGB"),
        ("RGBA", "a.png", "RGBA"),
        ("LA", "a.png", "LA"),
        ("RGBA", "a.webp", "RGBA"),
        ("RGB", "a.bmp", "RGB"),
        ("CMYK", "a.tif", "RGB"),
        ("CMYK", "a.jpg", "RGB"),
        ("RGB", "a.tiff", "RGB"),
        ("RGBA", "a.tif", "RGBA"),
    ],
)
def test_modes(tmp_path, mode, name, back):
    im = make_image().convert(mode)
    if mode.endswith("A"):
        im.putalpha(Image.linear_gradient("L").resize(im.size).point(lambda v: max(1, v)))
    big, out = one(tmp_path, im, name, "big.png" if name.endswith(".gif") else None)
    assert big.size == (32, 24) and big.mode == back
    want = (
        imresize(torch.from_numpy(np.array(im.convert("RGB"))).permute(2, 0, 1).float(), 2)
        .clamp(0, 255)
        .permute(1, 2, 0)
        .numpy()
    )
    assert np.abs(np.asarray(big.convert("RGB")) - want).mean() < (
        16 if mode in ("1", "CMYK") or name.endswith(("jpg", "webp")) else 1
    )  # JPEG halves the color of so small an image
    assert any("CMYK" in n for n in out.notes) == (mode == "CMYK")


def test_sixteen_bits_survive(tmp_path):
    deep = (
        np.linspace(20000, 20400, 12 * 16).reshape(12, 16).astype(np.uint16)
    )  # less than two steps of eight bits
    big, _ = one(tmp_path, Image.fromarray(deep), "gray.png")
    assert big.mode.startswith("I;16") and len(np.unique(np.asarray(big))) > 100
    gray, _ = one(tmp_path, Image.fromarray(deep), "gray.tif")
    assert np.abs(np.asarray(gray).astype(int) - np.asarray(big)).max() <= 1
    color = (
        torch.from_numpy(np.stack([deep, deep + 100, 65535 - deep]).astype(np.float32)) / 32767.5
        - 1
    )
    for f in ("png", "tiff"):
        data, _ = image_files.encode_image(
            image_files.DecodedImage(color, bits=16), image_files.FORMATS[f]
        )
        p = image_files.read_image_file(data)
        assert p.bits == 16 and torch.allclose(p.color, color, atol=1e-6)


def test_colors_of_transparent_pixels_do_not_bleed(tmp_path):
    a = np.zeros((16, 16, 4), np.uint8)
    a[4:12, 4:12] = (200, 180, 160, 255)  # on hidden black
    big, _ = one(tmp_path, Image.fromarray(a), "a.png")
    out = np.asarray(big)
    assert np.abs(out[out[..., 3] > 20][:, :3].astype(int) - (200, 180, 160)).max() <= 2


def test_orientation_exif_and_profile_are_kept(tmp_path):
    exif = Image.Exif()
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif[0x0112], exif[0x010F], exif.get_ifd(0x8769)[0xA002] = 6, "a maker", 16
    for name in ("a.jpg", "a.png", "a.webp", "a.tif"):
        big, _ = one(
            tmp_path,
            make_image(),
            name,
            exif=exif.tobytes(),
            icc_profile=icc,
            **({"compression": "raw"} if name == "a.tif" else {}),
        )
        found = big.getexif()
        assert (
            big.size == (24, 32)
            and found.get(0x0112, 1) == 1
            and found[0x010F] == "a maker"
            and big.info["icc_profile"] == icc
        ), name
        assert found.get_ifd(0x8769)[0xA002] == 24, name
        assert (
            np.abs(
                np.asarray(big.convert("RGB")).astype(float)
                - np.asarray(make_image().rotate(-90, expand=True).resize((24, 32), Image.BICUBIC))
            ).mean()
            < 16
        ), name


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (2, 30000)])
def test_odd_sizes(tmp_path, size):
    big, _ = one(tmp_path, make_image(*size), "a.png")
    assert big.size == (2 * size[1], 2 * size[0])


def test_formats_limits_are_checked_before_computing(tmp_path):
    make_image(2, 30000).save(tmp_path / "long.png")

    def never(x, progress):
        return pytest.fail("computed")

    (out,) = batch.upscale_files(
        batch.plan_jobs([str(tmp_path / "long.png")], str(tmp_path / "long.jpg")), never, 4
    )
    assert (
        out.status == "failed"
        and "JPEG" in out.error
        and "--format png" in out.error
        and not (tmp_path / "long.jpg").exists()
    )
    big, out = one(tmp_path, make_image().convert("RGBA"), "a.png", "a.jpg")
    assert big.mode == "RGB" and "white" in out.notes[0]


def test_first_frame_with_a_note(tmp_path):
    for name in ("a.gif", "a.webp", "a.tif"):
        big, out = one(
            tmp_path,
            make_image(),
            name,
            "big.png",
            save_all=True,
            append_images=[make_image(seed=1), make_image(seed=2)],
        )
        assert big.size == (32, 24) and "first of 3" in out.notes[0], name


def test_one_bad_file_among_fifty(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(50):
        make_image(4, 4, i).save(tmp_path / f"in/{i:02d}.png")
    (tmp_path / "in/17.png").write_bytes((tmp_path / "in/17.png").read_bytes()[:60])
    out = list(
        batch.upscale_files(
            batch.plan_jobs([str(tmp_path / "in")], str(tmp_path / "out")), double, 2
        )
    )
    (bad,) = [o for o in out if o.status == "failed"]
    assert (
        len(out) == 50
        and "17.png" in bad.error
        and "\n" not in bad.error
        and len(list((tmp_path / "out").iterdir())) == 49
    )


def test_bombs_are_refused_and_the_limit_can_be_raised(tmp_path):
    Image.new("1", (3000, 2000)).save(tmp_path / "bomb.png")
    jobs = batch.plan_jobs([str(tmp_path / "bomb.png")], str(tmp_path / "out.png"))
    (out,) = batch.upscale_files(jobs, double, 2, max_pixels=10**6)
    assert "--max-mpixel" in out.error and "3000 x 2000" in out.error
    Image.MAX_IMAGE_PIXELS, old = (
        10**6,
        Image.MAX_IMAGE_PIXELS,
    )  # Pillow's own limit does not stand in the way
    try:
        assert image_files.read_image_file(tmp_path / "bomb.png", max_pixels=10**7).size == (
            3000,
            2000,
        )
    finally:
        Image.MAX_IMAGE_PIXELS = old


def test_full_disk_stops_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(5):
        make_image(4, 4, i).save(tmp_path / f"in/{i}.png")
    real = batch.write_atomic
    count = iter(range(99))

    def full(path, data):
        if next(count) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    monkeypatch.setattr(batch, "write_atomic", full)
    got = []
    with pytest.raises(batch.FatalOutputError, match="No space left"):
        for o in batch.upscale_files(
            batch.plan_jobs([str(tmp_path / "in")], str(tmp_path / "out")), double, 2
        ):
            got.append(o)
    assert [o.status for o in got] == ["done"] * 2 and sorted(
        p.name for p in (tmp_path / "out").iterdir()
    ) == ["0.png", "1.png"]


def test_a_file_too_large_to_write_leaves_nothing(tmp_path):
    make_image(40, 40).save(tmp_path / "a.bmp")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        (out,) = batch.upscale_files(
            batch.plan_jobs([str(tmp_path / "a.bmp")], str(tmp_path / "big.bmp")), double, 2
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert (
        out.status == "failed"
        and "big.bmp" in out.error
        and sorted(p.name for p in tmp_path.iterdir()) == ["a.bmp"]
    )


def test_unwritable_places_are_refused_before_computing(model, tmp_path):
    make_image().save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    r = call("upscale", tmp_path / "a.png", "-o", tmp_path / "file/out/", "--model", model)
    assert (
        r.exit_code == 1
        and "cannot write into" in r.stderr
        and len(r.stderr.strip().splitlines()) == 1
    )
    with pytest.raises(OSError, match="cannot write into"):
        batch.make_folder(Path("/proc/nowhere"))


@pytest.mark.parametrize(
    "args, code, words",
    [
        (("--scale", 17), 2, "at most 16"),
        (("--scale", 0), 2, "above 0"),
        (("--consistency", -1), 2, "consistency"),
        (("--max-mpixel", "inf"), 2, "finite"),
        (("--tile", 50), 2, "multiples of 16"),
        (("--strength", 2), 2, "0..1"),
        (("--steps", 4), 2, "1 step, not 4"),
        (("--steps", 0), 2, "num_inference_steps"),
        (("--device", "abacus"), 2, "abacus"),
        (("--format", "gif"), 2, "jpeg"),
        (("--model", "no/model"), 1, "no/model"),
        (("--model", "nowhere at all"), 1, "no model folder"),
        (("--quality", 0), 2, "quality"),
    ],
)
def test_wrong_arguments_are_one_line(model, tmp_path, args, code, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_image().save(tmp_path / "a.png")
    r = call(
        "upscale",
        tmp_path / "a.png",
        "-o",
        tmp_path / "b.png",
        *(() if "--model" in args else ("--model", model)),
        *args,
    )
    assert (
        r.exit_code == code
        and words in r.stderr
        and "Traceback" not in r.stderr
        and not (tmp_path / "b.png").exists()
    ), r.stderr
    assert len(r.stderr.strip().splitlines()) == 1 or "Usage" in r.stderr


def test_broken_models_are_one_line(model, tmp_path):
    import shutil

    make_image().save(tmp_path / "a.png")

    def run():
        return call(
            "upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--model", tmp_path / "m"
        )

    vae, unet = (
        tmp_path / "m" / name / "diffusion_pytorch_model.safetensors" for name in ("vae", "unet")
    )
    index = tmp_path / "m/model_index.json"
    for damage, words in (
        (lambda: vae.write_bytes(vae.read_bytes()[:500]), "truncated"),
        (lambda: unet.write_bytes(b"x" * 100), "truncated"),
        (lambda: unet.unlink(), "no weights"),
        (lambda: save_weights(unet, dict(a=torch.zeros(3)), format="pt"), "another architecture"),
        (lambda: save_weights(vae, dict(a=torch.zeros(3)), format="pt"), "another architecture"),
        (lambda: index.write_text("{"), "model_index.json"),
        (lambda: index.unlink(), "model_index.json is missing"),
    ):
        shutil.copytree(model, tmp_path / "m", dirs_exist_ok=True)
        damage()
        r = run()
        assert (
            r.exit_code == 1
            and words in r.stderr
            and "Traceback" not in r.stderr
            and len(r.stderr.strip().splitlines()) == 1
            and not (tmp_path / "b.png").exists()
        ), (words, r.stderr)


def test_debug_raises_the_error_of_an_image(model, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    quiet = call("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--model", model)
    assert quiet.exit_code == 1 and "a.png: not an image" in quiet.stderr
    with pytest.raises(ImageError):
        CliRunner().invoke(
            main.app,
            [
                "--debug",
                "upscale",
                str(tmp_path / "a.png"),
                "-o",
                str(tmp_path / "b.png"),
                "--model",
                str(model),
            ],
            catch_exceptions=False,
        )


SLOW = """
import sys, time
from tocsr.inference import pipeline
def slow(self, x, progress, **kw):
    print("computing", file=sys.stderr, flush=True)
    if len(list(__import__("pathlib").Path(sys.argv[4]).glob("*.png"))): time.sleep(600)
    return x
pipeline.TOCSRPipeline.upscale_tensor = slow
from tocsr.cli.main import app; app()
"""


def test_interrupt_keeps_what_is_finished_and_nothing_else(model, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        make_image(seed=i).save(tmp_path / f"in/{i}.png")
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            SLOW,
            "upscale",
            str(tmp_path / "in"),
            "-o",
            str(tmp_path / "out"),
            "--model",
            str(model),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        start_new_session=True,
    )
    seen = 0
    for line in child.stderr:
        seen += line.startswith("computing")
        if seen == 2:
            break
    time.sleep(0.2)
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (
        child.returncode == 130
        and "interrupted" in err
        and "Traceback" not in err
        and "1 of 3 images upscaled, 2 not tried" in err
    ), err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [batch.LOG_NAME, "0.png"]


def test_info(model):
    text = call("info", "--model", model).stdout
    data = json.loads(call("info", "--model", model, "--json").stdout)
    assert (
        "a license" in text
        and "4: the downsampled result" in text
        and data["scale"] == 4
        and data["multiple"] == 16
        and data["parameters"] >= data["backbone_parameters"] > 0
        and data["macs_per_pixel"] > 0
    )
    r = call("info", "--model", model.parent)
    assert r.exit_code == 1 and "model_index.json is missing" in r.stderr


def test_a_log_of_an_interrupted_run_is_continued_and_its_lock_removed(tmp_path):
    make_image().save(tmp_path / "a.png")
    jobs = batch.plan_jobs([str(tmp_path / "a.png")], f"{tmp_path / 'out'}/")
    out = tmp_path / "out"
    out.mkdir()
    (out / batch.LOG_NAME).write_bytes(b'7\n{"file": ["x"]}\n\xff\n{"file": "b.png"}\n{"file": "c')
    log = batch.ResultLog(out)
    assert list(log.rows) == ["b.png"]
    list(batch.upscale_files(jobs, double, 2, log))
    assert sorted(batch.ResultLog(out).rows) == ["a.png", "b.png"]
    assert sorted(p.name for p in out.iterdir()) == [batch.LOG_NAME, "a.png"]


def test_a_lock_in_use_is_not_removed(tmp_path):
    log = batch.ResultLog(tmp_path)
    lock = tmp_path / f".{batch.LOG_NAME}.lock"
    with FileLock(lock):
        log.remove_lock_file()
        assert lock.exists()
    log.remove_lock_file()
    assert not lock.exists()


@pytest.fixture
def album(tmp_path):
    "A folder with three images, one of them in a subfolder, and a text."
    folder = tmp_path / "album"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.JPG", "b.gif", "deep/c.png"):
        make_image().save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize(
    "given, out, format, expected",
    [
        ("album", "large", None, ["large/a.JPG", "large/b.png", "large/deep/c.png"]),
        ("album", "album/x", "webp", ["album/x/a.webp", "album/x/b.webp", "album/x/deep/c.webp"]),
        ("album", ".", None, ["a.JPG", "b.png", "deep/c.png"]),
        ("album/*.JPG", "one.png", None, ["one.png"]),
    ],
)
def test_outputs_of_a_folder(album, monkeypatch, given, out, format, expected):
    monkeypatch.chdir(album.parent)
    assert [str(j.target) for j in batch.plan_jobs([given], out, format)] == expected


@pytest.mark.parametrize(
    "inputs, out, format, words",
    [
        (["album"], "-", None, "do not fit"),
        (["album/a.JPG"], "album", None, "is an input"),
        (["album"], "album", None, "is an input"),
        (["*.xyz"], "x", None, "no image"),
        (["album"], "x", "gif", "jpeg, png"),
        (["album/a.JPG", "album/deep/../a.JPG"], "x", None, "both become"),
        (["-", "a"], "x", None, "alone"),
        (["album/a.JPG"], "x.abc", None, "'.abc'"),
        (["album"], "album/notes.txt", None, "need a folder"),
        (["album/a.JPG"], "x.png", "jpeg", "suffix is not that of --format"),
    ],
)
def test_plans_that_are_refused(album, monkeypatch, inputs, out, format, words):
    monkeypatch.chdir(album.parent)
    with pytest.raises(image_files.UsageError) as e:
        batch.plan_jobs(inputs, out, format)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_empty_names_are_refused(model, tmp_path, monkeypatch):
    "Those of a shell variable that is not set; the current folder is not upscaled instead."
    monkeypatch.chdir(tmp_path)
    make_image().save("a.png")
    for args, words in ((("",), "an input is an empty name"), (("a.png", "-o", ""), "-o is an")):
        r = call("upscale", *args, "--model", model)
        assert r.exit_code == 2 and words in r.stderr, r.stderr
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["a.png"]


def test_standard_output_that_takes_a_part_gets_all(monkeypatch):
    "As with PYTHONUNBUFFERED, where `write` may write less than it is given."

    class Raw(io.BytesIO):
        def write(self, data):
            return super().write(data[:7])

    raw = Raw()
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=raw))
    batch._write(None, bytes(range(100)))
    assert raw.getvalue() == bytes(range(100))


PASSED_OVER = [".avif", ".heic", ".jp2", ".ppm", ".tga", ".txt", ""]


@pytest.mark.parametrize("count", range(1, 4))
def test_files_that_are_passed_over_are_counted_and_named(album, tmp_path, count):
    for i in range(count):
        for suffix in PASSED_OVER:
            (album / f"x{i}{suffix}").write_bytes(b"x")
        (album / f"link{i}").symlink_to(tmp_path)
    (album / ".hidden.avif").touch()
    found = batch.count_other_files([str(album), "-"])
    assert found[".avif"] == found["no suffix"] == count and found[".txt"] == count + 1
    assert found[batch.LINKED_FOLDER] == count and found.total() == 8 * count + 1
    counts = batch.count_results([], total=3, seconds=1, other=found)
    text = batch.format_summary(counts)
    assert f"{7 * count + 1} other files not looked at (.txt {count + 1}, " in text
    assert f"{count} linked folder" in text and counts["other"][".heic"] == count
    assert len(batch.plan_jobs([str(album)], str(tmp_path / "out"))) == 3


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.avif").touch()
    with pytest.raises(image_files.UsageError, match=r"1 other file not looked at \(\.avif 1\)"):
        batch.plan_jobs([str(tmp_path)], "out")
    assert batch.format_summary(batch.count_results([], 0, 1.0)).endswith("in 1.0 s")


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JFIF"])
def test_names_of_jpeg_files(tmp_path, suffix):
    make_image().save(tmp_path / f"a{suffix}", "JPEG")
    jobs = batch.plan_jobs([str(tmp_path)], str(tmp_path / "out"))
    (out,) = batch.upscale_files(jobs, double, 2)
    assert out.output.endswith(f"a{suffix}") and Image.open(out.output).format == "JPEG"


def test_reading_changes_no_setting_of_pillow_or_python():
    "In eight threads at once, with Pillow's limit below the images' size."
    tiff = encode(make_image(40, 40), "TIFF", compression="tiff_lzw")
    png = encode(make_image(40, 40), "PNG")
    filters = list(warnings.filters)
    old = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 100

    def read(data):
        seen.add(Image.MAX_IMAGE_PIXELS)
        return image_files.read_image_file(data).size

    try:
        for data in (tiff, png):
            seen = set()
            with ThreadPoolExecutor(8) as pool:
                assert set(pool.map(read, [data] * 64)) == {(40, 40)}
            assert Image.MAX_IMAGE_PIXELS == 100
            assert seen == {100} or data is tiff
    finally:
        Image.MAX_IMAGE_PIXELS = old
    assert warnings.filters == filters


def test_standard_input_to_standard_output():
    assert batch.plan_jobs(["-"], "-") == [batch.Job(None, None, None)]


def encode(im, format, **how):
    "A Pillow image as the bytes of a file."
    buffer = io.BytesIO()
    im.save(buffer, format, **how)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, words",
    [
        (b"just a text", "not an image"),
        (b"", "not an image"),
        (encode(make_image(64, 64), "JPEG")[:900], "damaged"),
        (encode(Image.new("F", (2, 2)), "TIFF"), "floating point"),
        (encode(Image.new("1", (2000, 1000)), "PNG"), "--max-mpixel"),
    ],
)
def test_files_that_are_refused(data, words):
    with pytest.raises(ImageError) as e:
        image_files.read_image_file(data, "photo.png", max_pixels=10**6)
    assert words in str(e.value) and "photo.png" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(image_files.FORMATS))
def test_every_layout_through_every_format(bits, channels, name):
    f = image_files.FORMATS[name]
    deep = np.random.default_rng(0).integers(0, 65536, (4, 9, 14), dtype=np.uint16)
    if bits == 8:
        deep = deep >> 8 << 8 | deep >> 8
    x = torch.from_numpy(deep.astype(np.float32) / 65535)
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    width = EXIF_SIZE[0]
    exif.get_ifd(EXIF_IFD)[width] = 7
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    given = image_files.DecodedImage(
        (x[:1].expand(3, 9, 14) if channels < 3 else x[:3]) * 2 - 1,
        alpha=x[3:] if channels in (2, 4) else None,
        gray=channels < 3,
        bits=bits,
        metadata=Metadata(icc=icc if channels > 2 else None, exif=exif),
    )
    data, notes = image_files.encode_image(given, f)
    back = image_files.read_image_file(data)
    assert back.size == (14, 9) and (back.alpha is not None) == (f.alpha and channels in (2, 4))
    assert back.bits == (bits if f.deep else 8)
    assert back.gray == given.gray or name == "webp" or (name, bits, channels) == ("tiff", 16, 2)
    assert (bits == 16 and not f.deep) == any("16 bits" in n for n in notes)
    if f.deep:
        assert torch.allclose(back.color, given.color, atol=1e-6)
    if name == "bmp":
        assert any("does not hold" in n and "EXIF" in n for n in notes)
    else:
        back = back.metadata
        assert back.exif[0x010F] == "a maker" and back.icc == given.metadata.icc
        assert back.exif.get_ifd(EXIF_IFD)[width] == 14 and not back.notes


def test_transparent_pixels_take_visible_colors():
    color = torch.full((3, 9, 14), -1.0)
    alpha = torch.zeros(1, 9, 14)
    color[:, 2:4, 3:6] = 0.5
    alpha[:, 2:4, 3:6] = 1
    fill = image_files.fill_transparent
    assert torch.allclose(fill(color, alpha), torch.tensor(0.5))
    assert torch.equal(fill(color, alpha * 0), color)
    assert torch.equal(fill(color, alpha * 0 + 0.1), color)
