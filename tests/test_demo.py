"`tocsr demo` in Chromium: upload, slider, download, files that are refused, two visitors at once."

import importlib.metadata
import queue
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from chromium import open_browser, open_page, reason_to_skip
from PIL import Image
from skimage import data

from tocsr.cli.demo import DemoLimits, compare_upload, export_space, read_upload
from tocsr.cli.terminal import ChoiceError
from tocsr.core.decoding import ImageError
from tocsr.inference.pipeline import TOCSRPipeline

ROOT = Path(__file__).resolve().parents[1]
LACKING = reason_to_skip() or ("" if find_spec("gradio") else "gradio is missing: make test-demo")
needs_page = pytest.mark.skipif(bool(LACKING), reason=LACKING)
needs_gradio = pytest.mark.skipif(not find_spec("gradio"), reason="gradio is missing")


def first_line(stream, seconds: float) -> str:
    "The first line of a process, or nothing if it takes longer."
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: lines.put(stream.readline()), daemon=True).start()
    try:
        return lines.get(timeout=seconds)
    except queue.Empty:
        return ""


@pytest.fixture(scope="module")
def url():
    "Address of `tocsr demo` with small limits."
    command = [sys.executable, "-m", "tocsr", "demo", "--device", "cpu"]
    command += ["--max-mpixel", "0.05", "--max-mb", "0.5"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = first_line(process.stdout, 300)
        found = re.search(r"http://\S+", line)
        assert found, f"the demo printed {line!r}"
        yield found[0]
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pipe():
    return TOCSRPipeline.from_pretrained()


@pytest.fixture
def photo(tmp_path):
    "A file with EXIF orientation 6: 60 x 40 pixels are stored, 40 x 60 are meant."
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "cat.png"
    Image.fromarray(data.chelsea()[100:140, 100:160]).save(file, exif=exif)
    return file


def upload(page, file):
    page.locator("#file input[type=file]").set_input_files(str(file))


def download(page) -> Image.Image:
    page.locator("#download").wait_for()
    with page.expect_download() as file:
        page.locator("#download").click()
    return Image.open(file.value.path())


@needs_page
def test_upload_slider_and_download(browser, url, photo, pipe):
    page = open_page(browser, url, viewport=dict(width=390, height=800))
    upload(page, photo)
    found = download(page)
    wanted = pipe(Image.open(photo)).images[0]
    assert found.size == wanted.size == (160, 240)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))
    assert found.getexif().get(0x0112, 1) == 1
    images = page.locator("#slider img")
    images.nth(1).wait_for()
    widths = images.evaluate_all("found => found.map(i => i.naturalWidth)")
    assert widths[:2] == [160, 160]
    text = page.locator("#facts").inner_text()
    assert re.search(r"40 × 60 pixels", text) and re.search(r"\d\.\d s", text) and "GiB" in text
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.foreign, "the page works without a network"


@needs_page
def test_bad_and_huge_files_are_refused_with_a_message(browser, url, tmp_path):
    page = open_page(browser, url)
    message = page.locator("#message")
    (tmp_path / "letter.png").write_text("Dear reader")
    upload(page, tmp_path / "letter.png")
    message.wait_for()
    assert "letter.png: not an image" in message.inner_text()
    page.reload()
    Image.new("RGB", (300, 200)).save(tmp_path / "wide.png")
    upload(page, tmp_path / "wide.png")
    message.wait_for()
    assert "up to 0.05 Mpixel" in message.inner_text()
    page.reload()
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    upload(page, tmp_path / "large.png")
    page.get_by_text(re.compile("exceed", re.I)).first.wait_for()


@needs_page
def test_two_visitors_at_once_get_their_own_results(browser, url, tmp_path):
    pages = []
    for width in (48, 64):
        file = tmp_path / f"{width}.png"
        Image.fromarray(data.chelsea()[:48, :width]).save(file)
        pages.append((open_page(browser, url), file, width))
    for page, file, _ in pages:
        upload(page, file)
    for page, _, width in pages:
        assert download(page).size == (4 * width, 192)


def test_one_file_and_its_options(pipe, tmp_path, photo):
    seen = []
    options = dict(tile=16, consistency=8, limits=DemoLimits(), progress=seen.append)
    made = compare_upload(pipe, photo, tmp_path, scale=2, seed=1, **options)
    wanted = pipe(Image.open(photo), scale=2, seed=1, tile=16, consistency_factor=8).images[0]
    assert np.array_equal(np.asarray(Image.open(made.ours)), np.asarray(wanted))
    assert made.ours.name == "cat_x2.png" and Image.open(made.bicubic).size == (80, 120)
    assert Image.open(made.source).size == (40, 60) and seen == sorted(seen) and seen[-1] == 1


def test_limits_name_the_file_and_the_limit(tmp_path):
    Image.new("L", (100, 100)).save(tmp_path / "gray.png")
    with pytest.raises(ImageError, match="gray.png: too many pixels; .* 0.005 Mpixel"):
        read_upload(tmp_path / "gray.png", DemoLimits(megapixels=0.005))
    assert read_upload(tmp_path / "gray.png", DemoLimits(megapixels=0.01)).gray


@needs_gradio
def test_the_space_contains_all_it_needs(tmp_path):
    try:
        importlib.metadata.requires("tocsr")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tocsr is not installed: pip install -e .")
    folder = export_space(tmp_path / "space")
    names = {line.split(">")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert {"gradio", "torch", "diffusers"} <= names and "botorch" not in names
    readme = (folder / "README.md").read_text()
    version = importlib.metadata.version("gradio")
    assert f"\nsdk_version: {version}\n" in readme and "\napp_file: app.py\n" in readme
    check = (
        "import gradio, runpy; gradio.Blocks.launch = lambda *a, **k: None; "
        "runpy.run_path('app.py'); import tocsr; print(tocsr.__file__)"
    )
    environment = dict(PATH="", PYTHONPATH=str(folder), HOME=str(tmp_path), OMP_NUM_THREADS="1")
    out = subprocess.check_output(
        [sys.executable, "-c", check], cwd=folder, env=environment, text=True
    )
    assert Path(out.strip()).parent == folder / "tocsr"
    with pytest.raises(ChoiceError, match="exists"):
        export_space(folder)
