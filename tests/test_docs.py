"The documentation site: its navigation is complete, its links lead somewhere, nothing is loaded."

import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import pages  # noqa: E402

NOTEBOOKS = [
    p.relative_to(ROOT)
    for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if ".ipynb_checkpoints" not in p.parts
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    pages.write_pages(out)
    return out


def texts(site):
    "(file, Markdown) of all pages; of notebooks the Markdown cells."
    for f in sorted(site.rglob("*.md")):
        yield f, f.read_text()
    for name in NOTEBOOKS:
        cells = json.loads((site / name).read_text())["cells"]
        markdown = [c for c in cells if c["cell_type"] == "markdown"]
        yield site / name, "\n\n".join("".join(c["source"]) for c in markdown)


def reachable(site):
    "Pages that the navigation leads to from the home page, without suffixes."
    found = set()
    todo = ["index"]
    while todo:
        page = todo.pop()
        if page in found:
            continue
        found.add(page)
        source = site / f"{page}.md"
        text = source.read_text() if source.is_file() else ""
        for block in re.findall(r"^```{toctree}\n(.*?)^```", text, re.M | re.S):
            for entry in re.findall(r"^[^:\s].*$", block, re.M):
                folder = "" if entry.startswith("/") else str(Path(page).parent)
                todo.append(str(Path(folder, entry.lstrip("/"))))
    return found


def test_navigation_lists_every_notebook_module_and_text(site):
    found = reachable(site)
    assert {str(p.with_suffix("")) for p in NOTEBOOKS} <= found
    library = ROOT / "tocsr"
    modules = [p.relative_to(library) for p in library.rglob("*/[!_]*.py")]
    assert {p.parts[0] for p in modules} == set(pages.LAYERS)
    assert {f"api/{p.with_suffix('')}" for p in modules} <= found
    assert {"CONTRIBUTING", "CHANGELOG", "questions", "model_card"} <= found
    assert all(any((site / f"{p}{s}").is_file() for s in (".md", ".ipynb")) for p in found)


def test_every_page_is_in_the_navigation(site):
    written = [f for s in ("md", "ipynb") for f in site.rglob(f"*.{s}")]
    assert {str(f.relative_to(site).with_suffix("")) for f in written} == reachable(site)


def test_links_lead_to_files_of_the_site(site):
    broken = []
    for f, text in texts(site):
        text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            root = site if target.startswith("/") else f.parent
            if "://" not in target and not (root / target.lstrip("/")).is_file():
                broken.append(f"{f.relative_to(site)}: {target}")
    assert not broken, "\n".join(broken)


def test_no_image_comes_from_another_host(site):
    for f, text in texts(site):
        assert not re.search(r"!\[[^]]*\]\(https?:|<img [^>]*https?:", text), f.name


def test_notebooks_show_no_directive_and_fold_long_cells(site):
    for name in NOTEBOOKS:
        for c in json.loads((site / name).read_text())["cells"]:
            if c["cell_type"] == "code":
                lines = "".join(c["source"]).splitlines()
                assert not lines[0].startswith("#|"), name
                folded = c["metadata"].get("tags") == ["hide-input"]
                assert folded or len(lines) <= pages.LONG, name
                assert "parameters" not in c["metadata"].get("tags", [])


def test_fold_labels():
    assert pages.fold_label("x = 1", ["parameters"]) == "Parameters"
    assert pages.fold_label("import os\nfrom a import b", []) == "Imports"
    assert pages.fold_label("import os\nos.getcwd()", []) is None
    assert pages.fold_label("def f():\n" + "    x = 1\n" * pages.LONG, []) == "Code: f"
    assert pages.fold_label("if True:\n    %pip install tocsr", []) is None


def test_every_public_name_is_documented(site):
    for path in (ROOT / "tocsr").rglob("*/[!_]*.py"):
        module = pages.Module.read(path)
        text = (site / f"api/{module.name.replace('.', '/')}.md").read_text()
        (names,) = (
            ast.literal_eval(n.value)
            for n in module.tree.body
            if isinstance(n, ast.Assign) and pages.names_of(n) == ["__all__"]
        )
        found = re.findall(r"^`+{py:(?:function|class|data)} (\w+)", text, re.M)
        assert set(names) <= set(found), module.name


SOURCE = """
def f(
    x,  # first
    # of the *second*,
    n: int = 3,  # in pixels
    *,
    # an option
    flag: bool = False,  # noqa: X100
) -> list[int]:  # what it $is
    "Do `it`."
    y = 1  # inside


@dataclass
class C:
    "Fields."

    # above
    a: int
    b: str = ""  # behind

    def method(self, z: float):
        "Do that."

    def _hidden(self):
        "No."


def command(path: str = typer.Option("runs", help="A folder.")):
    "At the terminal."


__all__ = ['f', 'C', 'command']
"""


def test_comments_of_a_signature_become_the_list_of_parameters(tmp_path, monkeypatch):
    (tmp_path / "tocsr").mkdir()
    (tmp_path / "tocsr/m.py").write_text(SOURCE)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    module = pages.Module.read(tmp_path / "tocsr/m.py")
    f, c, command = module.public()
    text = pages.function(module, f)
    assert text.startswith("```{py:function} f(x, n=3, *, flag=False)\n")
    fields = [line for line in text.splitlines() if line.startswith(":")]
    assert fields == [
        ":param x: first",
        r":param n: of the \*second\*, in pixels",
        ":type n: int",
        ":param flag: an option",
        ":type flag: bool",
        r":returns: what it \$is",
        ":rtype: list[int]",
    ]
    assert "Do `it`." in text and "inside" not in text
    text = pages.class_(module, c)
    assert ":param a: above\n:type a: int\n:param b: behind\n:type b: str" in text
    assert "{py:class} C(a, b='')" in text and "{py:method} method(z)" in text
    assert "_hidden" not in text
    text = pages.function(module, command)
    assert "command(path='runs')" in text and ":param path: A folder." in text
