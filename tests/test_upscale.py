"The command: kinds of pictures, what is kept, what is refused, resuming, interrupts, full disks."
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms
from typer.testing import CliRunner
from tocsr import cli, upscale as files
from tocsr.adapt import condition
from tocsr.degradations import imresize
from tocsr.diffusion import nano_unet, noise_schedule
from tocsr.images import to_array, to_tensor
from tocsr.latents import LatentCodec, fit_pca
from tocsr.onestep import Generator, save_generator
from tocsr.profiles import UNetConfig
from tocsr.store import save_weights
from tocsr.surrogates import cut

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A folder with a tiny untrained model."
    torch.manual_seed(0)
    cfg = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
    smooth = F.interpolate(torch.rand(8, 3, 16, 16), 64, mode="bicubic").clamp(0, 1)*2 - 1
    generator = Generator(LatentCodec(fit_pca(smooth)), condition(cut(nano_unet(cfg, 16)), 16), noise_schedule("v_prediction"))
    return save_generator(tmp_path_factory.mktemp("m")/"model", generator, 4, 8, licence="a licence")


def double(x, progress):
    "Stands for a model where only files matter."
    progress(1.)
    return imresize(x, 2).clamp(-1, 1)


def picture(h=12, w=16, seed=0):
    x = imresize(torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)), size=(h, w)).clamp(0, 1)
    return Image.fromarray((x*255).byte().permute(1, 2, 0).numpy())


def call(*args):
    return CliRunner().invoke(cli.app, list(map(str, args)))


def one(tmp_path, im, name, to=None, **kw):
    "An image saved, doubled, and opened again; notes."
    im.save(tmp_path/name, **kw)
    target = tmp_path/(to or f"big_{name}")
    out, = files.upscale_files(files.plan([str(tmp_path/name)], str(target)), double, 2)
    assert out.status == "done", out.error
    big = Image.open(target); big.load()
    return big, out


def test_command_makes_the_models_picture(model, tmp_path):
    picture().save(tmp_path/"a.png")
    r = call("upscale", tmp_path/"a.png", "-o", tmp_path/"b.png", "--model", model, "--device", "cpu")
    assert r.exit_code == 0 and "64 x 48" in r.stdout and "1 of 1 picture enlarged" in r.stderr, r.stderr
    from tocsr.pipeline import TOCSRPipeline
    want = TOCSRPipeline.from_pretrained(model)(picture(), output_type="np").images[0]
    assert np.abs(np.asarray(Image.open(tmp_path/"b.png")).astype(int) - want).max() <= 1


def test_scale_strength_format_json_and_resuming(model, tmp_path):
    (tmp_path/"in/deep").mkdir(parents=True)
    picture().save(tmp_path/"in/a.png"); picture(8, 8).save(tmp_path/"in/deep/b.jpg"); (tmp_path/"in/c.png").write_text("no picture")
    args = ("upscale", tmp_path/"in", "-o", tmp_path/"out", "--model", model, "--scale", 1.5, "--strength", 0, "--format", "webp", "--json")
    r = call(*args)
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    assert r.exit_code == 1 and [x["status"] for x in rows[:-1]] == ["done", "failed", "done"] and rows[0]["result"] == [24, 18]
    assert "c.png" in rows[1]["error"] and {k: rows[-1]["summary"][k] for k in ("total", "done", "failed")} == dict(total=3, done=2, failed=1)
    assert Image.open(tmp_path/"out/deep/b.webp").size == (12, 12) and not (tmp_path/"out/c.webp").exists()
    before = (tmp_path/"out/a.webp").stat().st_mtime_ns
    picture().save(tmp_path/"in/c.png")
    again = call(*args)
    assert again.exit_code == 0 and [json.loads(line)["status"] for line in again.stdout.splitlines()[:-1]] == ["unchanged", "done", "unchanged"]
    assert (tmp_path/"out/a.webp").stat().st_mtime_ns == before
    other = call(*args, "--seed", 3)
    assert other.exit_code == 2 and "--overwrite" in other.stderr and "2 more" in other.stderr and len(other.stderr.strip().splitlines()) == 1
    assert call(*args, "--seed", 3, "--overwrite").exit_code == 0 and (tmp_path/"out/a.webp").stat().st_mtime_ns != before


