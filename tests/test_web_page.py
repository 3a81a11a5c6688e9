"The page of `tocsr export web`, in Chromium: the pixels of the library, and what it refuses."

import json

import numpy as np
import pytest
import torch
from chromium import open_browser, open_page, reason_to_skip, serve_folder
from PIL import Image
from skimage import data
from typer.testing import CliRunner

from tocsr.cli.main import app
from tocsr.core.download import FetchError
from tocsr.core.image import imresize
from tocsr.inference.onnx_export import missing_packages
from tocsr.inference.pipeline import TOCSRPipeline
from tocsr.inference.web_page import (
    RUNTIME_FILES,
    check_web_page,
    export_web_page,
    fetch_runtime,
)
from tocsr.models.generator import start_noise

needs_export = pytest.mark.skipif(bool(missing_packages()), reason="the extra onnx is missing")
needs_browser = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


@pytest.fixture(scope="module")
def pipe():
    return TOCSRPipeline.from_pretrained()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    "The page with the released model."
    try:
        runtime = fetch_runtime()
    except FetchError as e:
        pytest.skip(str(e))
    return export_web_page(pipe, tmp_path_factory.mktemp("page"), runtime)


@pytest.fixture(scope="module")
def visit(folder):
    "A function that opens the page for a new visitor."
    with serve_folder(folder) as url, open_browser() as browser:
        yield lambda **how: open_page(browser, url, **how)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    "A crop of a photograph that scikit-image brings, 136 x 72 pixels: several tiles of every part."
    file = tmp_path_factory.mktemp("photo") / "cat.png"
    Image.fromarray(data.chelsea()[100:172, 100:236]).save(file)
    return file


def upscale(page, file, **options) -> Image.Image:
    "Upload a file and download the result."
    page.locator("summary").click()
    for name, value in options.items():
        field = page.locator(f"#{name}")
        (field.fill if name == "seed" else field.select_option)(str(value))
    page.set_input_files("#file", str(file))
    page.wait_for_selector("#result:not([hidden])")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == f"{file.stem}_x4.png"
    return Image.open(download.value.path()).convert("RGB")


@needs_export
def test_the_parts_equal_torch(pipe, folder):
    differences = check_web_page(pipe, folder)
    assert len(differences) == 2
    parts = json.loads((folder / "model/model.json").read_text())["parts"]
    assert list(parts) == ["encoder", "unet", "decoder", "refiner"]
    assert all(part["margin"] % 64 == 0 for part in parts.values())


@needs_export
@needs_browser
@pytest.mark.parametrize("seed, consistency", [(3, ""), (0, 8)])
def test_the_pixels_are_those_of_the_library(pipe, visit, photo, seed, consistency):
    page = visit()
    found = upscale(page, photo, seed=seed, tile=64, consistency=consistency)
    lr = Image.open(photo)
    call = dict(seed=seed, tile=64, consistency_factor=consistency or None)
    wanted = pipe(lr, **call).images[0]
    difference = np.abs(np.asarray(found, int) - np.asarray(wanted, int))
    assert found.size == wanted.size == (544, 288)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    other = pipe(lr, seed=seed + 1, consistency_factor=consistency or None).images[0]
    assert np.abs(np.asarray(other, int) - np.asarray(wanted, int)).max() > 1, "seeds matter"
    assert not page.foreign and not page.faults


@needs_export
@needs_browser
def test_the_slider_moves_the_border_and_the_page_fits_a_phone(visit, photo):
    page = visit(viewport=dict(width=390, height=800))
    upscale(page, photo, tile=256)
    clip = page.locator("#ours")
    before = clip.evaluate("e => e.style.clipPath")
    page.locator("#slider").fill("900")
    assert clip.evaluate("e => e.style.clipPath") != before
    box = page.locator("#divider").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(100, y)
    page.mouse.up()
    assert int(page.locator("#slider").input_value()) < 400
    page.click("#zoom")
    assert page.locator("#ours").bounding_box()["width"] == 544
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_export
@needs_browser
def test_bad_and_huge_files_are_refused_with_a_message(visit, tmp_path):
    page = visit()
    error = page.locator("#error")
    (tmp_path / "letter.png").write_text("Dear reader")
    page.set_input_files("#file", str(tmp_path / "letter.png"))
    error.wait_for()
    assert "letter.png is not an image" in error.inner_text()
    with open(tmp_path / "large.png", "wb") as f:
        f.truncate(51_000_000)
    page.set_input_files("#file", str(tmp_path / "large.png"))
    error.filter(has_text="51 MB").wait_for()
    Image.new("RGB", (1300, 1000)).save(tmp_path / "wide.png")
    page.set_input_files("#file", str(tmp_path / "wide.png"))
    page.locator("#center").wait_for()
    assert "1300 × 1000 pixels, 1.3\u00a0Mpixel" in error.inner_text()
    page.click("#center")
    page.locator(
        "#progress:not([value='0'])"
    ).wait_for()  # the page's policy forbids to eval a test
    page.click("#cancel")
    assert page.locator("#status").is_hidden() and error.is_hidden()


@needs_export
@needs_browser
def test_orientation_is_applied_and_transparency_is_white(visit, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert upscale(visit(), tmp_path / "turned.jpg").size == (64, 128)
    Image.new("RGBA", (16, 16), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    # white, up to a level of the network
    darkest = [low for low, _ in upscale(visit(), tmp_path / "clear.png").getextrema()]
    assert min(darkest) >= 254


@needs_export
@needs_browser
def test_noise_and_resizing_equal_torch(visit):
    page = visit()
    script = (
        "([name, args]) => import('./numerics.js').then(m => Array.from(m[name](...args).data))"
    )

    def run(name, *args):
        return torch.tensor(page.evaluate(script, [name, args]))

    for seed in (0, 5, 2**31 - 1):
        noise = run("startNoise", 16, 8, 16, seed)
        assert torch.allclose(noise, start_noise((16, 8, 16), seed, [0]).flatten(), atol=1e-5)
    x = torch.rand(2, 11, 7, generator=torch.Generator().manual_seed(0))
    image = dict(data=x.flatten().tolist(), channels=2, height=11, width=7)
    for size in ((44, 28), (5, 3), (13, 20)):
        found = run("resize", image, *size)
        assert torch.allclose(found, imresize(x, size=size).flatten(), atol=1e-5), size


def call(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def test_the_command_refuses_before_it_works(tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page/mine.txt").write_text("mine")
    for target, word in ((tmp_path / "page", "--overwrite"), (tmp_path / "page/mine.txt", "file")):
        r = call("export", "web", target)
        assert r.exit_code == 2 and word in r.stderr, r.stderr
    assert (tmp_path / "page/mine.txt").read_text() == "mine"


@needs_export
def test_a_folder_without_the_runtime_is_refused_by_name(tmp_path):
    (tmp_path / RUNTIME_FILES[0]).touch()
    r = call("export", "web", tmp_path / "page", "--runtime", tmp_path)
    assert r.exit_code == 1 and RUNTIME_FILES[1] in r.stderr and RUNTIME_FILES[0] not in r.stderr


def test_without_npm_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="Node.js"):
        fetch_runtime(tmp_path)
