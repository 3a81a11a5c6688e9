"pyproject.toml, pins, conda's file, citation and README agree with each other and with the code."

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from slim_environment import closure, core_requirements

import tocsr
from tocsr.data.images import EMBEDDED
from tocsr.evaluation.reported import CITATION

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
# imported name -> distribution
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}


def requirements(lines):
    return {canonicalize_name((r := Requirement(line)).name): r for line in lines}


def pins():
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").open())
    return requirements(line for line in lines if line)


def imported():
    "Distributions that the library imports or reads files from."
    names = {p.package for p in EMBEDDED}
    for f in (ROOT / "tocsr").rglob("*.py"):
        for n in ast.walk(ast.parse(f.read_text())):
            if isinstance(n, ast.Import):
                names |= {a.name.split(".")[0] for a in n.names}
            if isinstance(n, ast.ImportFrom) and n.level == 0:
                names.add(n.module.split(".")[0])
    names -= sys.stdlib_module_names | {"tocsr"}
    return {canonicalize_name(DISTRIBUTIONS.get(n, n)) for n in names}


def test_requirements_are_what_is_imported():
    core = set(requirements(core_requirements()))
    assert core <= imported(), "a requirement that nothing imports"
    optional = set().union(*(requirements(lines) for lines in EXTRAS.values()))
    assert imported() <= core | optional, "an import that nothing requires"
    assert not core & optional, "an extra repeats a core requirement"


def test_every_requirement_has_a_bound_and_a_pin_within_it():
    pinned = pins()
    for lines in (core_requirements(), *EXTRAS.values()):
        for name, r in requirements(lines).items():
            if name == "tocsr":
                assert set(r.extras) < set(EXTRAS)
                continue
            assert r.specifier, f"{name} has no bound"
            pin = next(iter(pinned[name].specifier))
            assert pin.operator == "==", name
            assert r.specifier.contains(pin.version), f"{name}: {pin.version} is not {r.specifier}"


def test_python_has_no_upper_cap():
    assert re.fullmatch(r">=3\.\d+", PROJECT["requires-python"])


def test_what_upscaling_needs_is_free_software():
    "pyiqa is not: it stays in the extra `metrics`, and README and model card say so."
    for name, d in closure(core_requirements()).items():
        terms = [d.metadata["License-Expression"], *d.metadata.get_all("Classifier", ())]
        terms += (d.metadata["License"] or "").splitlines()[:1]
        assert not re.search(r"non-?commercial|\bNC\b", " ".join(map(str, terms)), re.I), name
    assert [e for e, lines in EXTRAS.items() if "pyiqa" in requirements(lines)] == ["metrics"]
    for text in (README, (ROOT / "tocsr/weights/README.md").read_text()):
        assert "PolyForm-Noncommercial" in text


def test_conda_and_make_install_the_same():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    (by_pip,) = [d["pip"] for d in env["dependencies"] if isinstance(d, dict)]
    extras = re.search(r"^EXTRAS = (.*)$", MAKEFILE, re.M)[1]
    assert by_pip == ["-c constraints.txt", f"-e .[{extras}]"]
    assert f"python {PROJECT['requires-python']}" in env["dependencies"]
    assert set(extras.split(",")) <= set(EXTRAS)


def test_one_version():
    ini = dict(re.findall(r"^(\w+) = (.*)$", (ROOT / "settings.ini").read_text(), re.M))
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tocsr.__version__"}
    assert tocsr.__version__ == ini["version"] == cff["version"]
    assert f"## {tocsr.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_nbdev_keeps_the_tag_of_the_parameters_cell():
    ini = (ROOT / "settings.ini").read_text()
    assert "allowed_cell_metadata_keys = tags" in ini and "update_pyproject = False" in ini


def test_entry_points():
    command = EntryPoint("tocsr", PROJECT["scripts"]["tocsr"], "console_scripts").load()
    assert callable(command)
    index = EntryPoint("tocsr", PROJECT["entry-points"]["nbdev"]["tocsr"], "nbdev").load()
    assert index["settings"]["lib_path"] == "tocsr"


def test_packaged_files_are_in_the_wheels_patterns():
    folder = ROOT / "tocsr"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["tocsr"]
    matched = {p for pattern in patterns for p in folder.glob(pattern.replace("**", "**/*"))}
    files = {p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {p for p in files if p.suffix != ".py"} <= matched
    assert folder / "py.typed" in matched
    code = {p.parent for p in files if p.suffix == ".py"}
    assert all((p / "__init__.py").is_file() for p in code), "a folder that is no package"


def test_bundled_weights_are_safetensors_and_small():
    suffixes = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".npz", ".npy")
    found = [p for p in (ROOT / "tocsr").rglob("*") if p.suffix in suffixes]
    # the unfinished release run is excluded from the wheel in pyproject.toml
    weights = [p for p in found if ROOT / "tocsr/weights/release" not in p.parents]
    assert {p.suffix for p in weights} == {".safetensors"}
    assert sum(p.stat().st_size for p in weights) <= 40e6


def test_license_and_citation():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = cff["preferred-citation"]
    assert cff["license"] == PROJECT["license"] == "Apache-2.0"
    assert paper == cff["references"][0] and len(paper["authors"]) == 8
    assert (paper["title"], paper["url"]) == (CITATION["title"], CITATION["url"])
    assert PROJECT["urls"]["Paper"] == paper["url"]


def test_nothing_is_unpickled():
    for p in [*(ROOT / "tocsr").rglob("*.py"), *(ROOT / "nbs").rglob("*.ipynb")]:
        text = p.read_text()
        assert not re.search(r"\bpickle\.load|joblib\.load|allow_pickle\s*=\s*True", text), p.name
        calls = re.findall(r"torch\.load\([^\n]*", text)
        assert all("weights_only=True" in call for call in calls), p.name


def test_make_lists_its_targets_and_says_when_python_is_missing(tmp_path):
    listed = subprocess.check_output(["make", "help"], cwd=ROOT, text=True)
    for target in re.findall(r"make ([\w-]+)", listed):
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target
    command = ["make", "reproduce", "PYTHON=", f"VENV={tmp_path}/venv"]
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert r.returncode and "python3-venv" in r.stdout
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_readme_lists_every_embedded_photograph_with_its_terms():
    for p in EMBEDDED:
        row = rf"\| {p.name} \| .*{re.escape(p.credit)}.* \| {re.escape(p.license)} \|"
        assert re.search(row, README), p.name


def test_links_to_files_exist():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), (page.name, target)


def test_five_line_use(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(code.strip().splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save("small.png")
    exec(compile(code, "README.md", "exec"), {})
    assert Image.open("large.png").size == (128, 96)