def test_clean_pictures_are_agreed_with_in_every_pixel(model, tmp_path):
    picture().save(tmp_path/"a.png")
    small, far = to_tensor(np.array(picture().convert("RGB"))[None]), {}
    for name, flag in dict(plain=(), clean=("--clean",), damaged=("--damaged",)).items():
        r = call("upscale", tmp_path/"a.png", "-o", tmp_path/f"{name}.png", "--model", model, "--json", *flag)
        assert r.exit_code == 0 and json.loads(r.stdout.splitlines()[0])["clean"] == (name == "clean")
        far[name] = (imresize(to_tensor(np.array(Image.open(tmp_path/f"{name}.png").convert("RGB"))[None]), 1/4) - small).abs().mean().item()*127.5
    assert far["clean"] < far["plain"]/2 and far["damaged"] == far["plain"]      # this model has no judge


def test_the_shipped_judge_trusts_clean_photographs_and_not_noisy_ones(tmp_path):
    from skimage import data
    small = imresize(to_tensor(data.astronaut()[None]), 1/4).clamp(-1, 1)
    noisy = (small + .16*torch.randn(small.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    Image.fromarray(to_array(small[0])).save(tmp_path/"clean.png"); Image.fromarray(to_array(noisy[0])).save(tmp_path/"noisy.png")
    rows = [json.loads(line) for line in call("upscale", tmp_path/"clean.png", tmp_path/"noisy.png", "-o", f"{tmp_path/'out'}/", "--json").stdout.splitlines()[:-1]]
    assert {Path(r["input"]).stem: r["clean"] for r in rows} == dict(clean=True, noisy=False)


def test_a_result_that_was_changed_or_came_from_another_input_is_in_the_way(tmp_path):
    picture().save(tmp_path/"a.png")
    jobs, journal = files.plan([str(tmp_path/"a.png")], f"{tmp_path/'out'}/"), files.Journal(tmp_path/"out")
    list(files.upscale_files(jobs, double, 2, journal))
    assert files.finished(jobs, files.Journal(tmp_path/"out"), {}, False) == set(jobs)
    picture(seed=1).save(tmp_path/"a.png")
    with pytest.raises(files.UsageError, match="same input"): files.finished(jobs, files.Journal(tmp_path/"out"), {}, False)
    picture().save(tmp_path/"a.png"); jobs[0].target.write_bytes(b"by hand")
    with pytest.raises(files.UsageError, match="same input"): files.finished(jobs, files.Journal(tmp_path/"out"), {}, False)
    with open(tmp_path/"out"/files.JOURNAL, "a") as f: f.write('{"file": "b')          # torn by a crash
    assert list(files.Journal(tmp_path/"out").rows) == ["a.png"]
    list(files.upscale_files(jobs, double, 2, files.Journal(tmp_path/"out")))
    assert files.finished(jobs, files.Journal(tmp_path/"out"), {}, False) == set(jobs)


def process(*args, **kw):
    "The command in a process of its own."
    code = "from tocsr.cli import app; app()"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONIOENCODING="utf-8:strict"), **kw)


def test_standard_input_and_output(model, tmp_path):
    data = io.BytesIO(); picture().save(data, "JPEG")
    r = process("upscale", "-", "-o", "-", "--model", model, input=data.getvalue())
    assert r.returncode == 0 and (im := Image.open(io.BytesIO(r.stdout))).format == "JPEG" and im.size == (64, 48), r.stderr
    r = process("upscale", "-", "-o", f"{tmp_path}/results/", "--model", model, input=data.getvalue())
    assert r.returncode == 0 and [f.suffix for f in (tmp_path/"results").iterdir() if f.is_file() and not f.name.startswith(".")] == [".png"], r.stderr


def test_a_name_that_is_no_utf8(model, tmp_path):
    (tmp_path/"in").mkdir()
    for name in (b"a.png", b"caf\xe9.png", b"z.png"): picture().save(tmp_path/"in"/os.fsdecode(name))
    for how in ((), ("--json", "--overwrite")):
        r = process("upscale", tmp_path/"in", "-o", tmp_path/"out", "--model", model, *how)
        assert r.returncode == 0 and len(list((tmp_path/"out").glob("*.png"))) == 3, r.stderr
    assert [json.loads(line) for line in r.stdout.splitlines()]


