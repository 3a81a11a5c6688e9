"What every notebook promises: a title, parameters that papermill finds, outputs fit to publish."

import ast
import json
import re
from pathlib import Path

import papermill
import pytest

from tocsr.cli.reproduce import MAX_BYTES, stage_notebooks
from tocsr.core.config import PROFILES

ROOT = Path(__file__).resolve().parents[1]
STAGES = stage_notebooks(ROOT)
CHECKPOINTS = ".ipynb_checkpoints"
ALL = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if CHECKPOINTS not in p.parts)
NUMBERED = sorted((ROOT / "nbs").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
MACHINE = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|tmp|private|mnt|opt|var/folders)/[\w.]")
FIGURE = re.compile(r"^[^#'\"]*\b(save_figure|as_png|as_jpeg|show)\(", re.M)


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def parameters(path):
    return [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]


def exported_modules(path):
    "Modules that a notebook writes: its own one, then those it adds cells to."
    text = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "code")
    own = re.findall(r"^#\| *default_exp +([\w.]+)", text, re.M)
    return own, re.findall(r"^#\| *exports?i? +([\w.]+)", text, re.M)


def test_stages_are_numbered_in_order():
    *numbers, last = [p.name.split("_")[0] for p in STAGES]  # 03b follows 03
    assert numbers == sorted(set(numbers)) and set(STAGES) <= set(NUMBERED)
    assert last == "00"  # the overview shows the results of all others


@every_notebook
def test_title_and_subtitle_come_first(path):
    first = cells(path)[0]
    lines = [line for line in source(first).splitlines() if line.strip()]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S", lines[0]) and re.match(r"> \S", lines[1])
    assert not lines[2:] or not lines[2].startswith(">"), "the subtitle is one line"


@every_notebook
def test_size_metadata_and_flags(path):
    assert path.stat().st_size <= MAX_BYTES
    for c in cells(path):
        assert set(c["metadata"]) <= {"tags"}, f"metadata {set(c['metadata'])}"
        if c["cell_type"] == "code":
            text = source(c)
            first = text.startswith("#| export")
            assert first or "#| export" not in text, "the directive must be the first line"
            if "install" not in c["metadata"].get("tags", []):
                assert not re.search(r"^\s*[%!]\w", text, re.M), "magics do not survive the export"


def test_try_it_opens_in_colab():
    "The badge leads to this repository, and the cell that installs is skipped in tests."
    ini = dict(re.findall(r"^(\w+) = (.*)$", (ROOT / "settings.ini").read_text(), re.M))
    title, install, *rest = cells(ROOT / "nbs/08_try_it.ipynb")
    place = f"{ini['user']}/{ini['repo']}/blob/{ini['branch']}/nbs/08_try_it.ipynb"
    assert f"(https://colab.research.google.com/github/{place})" in source(title)
    assert install["metadata"]["tags"] == ["install"]
    assert source(install).startswith("#| eval: false\n")
    assert f'%pip install -q "{ini["lib_name"]}[plots]"' in source(install)
    assert not any("install" in c["metadata"].get("tags", []) for c in rest)


@every_notebook
def test_outputs_show_no_error_and_no_folder_of_a_machine(path):
    for c in cells(path):
        for o in c.get("outputs", []):
            assert o["output_type"] != "error" and o.get("name") != "stderr"
            data = {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/png")}
            text = json.dumps(data or o.get("text", ""))
            assert not MACHINE.search(text), f"in the output of: {source(c)[:80]}"


def test_the_pattern_finds_folders_of_a_machine():
    assert all(map(MACHINE.search, ("saved in /tmp/abc", '"/home/me/x"', "/root/.venv/lib")))
    assert not any(map(MACHINE.search, ("runs/tmp/x", "~/work/x", "a/home/b")))


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_every_figure_is_shown(path):
    "In a style's context pyplot displays one figure only: a cell shows what its last line returns."
    drawing = [c for c in cells(path) if FIGURE.search(source(c))]
    for c in (c for c in drawing if "#| export" not in source(c)):
        kinds = [k for o in c["outputs"] for k in o.get("data", {})]
        assert any(k.startswith("image/") for k in kinds), source(c)


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_an_unknown_parameter_is_refused(path, tmp_path):
    "By papermill itself: the parameters cell and the code after it, up to the check of names."
    assert len(parameters(path)) == 1
    nb = json.loads(path.read_text())
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    first = code.index(next(c for c in code if "parameters" in c["metadata"].get("tags", [])))
    check = re.compile(r"^[^#\n]*\b(notebook_profile|check_notebook_parameters)\(globals", re.M)
    last = next((i for i, c in enumerate(code) if check.search(source(c))), None)
    assert last is not None and last > first, "no cell checks the names of parameters"
    # imports and the check alone: what comes before it may compute
    lines = [f"from tocsr.core.config import {check.search(source(code[last]))[1]}"]
    lines.append(f"{check.search(source(code[last]))[1]}(globals())")
    code[last]["source"] = "\n".join(lines)
    nb["cells"] = [code[first], code[last]]
    for c in nb["cells"]:
        c["outputs"] = []
    (tmp_path / "in.ipynb").write_text(json.dumps(nb))
    given = dict(cwd=str(ROOT), kernel_name="python3", progress_bar=False)
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'nonsense'"):
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", dict(nonsense=1), **given
        )


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_parameters_cell(path):
    (cell,) = parameters(path)
    text = source(cell)
    assert not text.startswith("#|"), "the cell has no directive"
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(text).body}
    assert values == dict(profile="", data_dir="", way="", overrides={}, force=False)
    for line in filter(str.strip, text.splitlines()):
        assert "#" in line, "each parameter has a comment"
    for name in PROFILES:
        assert re.search(rf"\b{name}\b", text), f"the comment does not name profile {name}"


def test_every_module_has_one_notebook_that_nbdev_exports_first():
    "nbdev exports by file name: what a notebook adds to a module not yet written would be lost."
    owner = {}
    for p in ALL:
        for module in exported_modules(p)[0]:
            assert module not in owner, f"{p.name} and {owner[module].name} write {module}"
            owner[module] = p
    for p in ALL:
        for module in exported_modules(p)[1]:
            assert owner[module].name < p.name, f"{p.name} is exported before {module}"
    library = ROOT / "tocsr"
    files = (p.relative_to(library).with_suffix("") for p in library.rglob("[!_]*.py"))
    modules = {".".join(f.parts) for f in files if f.parts[0] != "weights"}
    assert modules == set(owner), "a module whose notebook is gone, or one that was not exported"
