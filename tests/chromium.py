"A headless Chromium for the tests of the two pages, or the reason why there is none."

import contextlib
import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TIMEOUT_MS = 180_000  # of one step; machines under load are slow


def reason_to_skip() -> str:
    "Why there is no browser here; empty if there is one."
    if shutil.which("chromium") is None:
        return "chromium is not installed (apt install chromium)"
    return "" if find_spec("playwright") else "playwright is not installed (pip install '.[dev]')"


@contextlib.contextmanager
def open_browser() -> Iterator:
    "A Chromium, driven by Playwright."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        options = dict(executable_path=shutil.which("chromium"), args=FLAGS)
        browser = p.chromium.launch(**options)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, url: str, **how):
    "A page of a visitor of its own; `page.foreign` collects requests to other hosts."
    page = browser.new_context(**how).new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.foreign = []
    page.faults = []

    def note(request):
        if not request.url.startswith((url, "blob:", "data:")):
            page.foreign.append(request.url)

    page.on("request", note)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(url)
    return page


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        "Print nothing."


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    "Address of a static web server for a folder."
    handler = functools.partial(_Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