def test_results_may_stand_above_the_inputs(model, tmp_path):
    (tmp_path/"in").mkdir(); picture().save(tmp_path/"in/a.png")
    assert call("upscale", tmp_path/"in", "-o", tmp_path, "--model", model).exit_code == 0 and Image.open(tmp_path/"a.png").size == (64, 48)


@pytest.mark.parametrize("mode, name, back", [("RGB", "a.jpg", "RGB"), ("L", "a.jpg", "L"), ("L", "a.png", "L"), ("1", "a.png", "L"), ("P", "a.png", "RGB"), ("P", "a.gif", "RGB"), ("RGBA", "a.png", "RGBA"), ("LA", "a.png", "LA"),
                                              ("RGBA", "a.webp", "RGBA"), ("RGB", "a.bmp", "RGB"), ("CMYK", "a.tif", "RGB"), ("CMYK", "a.jpg", "RGB"), ("RGB", "a.tiff", "RGB"), ("RGBA", "a.tif", "RGBA")])
def test_modes(tmp_path, mode, name, back):
    im = picture().convert(mode)
    if mode.endswith("A"): im.putalpha(Image.linear_gradient("L").resize(im.size).point(lambda v: max(1, v)))
    big, out = one(tmp_path, im, name, "big.png" if name.endswith(".gif") else None)
    assert big.size == (32, 24) and big.mode == back
    want = imresize(torch.from_numpy(np.array(im.convert("RGB"))).permute(2, 0, 1).float(), 2).clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(big.convert("RGB")) - want).mean() < (16 if mode in ("1", "CMYK") or name.endswith(("jpg", "webp")) else 1)   # JPEG halves the colour of so small a picture
    assert any("CMYK" in n for n in out.notes) == (mode == "CMYK")


def test_sixteen_bits_survive(tmp_path):
    deep = np.linspace(20000, 20400, 12*16).reshape(12, 16).astype(np.uint16)               # less than two steps of eight bits
    big, _ = one(tmp_path, Image.fromarray(deep), "grey.png")
    assert big.mode.startswith("I;16") and len(np.unique(np.asarray(big))) > 100
    grey, _ = one(tmp_path, Image.fromarray(deep), "grey.tif")
    assert np.abs(np.asarray(grey).astype(int) - np.asarray(big)).max() <= 1
    colour = torch.from_numpy(np.stack([deep, deep + 100, 65535 - deep]).astype(np.float32))/32767.5 - 1
    for f in ("png", "tiff"):
        data, _ = files.encode_picture(files.Picture(colour, bits=16), files.FORMATS[f])
        p = files.read_picture(data)
        assert p.bits == 16 and torch.allclose(p.colour, colour, atol=1e-6)


def test_hidden_colours_do_not_bleed(tmp_path):
    a = np.zeros((16, 16, 4), np.uint8); a[4:12, 4:12] = (200, 180, 160, 255)                  # on hidden black
    big, _ = one(tmp_path, Image.fromarray(a), "a.png")
    out = np.asarray(big)
    assert np.abs(out[out[..., 3] > 20][:, :3].astype(int) - (200, 180, 160)).max() <= 2


def test_orientation_exif_and_profile_are_kept(tmp_path):
    exif, icc = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif[0x0112], exif[0x010F], exif.get_ifd(0x8769)[0xA002] = 6, "a maker", 16
    for name in ("a.jpg", "a.png", "a.webp", "a.tif"):
        big, _ = one(tmp_path, picture(), name, exif=exif.tobytes(), icc_profile=icc, **({"compression": "raw"} if name == "a.tif" else {}))
        found = big.getexif()
        assert big.size == (24, 32) and found.get(0x0112, 1) == 1 and found[0x010F] == "a maker" and big.info["icc_profile"] == icc, name
        assert found.get_ifd(0x8769)[0xA002] == 24, name
        assert np.abs(np.asarray(big.convert("RGB")).astype(float) - np.asarray(picture().rotate(-90, expand=True).resize((24, 32), Image.BICUBIC))).mean() < 16, name


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (2, 30000)])
def test_odd_sizes(tmp_path, size):
    big, _ = one(tmp_path, picture(*size), "a.png")
    assert big.size == (2*size[1], 2*size[0])


