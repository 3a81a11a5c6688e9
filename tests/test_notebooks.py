"What every notebook promises: a title, parameters that papermill finds, outputs that are fit to publish."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
from tocsr.cli import MAX_BYTES, stage_notebooks
from tocsr.profiles import PROFILES

ROOT = Path(__file__).resolve().parents[1]
STAGES = stage_notebooks(ROOT)
ALL = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def parameters(path):
    return [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]


def test_seven_stages():
    assert [p.name[:2] for p in STAGES] == [f"{i:02d}" for i in range(1, 8)]


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_title_and_subtitle_come_first(path):
    lines = [line for line in source(cells(path)[0]).splitlines() if line.strip()]
    assert cells(path)[0]["cell_type"] == "markdown" and re.match(r"# \S", lines[0]) and re.match(r"> \S", lines[1])
    assert not lines[2:] or not lines[2].startswith(">"), "the subtitle is one line"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_size_metadata_and_flags(path):
    assert path.stat().st_size <= MAX_BYTES
    for c in cells(path):
        assert set(c["metadata"]) <= {"tags"}, f"metadata {set(c['metadata'])}"
        if c["cell_type"] == "code":
            text = source(c)
            assert "#| export" not in text or text.startswith("#| export"), "the directive must be the first line"
            assert not re.search(r"^\s*[%!]\w", text, re.M), "magics do not survive the export"


MACHINE = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|tmp|private|mnt|opt|var/folders)/[\w.]")


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_outputs_show_no_error_and_no_folder_of_a_machine(path):
    for c in cells(path):
        for o in c.get("outputs", []):
            assert o["output_type"] != "error" and o.get("name") != "stderr"
            text = {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/png")} or o.get("text", "")
            assert not MACHINE.search(json.dumps(text)), f"in the output of: {source(c)[:80]}"


@pytest.mark.parametrize("path", [*STAGES, ROOT/"nbs/08_try_it.ipynb"], ids=lambda p: p.stem)
def test_every_figure_is_shown(path):
    "pyplot's own display stops after the first figure drawn in a style's context; a cell shows what it draws by its last line."
    drawing = [c for c in cells(path) if re.search(r"^[^#'\"]*\b(save_figure|as_png|as_jpeg|show)\(", source(c), re.M) and "#| export" not in source(c)]
    assert drawing, "a notebook with outputs"
    for c in drawing: assert any(k.startswith("image/") for o in c["outputs"] for k in o.get("data", {})), source(c)


def test_the_pattern_finds_folders_of_a_machine():
    assert all(map(MACHINE.search, ("saved in /tmp/abc", '"/home/me/x"', "/root/.venv/lib"))) and not any(map(MACHINE.search, ("runs/tmp/x", "~/work/x", "a/home/b")))


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_parameters_cell(path):
    found = parameters(path)
    assert len(found) == 1 and not source(found[0]).startswith("#|"), "one cell tagged parameters, without a directive"
    tree = ast.parse(source(found[0])).body
    assert {n.targets[0].id: ast.literal_eval(n.value) for n in tree} == dict(profile="", data_dir="", force=False)
    assert all("#" in line for line in source(found[0]).splitlines() if line.strip()), "each parameter is explained beside it"
    for name in PROFILES: assert re.search(rf"\b{name}\b", source(found[0])), f"the comment does not name profile {name}"


def test_cleaning_keeps_tags_and_changes_no_byte(tmp_path):
    shutil.copy(ROOT/"settings.ini", tmp_path)
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    subprocess.run([Path(sys.executable).with_name("nbdev_clean")], cwd=tmp_path, check=True, capture_output=True)
    for p in ALL: assert (tmp_path/p.relative_to(ROOT)).read_bytes() == p.read_bytes(), f"run nbdev_clean: {p.name}"
    assert all(len(parameters(tmp_path/p.relative_to(ROOT))) == 1 for p in STAGES)
