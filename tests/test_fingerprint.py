"Stage keys: whatever shapes a result changes the key, and nothing else does."

import ast
import dis
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
import types
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tocsr.core import files
from tocsr.core.fingerprint import Untracked, source_hash
from tocsr.core.image import read_image
from tocsr.core.store import MODULES, get_stage

ROOT = Path(__file__).resolve().parents[1]
UNTRACKED = {"MODULES", "_registry"}  # registries and caches on which no result depends
# objects of other libraries without contents
FOREIGN = {
    "_SRGB",
    "_deadline",
    "_loading",
    "_no_pillow_limit",
    "_single_process",
    "j1",
    "log_ndtr",
}
CODE = (types.FunctionType, type)


def code_of(obj):
    "Code objects of a function or of a class's methods, nested ones included."
    functions = (
        [obj]
        if isinstance(obj, types.FunctionType)
        else [inspect.unwrap(getattr(m, "__func__", m)) for m in vars(obj).values()]
    )
    codes = [f.__code__ for f in functions if isinstance(f, types.FunctionType)]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        yield code


def reached(root) -> dict:
    """(module, name) -> value of every module-level value that bytecode reachable from `root`
    loads: an account independent of syntax trees.
    """
    out = {}
    queue = [root]
    seen = set()
    while queue:
        obj = inspect.unwrap(queue.pop())
        if (
            not isinstance(obj, CODE)
            or obj in seen
            or obj.__module__.split(".")[0] != "tocsr"
            or hasattr(obj, "__untracked__")
        ):
            continue
        seen.add(obj)
        module = sys.modules[obj.__module__]
        for code in code_of(obj):
            for i in dis.get_instructions(code):
                if i.opname != "LOAD_GLOBAL" or i.argval not in vars(module):
                    continue
                value = vars(module)[i.argval]
                if isinstance(value, CODE) or hasattr(value, "__wrapped__"):
                    queue.append(value)
                elif not isinstance(value, types.ModuleType) and not i.argval.startswith("__"):
                    out[module.__name__, i.argval] = value
                    queue += members(value)
    return out


def members(value) -> list:
    "Functions and classes in a container."
    if isinstance(value, dict):
        return [m for v in (*value, *value.values()) for m in members(v)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [m for v in value for m in members(v)]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value), *(m for f in fields(value) for m in members(getattr(value, f.name)))]
    return [value] if isinstance(value, CODE) else []


def other(value):
    "A value of the same type that differs, as little as may be."
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, (str, bytes)):
        return value + value[:1] if value else type(value)("x")
    if isinstance(value, dict):
        key = next(reversed(value))
        return {**value, key: other(value[key])}
    if isinstance(value, (list, tuple)):
        return type(value)([*value[:-1], other(value[-1])])
    if isinstance(value, (set, frozenset)):
        return type(value)([*value, "another"])
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value + 1
    if is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            old = getattr(value, f.name)
            if isinstance(old, (bool, int, float, str)):
                return replace(value, **{f.name: other(old)})
    if isinstance(value, CODE):
        return source_hash if value is not source_hash else files.file_hash
    if value is None:
        return 0
    return None


def stage_reaching() -> dict:
    "(module, name) -> (stage, value) over all registered stages."
    return {
        where: (name, value)
        for name in MODULES
        for where, value in reached(get_stage(name).function).items()
    }


def test_every_container_and_constant_counts(monkeypatch):
    everything = stage_reaching()
    keys = {name: source_hash(get_stage(name).function) for name in MODULES}
    skipped = set()
    missed = []
    for (module, name), (stage, value) in everything.items():
        changed = None if isinstance(value, Untracked) else other(value)
        if changed is None:
            skipped.add(name)
            continue
        with monkeypatch.context() as m:
            m.setattr(sys.modules[module], name, changed)
            if source_hash(get_stage(stage).function) == keys[stage]:
                missed.append(f"{module}.{name}")
    assert not missed, f"changed without a new key: {missed}"
    registries = {
        "BLOCK_TYPES",
        "DEGRADATIONS",
        "LOSSES",
        "METRICS",
        "SEARCH_METHODS",
        "SOURCES",
        "SR_VARIANTS",
        "SURROGATE_DESIGNS",
    }
    assert len(everything) > 60 and registries <= {name for _, name in everything}
    assert skipped <= UNTRACKED | FOREIGN, (
        f"no way to change {skipped - UNTRACKED - FOREIGN}: teach `other`"
    )