def test_what_a_format_cannot_hold_is_said_before_computing(tmp_path):
    picture(2, 30000).save(tmp_path/"long.png")
    never = lambda x, progress: pytest.fail("computed")
    out, = files.upscale_files(files.plan([str(tmp_path/"long.png")], str(tmp_path/"long.jpg")), never, 4)
    assert out.status == "failed" and "JPEG" in out.error and "--format png" in out.error and not (tmp_path/"long.jpg").exists()
    big, out = one(tmp_path, picture().convert("RGBA"), "a.png", "a.jpg")
    assert big.mode == "RGB" and "white" in out.notes[0]


def test_first_frame_with_a_note(tmp_path):
    for name in ("a.gif", "a.webp", "a.tif"):
        big, out = one(tmp_path, picture(), name, "big.png", save_all=True, append_images=[picture(seed=1), picture(seed=2)])
        assert big.size == (32, 24) and "first of 3" in out.notes[0], name


def test_one_bad_file_among_fifty(tmp_path):
    (tmp_path/"in").mkdir()
    for i in range(50): picture(4, 4, i).save(tmp_path/f"in/{i:02d}.png")
    (tmp_path/"in/17.png").write_bytes((tmp_path/"in/17.png").read_bytes()[:60])
    out = list(files.upscale_files(files.plan([str(tmp_path/"in")], str(tmp_path/"out")), double, 2))
    bad, = [o for o in out if o.status == "failed"]
    assert len(out) == 50 and "17.png" in bad.error and "\n" not in bad.error and len(list((tmp_path/"out").iterdir())) == 49


def test_bombs_are_refused_and_the_limit_can_be_raised(tmp_path):
    Image.new("1", (3000, 2000)).save(tmp_path/"bomb.png")
    jobs = files.plan([str(tmp_path/"bomb.png")], str(tmp_path/"out.png"))
    out, = files.upscale_files(jobs, double, 2, max_pixels=10**6)
    assert "--max-mpixel" in out.error and "3000 x 2000" in out.error
    Image.MAX_IMAGE_PIXELS, old = 10**6, Image.MAX_IMAGE_PIXELS                                # Pillow's own limit does not stand in the way
    try: assert files.read_picture(tmp_path/"bomb.png", max_pixels=10**7).size == (3000, 2000)
    finally: Image.MAX_IMAGE_PIXELS = old


def test_full_disk_stops_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path/"in").mkdir()
    for i in range(5): picture(4, 4, i).save(tmp_path/f"in/{i}.png")
    real, count = files.write_atomic, iter(range(99))
    def full(path, data):
        if next(count) >= 2: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)
    monkeypatch.setattr(files, "write_atomic", full)
    got = []
    with pytest.raises(files.Stopped, match="No space left"):
        for o in files.upscale_files(files.plan([str(tmp_path/"in")], str(tmp_path/"out")), double, 2): got.append(o)
    assert [o.status for o in got] == ["done"]*2 and sorted(p.name for p in (tmp_path/"out").iterdir()) == ["0.png", "1.png"]


def test_a_file_too_large_to_write_leaves_nothing(tmp_path):
    picture(40, 40).save(tmp_path/"a.bmp")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try: out, = files.upscale_files(files.plan([str(tmp_path/"a.bmp")], str(tmp_path/"big.bmp")), double, 2)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old); signal.signal(signal.SIGXFSZ, handler)
    assert out.status == "failed" and "big.bmp" in out.error and sorted(p.name for p in tmp_path.iterdir()) == ["a.bmp"]


def test_unwritable_places_are_refused_before_computing(model, tmp_path):
    picture().save(tmp_path/"a.png"); (tmp_path/"file").write_text("")
    r = call("upscale", tmp_path/"a.png", "-o", tmp_path/"file/out/", "--model", model)
    assert r.exit_code == 1 and "cannot write into" in r.stderr and len(r.stderr.strip().splitlines()) == 1
    with pytest.raises(OSError, match="cannot write into"): files.make_folder(Path("/proc/nowhere"))


@pytest.mark.parametrize("args, code, words", [
    (("--scale", 8), 2, "at most 4"), (("--tile", 50), 2, "multiples of 16"), (("--strength", 2), 2, "0..1"), (("--steps", 4), 2, "1 step, not 4"), (("--steps", 0), 2, "1 step"), (("--device", "abacus"), 2, "abacus"),
    (("--format", "gif"), 2, "jpeg"), (("--model", "no/model"), 1, "no/model"), (("--model", "nowhere at all"), 1, "no model folder"), (("--quality", 0), 2, "quality")])
