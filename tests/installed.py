"""Check an installed wheel, outside of the repository and without any extra.

`make test` runs it in an environment that holds the core dependencies only, the GitHub workflow
after `pip install`, on Linux, macOS and Windows.
"""

import importlib
import os
import pkgutil
import subprocess
import sysconfig
import tempfile
from importlib.metadata import distribution, distributions, entry_points
from pathlib import Path

import numpy as np
from PIL import Image

import tocsr
from tocsr import TOCSRPipeline

MAX_DISTRIBUTIONS = 70
EXTRAS = (  # modules of these libraries may be missing, each where it is needed
    "accelerate botorch matplotlib onnx onnxruntime onnxscript optuna papermill pyiqa pymoo skimage"
    " sklearn timm torchvision"
).split()
COMPLETE = ("tocsr.core.image", "tocsr.models", "tocsr.inference", "tocsr.cli")

home = Path(tocsr.__file__).parent
assert home.is_relative_to(sysconfig.get_path("purelib")), f"imported {home}, not the wheel"
assert distribution("tocsr").version == tocsr.__version__
assert "tocsr" in {e.name for e in entry_points(group="nbdev")}
assert (home / "py.typed").is_file() and (home / "assets/benchmarks.json").is_file()
installed = {d.name for d in distributions()} - {"pip", "wheel"}
assert len(installed) <= MAX_DISTRIBUTIONS, f"{len(installed)} distributions: {sorted(installed)}"

# Every module is importable, or says which library of an extra it lacks.
found = [m.name for m in pkgutil.walk_packages(tocsr.__path__, "tocsr.")]
lacking = {}
for name in found:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as e:
        lacking[name] = e.name
assert "tocsr.inference.pipeline" in found
assert set(lacking.values()) <= set(EXTRAS), lacking
assert not [n for n in lacking if n.startswith(COMPLETE)], lacking

# The pipeline upscales an array.
small = np.zeros((8, 12, 3), np.uint8)
assert TOCSRPipeline.from_pretrained()(small).images[0].size == (48, 32)


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    "The command `tocsr` of this environment."
    program = Path(sysconfig.get_path("scripts")) / ("tocsr.exe" if os.name == "nt" else "tocsr")
    return subprocess.run([program, *arguments], capture_output=True, text=True)


# The command upscales a folder.
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "small").mkdir()
    Image.new("RGB", (12, 8), "teal").save(folder / "small/color.jpg")
    Image.new("L", (9, 7), 90).save(folder / "small/gray.png")
    Image.new("RGBA", (10, 10), (9, 9, 9, 99)).save(folder / "small/alpha.png")
    r = run("upscale", folder / "small", "-o", folder / "large")
    assert r.returncode == 0, r.stderr
    sizes = {p.stem: Image.open(p).size for p in (folder / "large").glob("*.???")}
    assert sizes == dict(color=(48, 32), gray=(36, 28), alpha=(40, 40)), (sizes, r.stderr)

# What needs the notebooks says so in words.
r = run("reproduce")
assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr

print(
    f"tocsr {tocsr.__version__}: {len(installed)} distributions, {len(found)} modules, "
    f"{len(lacking)} of them for an extra ({', '.join(sorted(set(lacking.values())))})"
)