def test_keys_are_the_same_in_another_process_and_after_work(tmp_path, monkeypatch):
    text = (
        "from tocsr.core.fingerprint import source_hash\n"
        "from tocsr.core.store import MODULES, get_stage\n"
        "print({n: source_hash(get_stage(n).function) for n in MODULES})"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", text],
            env=os.environ | dict(PYTHONHASHSEED=seed, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    ]
    from tocsr.core.config import get_profile
    from tocsr.data.images import load_photos

    load_photos(get_profile("smoke").data)  # fills caches
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    read_image(tmp_path / "large.png")  # above Pillow's limit
    here = {n: source_hash(get_stage(n).function) for n in MODULES}
    assert runs[0] == runs[1] and ast.literal_eval(runs[0]) == here


@pytest.fixture
def package(tmp_path, monkeypatch):
    """make(files) imports `main` of a fresh package `lab` of these files; its function `f` is the
    root.
    """
    monkeypatch.syspath_prepend(tmp_path)

    def make(**files):
        for name in [n for n in sys.modules if n.split(".")[0] == "lab"]:
            del sys.modules[name]
        for name, text in files.items():
            path = tmp_path / "lab" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
            for folder in (path.parent, tmp_path / "lab"):
                (folder / "__init__.py").touch()
        importlib.invalidate_caches()
        import linecache

        linecache.clearcache()
        sys.dont_write_bytecode = True
        return source_hash(importlib.import_module("lab.main").f)

    before = sys.dont_write_bytecode
    yield make
    sys.dont_write_bytecode = before
    for name in [n for n in sys.modules if n.split(".")[0] == "lab"]:
        del sys.modules[name]


def test_the_open_of_a_notebook_is_the_builtin(package):
    "IPython puts a wrapper of `open` into the names of a notebook."
    import functools

    key = package(main="def f(path): return open(path).read()")
    main = sys.modules["lab.main"]

    @functools.wraps(open)
    def wrapper(*args):
        return open(*args)

    wrapper.__module__ = "IPython.core.interactiveshell"
    main.open = types.FunctionType(wrapper.__code__, {"__name__": "IPython"}, "open")
    main.open.__wrapped__ = open
    assert source_hash(main.f) == key
    own = "def open(path): return 1\ndef f(path): return open(path).read()"
    assert package(main=own) != key


BASE = """
    import functools
    def g(x): return x + 1
    def h(x): return x + 2
    TABLE = dict(first=g, second=(h, [1, 2.5]))
    def f(x): return TABLE["first"](x)
"""


@pytest.mark.parametrize(
    "old, new",
    [
        ("return x + 2", "return x + 3"),  # a function inside a container
        ("first=g", "first=h"),
        ("2.5", "2.6"),
        ("dict(first=g, second", "dict(first=h, second"),
    ],
    ids=["function", "swapped", "number", "entry"],
)
def test_containers_are_followed(package, old, new):
    assert package(main=BASE) != package(main=BASE.replace(old, new))


@pytest.mark.parametrize(
    "wrap",
    [
        "@functools.lru_cache\n{}",
        "@functools.cache\n{}",
        "{}\ng = functools.partial(g, y=3)",
        "{}\ng = functools.lru_cache(g)",
        "import contextlib\n@contextlib.contextmanager\n{}",
    ],
)
def test_wrapped_functions_are_followed(package, wrap):
    texts = [
        "import functools\n"
        + wrap.format(f"def g(x, y=1): return x*{k}\n")
        + "\ndef f(x): return g(x)\n"
        for k in (2, 3)
    ]
    assert package(main=texts[0]) != package(main=texts[1])
    if "partial" in wrap:
        assert package(main=texts[0]) != package(main=texts[0].replace("y=3", "y=4"))


def test_decorators_closures_methods_and_configs_count(package):
    text = """
        import functools
        from dataclasses import dataclass
        K = 2
        @dataclass(frozen=True)
        class Config:
            size: int = 3
            def area(self): return self.size*K
        CONFIG = Config(size=5)
        def scaled(k):
            def inner(x): return x*k
            return inner
        double = scaled(7)
        def logged(function):
            @functools.wraps(function)
            def wrapper(*args): return function(*args) + 11
            return wrapper
        def plain(x): return x
        loud = logged(plain)
        pick = lambda x: x + 13
        def f(x, k=lambda K: K): return loud(double(CONFIG.area())) + pick(x)
    """
    keys = [package(main=text)] + [
        package(main=text.replace(old, new))
        for old, new in (
            ("K = 2", "K = 4"),
            ("size=5", "size=6"),
            ("scaled(7)", "scaled(8)"),
            ("+ 11", "+ 12"),
            ("x + 13", "x + 14"),
            ("self.size*K", "self.size + K"),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_attributes_of_imported_modules_count(package):
    for line in ("from lab import tools as S", "from . import tools as S", "import lab.tools as S"):
        for text in (
            f"{line}\ndef f(x): return S.scale(x)*S.K\n",
            f"def f(x):\n    {line}\n    return S.scale(x)*S.K\n",
        ):
            keys = {
                package(main=text, tools=f"K = {k}\ndef scale(x): return x{op}2\n")
                for k, op in ((1, "*"), (2, "*"), (1, "+"))
            }
            assert len(keys) == 3, text


def test_relative_imports_of_any_level_are_absolute_ones(package):
    tools = "def scale(x): return x*2\n"
    keys = {
        package(
            deep__er__main=f"def f(x):\n    {line}\n    return scale(x)\n",
            main="from lab.deep.er.main import f\n",
            tools=tools,
        )
        for line in ("from lab.tools import scale", "from ...tools import scale")
    }
    other = package(
        deep__er__main="def f(x):\n    from ...tools import scale\n    return scale(x)\n",
        main="from lab.deep.er.main import f\n",
        tools=tools.replace("2", "3"),
    )
    assert len(keys) == 1 and other not in keys


def test_text_that_shapes_nothing_changes_no_key(package):
    plain = package(main=BASE)
    assert (
        package(
            main=BASE.replace(
                "def g(x): return x + 1",
                'def g(x):\n        "Adds one."\n        # one\n        return (x +\n   '
                "             1)",
            )
        )
        == plain
    )
    assert (
        package(
            main="\n    import json\n"
            + BASE
            + "\n    UNUSED = 3\n    def unused(): return UNUSED\n"
        )
        == plain
    )


def test_moving_a_definition_changes_no_key(package):
    moved = BASE.replace("def g(x): return x + 1", "from lab.tools import g")
    assert package(main=BASE, tools="") == package(main=moved, tools="def g(x): return x + 1\n")
    renamed = BASE.replace("def g(x): return x + 1", "from .deep.other import g")
    assert package(main=BASE, tools="") == package(
        main=renamed, deep__other="def g(x): return x + 1\n"
    )


def test_what_a_process_fills_is_untracked(package):
    text = (
        "from tocsr.core.fingerprint import Untracked\nCACHE = Untracked()\ndef f(x): return "
        "CACHE.setdefault(x, x)\n"
    )
    key = package(main=text)
    sys.modules["lab.main"].CACHE["seen"] = 1
    assert source_hash(sys.modules["lab.main"].f) == key
    assert package(main=text.replace("Untracked()", "{}")) != key


def test_a_root_without_source_is_refused():
    scope = {"__name__": "lab.cell"}
    exec("def f(x): return x", scope)
    with pytest.raises(OSError):
        source_hash(scope["f"])


def test_a_new_field_of_settings_changes_only_the_values_that_are_read(package):
    text = """
        from dataclasses import dataclass
        from tocsr.core.validation import Checked
        @dataclass(frozen=True)
        class Settings(Checked):
            steps: int = 3
        class Plain:
            width: int = 8
        GIVEN = Settings(steps=5)
        def f(cfg: Settings): return cfg.steps, USED
    """
    wider = text.replace(
        "class Settings(Checked):", "class Settings(Checked):\n            more: int = 4"
    )

    def keys(used):
        return [package(main=t.replace("USED", used)) for t in (text, wider)]

    for used in ("0", "isinstance(cfg, Settings)"):
        before, after = keys(used)
        assert before == after  # the stage that has such settings declares their values
    before, after = keys("GIVEN")
    assert before != after  # a constant's values count
    plain = text.replace("USED", "Plain.width")
    assert package(main=plain) != package(main=plain.replace("width: int = 8", "width: int = 9"))
