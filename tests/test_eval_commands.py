"`tocsr eval` on other programs' results, own folders and model files; `compare`; `export`."

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tocsr.cli.main import app
from tocsr.core.image import imresize, to_array, to_tensor
from tocsr.evaluation.metrics import psnr_y
from tocsr.evaluation.paired_comparison import paired_difference


def call(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def result_of(*args) -> dict:
    r = call("eval", *args, "--metrics", "psnry", "--threads", 1, "--json")
    assert r.exit_code == 0, r.stderr
    return json.loads(r.stdout)


def psnr_of(result: dict, name: str) -> list[float]:
    return result["models"][name]["values"]["psnry"]


def image(seed: int, height: int = 48, width: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def hr(tmp_path):
    folder = tmp_path / "hr"
    folder.mkdir()
    for i in (1, 2, 10):
        image(i).save(folder / f"img_{i}.png")
    return folder


def upscale_with_pillow(hr: Path, out: Path, scale: int) -> Path:
    out.mkdir()
    for f in hr.iterdir():
        im = Image.open(f)
        small = im.resize((im.width // scale, im.height // scale), Image.Resampling.BICUBIC)
        small.resize(im.size, Image.Resampling.BICUBIC).save(out / f"{f.stem}_x{scale}.png")
    return out


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_images_of_pillow_score_like_our_bicubic(hr, tmp_path, scale):
    "The borders, which Pillow treats differently, are cropped by the scale."
    if scale == 3:  # sides must be multiples
        for i in (1, 2, 10):
            image(i, 48, 66).save(hr / f"img_{i}.png")
    out = upscale_with_pillow(hr, tmp_path / "out", scale)
    args = ("--pairs", hr, "--scale", scale, "--model", "bicubic")
    r = result_of(*args, "--results", f"pil={out}")
    assert psnr_of(r, "pil") == pytest.approx(psnr_of(r, "bicubic"), abs=0.6)
    assert r["scale"] == r["protocol"]["border"] == scale
    for name, value in zip(r["images"], psnr_of(r, "pil")):
        a, b = (
            np.asarray(Image.open(f)) for f in (out / f"{name}_x{scale}.png", hr / f"{name}.png")
        )
        a, b = (torch.from_numpy(x.copy()).movedim(-1, 0) / 255 for x in (a, b))
        assert value == pytest.approx(psnr_y(a, b, scale), abs=1e-6)


def test_a_changed_image_is_scored_again_and_no_other(hr, tmp_path):
    out = upscale_with_pillow(hr, tmp_path / "out", 4)
    args = ("--pairs", hr, "--results", f"pil={out}")
    before = psnr_of(result_of(*args), "pil")
    Image.open(hr / "img_10.png").save(out / "img_10_x4.png")
    after = psnr_of(result_of(*args), "pil")
    assert after[1] == float("inf") and before[1] < 60
    assert after[0] == before[0] and after[2] == before[2]


def test_missing_doubled_and_missized_results_are_named(hr, tmp_path):
    out = upscale_with_pillow(hr, tmp_path / "out", 4)
    args = ("eval", "--pairs", hr, "--results", f"pil={out}", "--metrics", "psnry")
    image(0, 12, 16).save(out / "img_2_x4.png")
    r = call(*args)
    assert r.exit_code == 1 and "img_2_x4.png: 16x12 px" in r.stderr and "64x48" in r.stderr
    (out / "img_1_x4.png").unlink()
    r = call(*args)
    assert r.exit_code == 1 and "lacks 1 of 3 images, first img_1:" in r.stderr
    image(1).save(out / "img_1_a.png")
    image(1).save(out / "img_1_b.png")
    r = call(*args)
    assert r.exit_code == 1 and "img_1_a.png, img_1_b.png" in r.stderr


def test_pairs_with_lr_images(hr, tmp_path):
    lr = tmp_path / "lr"
    lr.mkdir()
    for f in hr.iterdir():
        Image.open(f).resize((32, 24), Image.Resampling.NEAREST).save(lr / f"{f.stem}.png")
    r = result_of("--pairs", hr, lr, "--model", "bicubic")
    x, y = (to_tensor(np.asarray(Image.open(d / "img_1.png")))[None] for d in (lr, hr))
    up = torch.from_numpy(to_array(imresize(x, 2)[0])).movedim(-1, 0) / 255
    assert r["scale"] == 2 and r["degradation"] == "as given"
    assert psnr_of(r, "bicubic")[0] == pytest.approx(psnr_y(up, (y[0] + 1) / 2, 2), abs=1e-4)
    Image.new("RGB", (30, 24)).save(lr / "img_2.png")
    r = call("eval", "--pairs", hr, lr, "--model", "bicubic")
    assert r.exit_code == 1 and "30x24 px for 64x48 px" in r.stderr


def expected_psnr(hr: Path, upscale, scale: int) -> list[float]:
    "PSNR-Y of a function of RGB in [0, 1], computed without the commands."
    values = []
    for file in sorted(hr.iterdir()):
        x = to_tensor(np.asarray(Image.open(file)))[None]
        lr = torch.from_numpy(to_array(imresize(x, 1 / scale))).movedim(-1, 1) / 255
        with torch.no_grad():
            sr = to_array(upscale(lr) * 2 - 1)[0]
        sr = torch.from_numpy(sr).movedim(-1, 0) / 255
        values.append(psnr_y(sr, (x[0] + 1) / 2, scale))
    return values


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_through_spandrel(hr, tmp_path, suffix):
    pytest.importorskip("spandrel")
    from safetensors.torch import save_file
    from spandrel.architectures.SPAN import SPAN

    torch.manual_seed(0)
    net = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2).eval()
    file = tmp_path / f"mine.{suffix}"
    weights = {k: v.contiguous() for k, v in net.state_dict().items()}
    (torch.save if suffix == "pth" else save_file)(weights, file)
    r = result_of("--pairs", hr, "--scale", 2, "--model", file)
    assert "SPAN" in r["models"]["mine"]["title"]
    assert psnr_of(r, "mine") == pytest.approx(expected_psnr(hr, net, 2), abs=0.01)
    r = call("eval", "--pairs", hr, "--model", file, "--metrics", "psnry")
    assert r.exit_code == 1 and "upscales by 2, the test set by 4" in r.stderr
    r = result_of("--pairs", hr, "--model", file, "--resize")
    assert "x2, resized" in r["models"]["mine"]["title"]


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "onnx"])
@pytest.mark.parametrize("kind", ["empty", "text", "other", "cut"])
def test_a_file_without_a_model_is_one_line(hr, tmp_path, suffix, kind):
    pytest.importorskip("onnxruntime" if suffix == "onnx" else "spandrel")
    from safetensors.torch import save

    file = tmp_path / f"mine.{suffix}"
    other = save(dict(a=torch.ones(300)))
    if suffix == "pth":
        torch.save(dict(epoch=3, loss=[0.1]), file)
        other = file.read_bytes()
    file.write_bytes(dict(empty=b"", text=b"hello", other=other, cut=other[:-100])[kind])
    content = file.read_bytes()
    r = call("eval", "--pairs", hr, "--model", file, "--metrics", "psnry")
    assert r.exit_code == 1 and str(file) in r.stderr, r.stderr
    assert r.stderr.count("\n") == 1 and "delete" not in r.stderr
    assert file.read_bytes() == content


def nearest_graph(path: Path, scale: int, *, half: bool = False, sides=("h", "w")) -> Path:
    "An ONNX graph that repeats every pixel."
    onnx = pytest.importorskip("onnx")
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    scales = onnx.numpy_helper.from_array(np.float32([1, 1, scale, scale]), "scales")
    mode = dict(mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric")
    node = onnx.helper.make_node("Resize", ["x", "", "scales"], ["y"], **mode)
    graph = onnx.helper.make_graph(
        [node],
        "nearest",
        [onnx.helper.make_tensor_value_info("x", kind, [1, 3, *sides])],
        [onnx.helper.make_tensor_value_info("y", kind, [1, 3, None, None])],
        [scales],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


@pytest.mark.parametrize("half", [False, True])
def test_another_projects_onnx_graph(hr, tmp_path, half):
    pytest.importorskip("onnxruntime")
    file = nearest_graph(tmp_path / "near.onnx", 2, half=half)
    r = result_of("--pairs", hr, "--scale", 2, "--model", file)

    def repeat(x):
        return torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")

    assert psnr_of(r, "near") == pytest.approx(expected_psnr(hr, repeat, 2), abs=0.02)
    r = call("eval", "--pairs", hr, "--model", file, "--metrics", "psnry")
    assert r.exit_code == 1 and "upscales by 2, the test set by 4" in r.stderr


def test_an_onnx_graph_of_one_size_is_refused(hr, tmp_path):
    pytest.importorskip("onnxruntime")
    file = nearest_graph(tmp_path / "fixed.onnx", 2, sides=(16, 16))
    r = call("eval", "--pairs", hr, "--scale", 2, "--model", file, "--metrics", "psnry")
    assert r.exit_code == 1 and "any height and width are needed" in r.stderr


def random_pipeline(folder: Path) -> Path:
    "A saved tileable pipeline with small random weights."
    from tocsr.core.config import UNetConfig
    from tocsr.inference.pipeline import TOCSRPipeline
    from tocsr.models.autoencoder import LowResAutoencoder
    from tocsr.models.diffusion import nano_unet, noise_schedule
    from tocsr.models.generator import add_condition_channels
    from tocsr.models.staged_unet import split_into_stages

    torch.manual_seed(0)
    thin = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
    vae = LowResAutoencoder(16, width=16, fine=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    unet = add_condition_channels(split_into_stages(nano_unet(thin, 16)), 16)
    pipe = TOCSRPipeline(vae, unet, noise_schedule("v_prediction"), tileable=True)
    for p in pipe.network.parameters():  # layers that start at zero
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return pipe.save_pretrained(folder)


def test_an_exported_model_scores_as_the_original(tmp_path):
    "Also where the image is larger than a tile of a model that is not tileable, 128 LR pixels."
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    hr = tmp_path / "hr"
    hr.mkdir()
    image(1).save(hr / "img_1.png")
    image(2, 64, 576).save(hr / "img_2.png")
    model = random_pipeline(tmp_path / "model")
    file = tmp_path / "x.onnx"
    r = call("export", "onnx", file, "--model", model)
    assert r.exit_code == 0 and f"wrote {file}" in r.stdout, r.stderr
    found = re.findall(r"(\d+) x (\d+): largest difference from torch (\S+)", r.stdout)
    assert len(found) == 2 and all(float(d) < 0.2 for *_, d in found)
    r = result_of("--pairs", hr, "--model", file, "--model", model)
    assert "ONNX" in r["models"]["x"]["title"]
    assert psnr_of(r, "x") == pytest.approx(psnr_of(r, "model"), abs=0.01)
    r = call("eval", "--pairs", hr, "--model", file, "--dtype", "bf16", "--metrics", "psnry")
    assert r.exit_code == 1 and "precision it was exported with" in r.stderr


def test_a_checkpoint_without_spandrel_is_refused(hr, tmp_path, monkeypatch):
    from tocsr.evaluation import model_files

    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    for name, package in (("a.pth", "spandrel"), ("a.onnx", "onnxruntime")):
        (tmp_path / name).write_bytes(b"x")
        r = call("eval", "--pairs", hr, "--model", tmp_path / name, "--metrics", "psnry")
        assert r.exit_code == 1 and package in r.stderr and "pip install" in r.stderr


@pytest.mark.parametrize(
    "args, word",
    [
        ((), "--dataset NAME or --pairs"),
        (("--dataset", "Set5", "--degradation", "bicubic"), "belong to --pairs"),
        (("--dataset", "Set5", "--pairs", "."), "either"),
        (("--pairs", ".", "--results", "out"), "NAME=FOLDER"),
        (("--pairs", ".", "--degradation", "fog"), "realesrgan"),
        (("--pairs", ".", ".", "--model", "bicubic"), "same size"),
        (("--dataset", "Set5", "--device", "cuda:99"), "not available here"),
    ],
)
def test_wrong_arguments_are_one_line(hr, monkeypatch, args, word):
    monkeypatch.chdir(hr)
    r = call("eval", *args)
    assert r.exit_code == 2 and word in r.stderr and "Traceback" not in r.stderr, r.stderr


def test_a_model_without_any_value_fails_the_command(hr, monkeypatch):
    from tocsr.evaluation import runner

    args = ("eval", "--pairs", hr, "--scale", 4, "--model", "bicubic", "--metrics", "psnry")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "measure", lambda names, *a, **k: dict.fromkeys(names, "lost"))
        r = call(*args)
    assert r.exit_code == 1 and "no value of bicubic" in r.stderr
    assert call(*args).exit_code == 0


def test_the_paired_interval_covers_the_true_difference():
    "95% intervals of 200 draws cover the true mean difference about 95% of the time."
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        hard = rng.normal(25, 4, 40)
        d = paired_difference(hard, hard + rng.normal(0.1, 0.3, 40), resamples=1000)
        hits += d["low"] <= 0.1 <= d["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_compare(hr, tmp_path):
    out = upscale_with_pillow(hr, tmp_path / "out", 4)
    a = result_of("--pairs", hr, "--model", "bicubic")
    b = result_of("--pairs", hr, "--results", f"pil={out}", "--limit", 2)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for f, r in zip(files, (a, b)):
        f.write_text(json.dumps(r))
    found = json.loads(call("compare", *files, "--json").stdout)
    expected = np.mean(psnr_of(b, "pil")) - np.mean(psnr_of(a, "bicubic")[:2])
    assert found["images"] == 2
    assert found["rows"][0]["result"]["difference"] == pytest.approx(expected)
    assert "PSNR-Y" in call("compare", *files).stdout
    for change, word in (
        (dict(set="Set5"), "set is hr in one and Set5"),
        (dict(scale=2), "scale is 4 in one and 2"),
        (dict(protocol=dict(b["protocol"], border=0)), "border is 4 in one and 0"),
        (dict(keys=["x", "y"]), "share no image"),
    ):
        files[1].write_text(json.dumps(dict(b, **change)))
        r = call("compare", *files)
        assert r.exit_code == 1 and word in r.stderr, r.stderr


def test_export_refuses_before_it_works(tmp_path):
    (tmp_path / "a.onnx").write_text("mine")
    for args, word in (
        (("onnx", tmp_path / "a.onnx"), "--overwrite"),
        (("onnx", tmp_path / "a.pt"), ".onnx"),
        (("tflite", tmp_path / "b.onnx"), "choose from onnx"),
    ):
        r = call("export", *args)
        assert r.exit_code == 2 and word in r.stderr, r.stderr
    assert (tmp_path / "a.onnx").read_text() == "mine"
