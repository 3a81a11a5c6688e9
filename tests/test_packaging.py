"pyproject.toml, pins, environment.yml, citation and README say the same things, and what the code needs."
import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
import tocsr
from tocsr.images import EMBEDDED
from tocsr.report import CITATION

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PACKAGE_OF = dict(PIL="pillow", skimage="scikit-image", sklearn="scikit-learn")  # imported name -> distribution


def requirements(lines):
    return {canonicalize_name((r := Requirement(line)).name): r for line in lines}


def pins():
    lines = [line.split("#")[0].strip() for line in (ROOT/"constraints.txt").read_text().splitlines()]
    return requirements(line for line in lines if line)


def imported():
    "Distributions that the library imports or reads files from."
    names = {p.package for p in EMBEDDED}
    for f in (ROOT/"tocsr").glob("*.py"):
        for n in ast.walk(ast.parse(f.read_text())):
            if isinstance(n, ast.Import): names |= {a.name.split(".")[0] for a in n.names}
            if isinstance(n, ast.ImportFrom) and n.level == 0: names.add(n.module.split(".")[0])
    return {canonicalize_name(PACKAGE_OF.get(n, n)) for n in names - sys.stdlib_module_names - {"tocsr"}}


def test_dependencies_are_what_is_imported():
    optional = set().union(*(requirements(lines) for lines in EXTRAS.values()))       # imported late, where they are needed
    assert imported() - optional == set(requirements(PROJECT["project"]["dependencies"])), "papermill runs notebooks and belongs to the extra dev"
    assert "papermill" in requirements(EXTRAS["dev"])


def test_every_dependency_has_a_bound_and_a_pin_within_it():
    pinned = pins()
    for lines in (PROJECT["project"]["dependencies"], *EXTRAS.values()):
        for name, r in requirements(lines).items():
            assert r.specifier, f"{name} has no bound"
            pin = next(iter(pinned[name].specifier))
            assert pin.operator == "==" and r.specifier.contains(pin.version), f"{name}: pinned {pin.version}, wanted {r.specifier}"


def test_nbdev_and_its_caps():
    dev = requirements(EXTRAS["dev"])
    assert {n: str(dev[n].specifier) for n in ("nbdev", "execnb", "fastcore", "ghapi")} == dict(nbdev="==2.4.14", execnb="<0.2", fastcore="<2", ghapi="<2")


def test_conda_and_pip_agree():
    env = yaml.safe_load((ROOT/"environment.yml").read_text())
    plain, (by_pip,) = [d for d in env["dependencies"] if isinstance(d, str)], [d["pip"] for d in env["dependencies"] if isinstance(d, dict)]
    python = {p.split()[0]: p.split(maxsplit=1)[1:] for p in plain}
    assert set(python) == {"python", "pip"} and python["python"] == [PROJECT["project"]["requires-python"]]
    make = (ROOT/"Makefile").read_text()
    assert by_pip == ["-c constraints.txt", "-e .[dev,metrics,search]"] and "-c constraints.txt" in make and "EXTRAS = dev,metrics,search\n" in make and "$(call install,$(VENV)/bin/python,$(EXTRAS))" in make, "both ways install the same"


def test_opencv_needs_no_desktop():
    "facexlib, which pyiqa requires, brings the desktop's build; a bare server lacks its libraries."
    pinned, again = pins(), "--no-deps --force-reinstall opencv-python-headless"
    assert pinned["opencv-python"].specifier == pinned["opencv-python-headless"].specifier, "one build lies over the other"
    assert again in (ROOT/"Makefile").read_text() and again in (ROOT/"environment.yml").read_text()
    if Path(sys.prefix) != ROOT/"build"/"test"/"venv": pytest.skip("only `make test` promises which of the two builds lies on top")
    import cv2
    assert re.search(r"GUI: +NONE", cv2.getBuildInformation())


def test_one_version():
    ini = dict(re.findall(r"^(\w+) = (.*)$", (ROOT/"settings.ini").read_text(), re.M))
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert PROJECT["project"]["dynamic"] == ["version"] and PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tocsr.__version__"}
    assert tocsr.__version__ == ini["version"] == cff["version"] == version("tocsr")
    assert f"## {tocsr.__version__} " in (ROOT/"CHANGELOG.md").read_text()
    assert ini["allowed_cell_metadata_keys"] == "tags" and ini["update_pyproject"] == "False"


def test_entry_points():
    assert PROJECT["project"]["scripts"] == {"tocsr": "tocsr.cli:app"}
    assert PROJECT["project"]["entry-points"]["nbdev"] == {"tocsr": "tocsr._modidx:d"}
    out = subprocess.run([Path(sys.executable).with_name("tocsr"), "--help"], check=True, capture_output=True, text=True).stdout
    assert all(c in out for c in ("reproduce", "doctor", "runs", "readme"))


def test_packaged_files_are_in_the_wheels_patterns():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["tocsr"]
    matched = {p for pattern in patterns for p in (ROOT/"tocsr").glob(f"{pattern}/*")}
    loose = {p for p in (ROOT/"tocsr").rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert ROOT/"tocsr/data/benchmarks.json" in matched and loose <= matched


def test_shipped_weights_are_safetensors_and_small():
    weights = [p for p in (ROOT/"tocsr").rglob("*") if p.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".npz", ".npy")]
    assert {p.suffix for p in weights} <= {".safetensors"} and sum(p.stat().st_size for p in weights) <= 40e6


def test_licence_and_citation():
    text = (ROOT/"LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    paper = cff["preferred-citation"]
    assert cff["license"] == PROJECT["project"]["license"] == "Apache-2.0" and cff["authors"] == [{"name": "the tocsr authors"}]
    assert paper["title"] == CITATION["title"] and paper["url"] == CITATION["url"] and len(paper["authors"]) == 8 and paper == cff["references"][0]


def test_nothing_is_unpickled():
    for p in [*(ROOT/"tocsr").glob("*.py"), *(ROOT/"nbs").rglob("*.ipynb")]:
        text = p.read_text()
        assert not re.search(r"\bpickle\.load|joblib\.load|allow_pickle\s*=\s*True", text), p.name
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text)), p.name


def test_make_names_its_targets_and_finds_python(tmp_path):
    assert "make reproduce" in subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    r = subprocess.run(["make", "reproduce", "PYTHON=", f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode and "python3-venv" in r.stdout
    assert os.access(ROOT/".ci/run", os.X_OK) and "make test" in (ROOT/".ci/run").read_text()


README = (ROOT/"README.md").read_text()


def test_readme_lists_every_embedded_photograph_with_its_terms():
    for p in EMBEDDED: assert re.search(rf"\| {p.name} \| .*{re.escape(p.credit)}.* \| {re.escape(p.terms)} \|", README), p.name


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT/target).exists(), target


@pytest.mark.skipif(not (ROOT/"tocsr/weights/onestep").is_dir(), reason="the library ships no super-resolution weights yet")
def test_five_line_use(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(code.strip().splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save("small.png")
    exec(compile(code, "README.md", "exec"), {})
    assert Image.open("large.png").size == (128, 96)
