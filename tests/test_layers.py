"""Imports in the library go one way, without circles, and upscaling loads nothing else.

core < models < {data, search, inference} < evaluation < stages < cli
"""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = dict(core=0, models=1, data=2, search=2, inference=2, evaluation=3, stages=4, cli=5)
DATA_FOLDERS = ("assets", "weights")
# What upscaling must not load: parts of the library, and libraries of the extras.
OURS = ("tocsr.search", "tocsr.data", "tocsr.evaluation", "tocsr.stages", "tocsr.cli")
OTHERS = (
    "accelerate botorch gpytorch matplotlib optuna pyiqa pymoo skimage sklearn timm torchvision"
).split()


class Import(NamedTuple):
    source: str  # module that imports, "tocsr.models.losses"
    target: str  # module or package that is imported
    late: bool  # inside a function
    line: int


def modules(root: Path) -> dict[str, Path]:
    "Module name -> file, for every module of the package in folder `root`; data folders left out."
    found = {}
    for f in sorted(root.rglob("*.py")):
        parts = f.relative_to(root.parent).with_suffix("").parts
        if parts[1] in DATA_FOLDERS:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = f
    return {n: f for n, f in found.items() if not n.endswith("._modidx")}


def import_nodes(node: ast.AST, *, late: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    "Import statements below `node` and whether they run late, without those for type checkers."
    for n in ast.iter_child_nodes(node):
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            yield n, late
        elif isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test):
            for other in n.orelse:
                yield from import_nodes(ast.Module([other], []), late=late)
        else:
            function = isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from import_nodes(n, late=late or function)


def targets(node: ast.stmt, source: str, *, is_package: bool) -> list[str]:
    "Absolute dotted names that an import statement in module `source` asks for."
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    package = source.split(".") if is_package else source.split(".")[:-1]
    start = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join([*start, *([node.module] if node.module else [])])
    return [f"{base}.{a.name}" for a in node.names]


def imports(root: Path) -> list[Import]:
    "All imports within the package in folder `root`."
    known = modules(root)
    found = []
    for source, f in known.items():
        for node, late in import_nodes(ast.parse(f.read_text())):
            for asked in targets(node, source, is_package=f.name == "__init__.py"):
                name = asked
                while name and name not in known:  # a name in a module -> the module
                    name = name.rpartition(".")[0]
                if name == root.name and asked not in (name, f"{name}.__version__"):
                    name = asked  # what the package offers to users comes from high up
                if name:
                    found.append(Import(source, name, late, node.lineno))
    return list(dict.fromkeys(found))


def layer(module: str) -> tuple[str, int]:
    "Subpackage and its height; the package itself is on top as a source."
    part = module.split(".")[1] if "." in module else ""
    return part, LAYERS.get(part, len(LAYERS))


def upward(found: list[Import]) -> list[str]:
    "Imports of a higher subpackage or of one at the same height, at module level or in a function."
    bad = []
    for i in found:
        (source, height), (target, other) = layer(i.source), layer(i.target)
        if target and source != target and height <= other:
            bad.append(f"{i.source}:{i.line} imports {i.target}")
    return bad


def circle(found: list[Import]) -> list[str]:
    "Modules of one import circle at module level; empty without one."
    graph: dict[str, set[str]] = {}
    for i in found:
        if not i.late and i.source != i.target:
            graph.setdefault(i.source, set()).add(i.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return e.args[1]
    return []


def test_every_module_is_in_a_layer():
    names = {m.split(".")[1] for m in modules(ROOT / "tocsr") if "." in m}
    assert names - {"__main__"} == set(LAYERS)


def test_imports_go_one_way():
    assert not upward(imports(ROOT / "tocsr"))


def test_imports_make_no_circle():
    assert not circle(imports(ROOT / "tocsr"))


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        f = folder / "tocsr" / name
        f.parent.mkdir(parents=True, exist_ok=True)
        (f.parent / "__init__.py").touch()
        f.write_text(text)
    (folder / "tocsr/__init__.py").write_text("__version__ = '0'\n")
    return folder / "tocsr"


@pytest.mark.parametrize(
    "text",
    [
        "from ..models.unet import UNet",
        "from ..models import unet",
        "import tocsr.models.unet",
        "from tocsr.models.unet import UNet",
        "def f():\n    from ..models.unet import UNet",
        "from tocsr import TOCSRPipeline",
        "try:\n    from ..models import unet\nexcept ImportError:\n    pass",
    ],
)
def test_an_upward_import_is_found(tmp_path, text):
    root = write(tmp_path, {"models/unet.py": "UNet = 0", "core/store.py": text})
    assert len(upward(imports(root))) == 1


def test_subpackages_of_one_height_stay_apart(tmp_path):
    root = write(tmp_path, {"data/pairs.py": "from ..search import log", "search/log.py": ""})
    assert upward(imports(root)) == ["tocsr.data.pairs:1 imports tocsr.search.log"]


def test_downward_imports_and_those_for_type_checkers_are_fine(tmp_path):
    text = (
        "from typing import TYPE_CHECKING\nfrom tocsr import __version__\n"
        "if TYPE_CHECKING:\n    from ..models.unet import UNet\n"
    )
    files = {"core/store.py": text, "models/unet.py": "from ..core.store import x\nUNet = 0"}
    found = imports(write(tmp_path, files))
    assert not upward(found) and not circle(found)


def test_a_circle_is_found_unless_one_import_is_late(tmp_path):
    files = {"core/a.py": "from .b import x", "core/b.py": "from .c import y"}
    early = write(tmp_path / "early", files | {"core/c.py": "from . import a"})
    assert {"tocsr.core.a", "tocsr.core.b", "tocsr.core.c"} == set(circle(imports(early)))
    late = write(tmp_path / "late", files | {"core/c.py": "def f():\n    from . import a"})
    assert not circle(imports(late))


def loaded(statements: list[str]) -> set[str]:
    "Names in sys.modules after these statements, in a process of their own."
    code = "\n".join([*statements, "import json, sys", "print(json.dumps(sorted(sys.modules)))"])
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    return set(json.loads(out.splitlines()[-1]))


def test_upscaling_loads_no_training_search_or_metrics():
    "Measured against what torch's and diffusers' own modules load here by themselves."
    known = modules(ROOT / "tocsr")
    names = [n for n in known if n.split(".")[1:2] == ["inference"] and not n.endswith(".onnx")]
    assert "tocsr.inference.pipeline" in names
    after = loaded([f"import {n}" for n in names])
    theirs = set()
    for source in after & known.keys():
        for node, late in import_nodes(ast.parse(known[source].read_text())):
            text = ast.unparse(node)
            if not late and text.split()[1].split(".")[0] in ("torch", "diffusers"):
                theirs.add(text)
    assert theirs, "the networks come from diffusers"
    before = loaded(sorted(theirs))
    assert not [m for m in after if m.startswith(OURS)] and "tocsr.core.training" not in after
    assert not {m.split(".")[0] for m in after - before} & set(OTHERS)