def test_wrong_arguments_are_one_line(model, tmp_path, args, code, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    picture().save(tmp_path/"a.png")
    r = call("upscale", tmp_path/"a.png", "-o", tmp_path/"b.png", *(() if "--model" in args else ("--model", model)), *args)
    assert r.exit_code == code and words in r.stderr and "Traceback" not in r.stderr and not (tmp_path/"b.png").exists(), r.stderr
    assert len(r.stderr.strip().splitlines()) == 1 or "Usage" in r.stderr


def test_broken_models_are_one_line(model, tmp_path):
    import shutil
    picture().save(tmp_path/"a.png")
    run = lambda: call("upscale", tmp_path/"a.png", "-o", tmp_path/"b.png", "--model", tmp_path/"m")
    vae, unet = tmp_path/"m/vae/diffusion_pytorch_model.safetensors", tmp_path/"m/unet/model.safetensors"
    for damage, words in ((lambda: vae.write_bytes(vae.read_bytes()[:500]), "truncated"), (lambda: unet.write_bytes(b"x"*100), "truncated"), (lambda: unet.unlink(), "no weights"),
                          (lambda: save_weights(unet, dict(a=torch.zeros(3))), "another architecture"), (lambda: save_weights(vae, dict(a=torch.zeros(3)), format="pt"), "another architecture"),
                          (lambda: (tmp_path/"m/config.json").write_text("{"), "damaged"), (lambda: (tmp_path/"m/config.json").unlink(), "config.json is missing")):
        shutil.copytree(model, tmp_path/"m", dirs_exist_ok=True)
        damage()
        r = run()
        assert r.exit_code == 1 and words in r.stderr and "Traceback" not in r.stderr and len(r.stderr.strip().splitlines()) == 1 and not (tmp_path/"b.png").exists(), (words, r.stderr)


def test_debug_shows_where_a_picture_failed(model, tmp_path):
    (tmp_path/"a.png").write_text("no picture")
    quiet = call("upscale", tmp_path/"a.png", "-o", tmp_path/"b.png", "--model", model)
    assert quiet.exit_code == 1 and "a.png: not an image" in quiet.stderr
    with pytest.raises(files.ImageError): CliRunner().invoke(cli.app, ["--debug", "upscale", str(tmp_path/"a.png"), "-o", str(tmp_path/"b.png"), "--model", str(model)], catch_exceptions=False)


SLOW = """
import sys, time
from tocsr import pipeline
def slow(self, x, progress, **kw):
    print("computing", file=sys.stderr, flush=True)
    if len(list(__import__("pathlib").Path(sys.argv[4]).glob("*.png"))): time.sleep(600)
    return pipeline.UpscaleOutput(images=[x], trusted=[False])
pipeline.TOCSRPipeline.__call__ = slow
from tocsr.cli import app; app()
"""


def test_interrupt_keeps_what_is_finished_and_nothing_else(model, tmp_path):
    (tmp_path/"in").mkdir()
    for i in range(3): picture(seed=i).save(tmp_path/f"in/{i}.png")
    child = subprocess.Popen([sys.executable, "-c", SLOW, "upscale", str(tmp_path/"in"), "-o", str(tmp_path/"out"), "--model", str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | dict(PYTHONPATH=str(ROOT)), start_new_session=True)
    seen = 0
    for line in child.stderr:
        seen += line.startswith("computing")
        if seen == 2: break
    time.sleep(0.2)
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "interrupted" in err and "Traceback" not in err and "1 of 3 pictures enlarged, 2 not tried" in err, err
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == [files.JOURNAL, "0.png"]


def test_info(model):
    text, data = call("info", "--model", model).stdout, json.loads(call("info", "--model", model, "--json").stdout)
    assert "a licence" in text and "4x" in text and data["scale"] == 4 and data["multiple"] == 16 and data["parameters"] >= data["backbone_parameters"] > 0 and data["macs_per_pixel"] > 0
    r = call("info", "--model", model.parent)
    assert r.exit_code == 1 and "config.json is missing" in r.stderr
