"Style of the library, measured, and its vocabulary: the field's terms in American spelling."

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import style_report

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = [f for f in sorted((ROOT / "tocsr").rglob("*.py")) if f.name != "_modidx.py"]
SKIPPED = {".git", ".venv", "build", "runs", "__pycache__", ".ipynb_checkpoints"}

BRITISH = re.compile(
    r"(?:optim|normal|initial|summar|quant|regular|visual|util|minim|maxim|organ|recogn|real"
    r"|general|special|standard|serial|synchron|character|parametr|parameter|discret|local|penal"
    r"|emphas|categor|equal|final|priorit|random|token|vector|stabil|symbol)"
    r"is(?:e[drs]?|ers|ing|ations?)"
    r"|(?:colour|behaviour|favour|neighbour|grey|centre|artefact)\w*"
    r"|analys(?:e[drs]?|ing)|catalogues?|defence|fulfil|judgement|licen[c]e[ds]?|metres?"
    r"|(?:label|model|level|signal)l(?:ed|ing)|programmes?|sceptic\w*|whilst"
)

# Words of an earlier vocabulary -> the field's term, in names that the library defines.
OLD_WORDS = {
    "codec": "autoencoder",
    "coarse": "consistency_factor",
    "competitor": "method",
    "critic": "discriminator",
    "damaged": "degraded",
    "dearest": "most_expensive",
    "enlarge": "upscale",
    "enlarged": "upscaled",
    "enlarger": "upscaler",
    "fusion": "refiner",
    "gap": "f_acc",
    "hopeless": "fatal",
    "journal": "log",
    "judge": "evaluate or quality_gate",
    "knapsack": "lagrangian",
    "lattice": "periodic",
    "ledger": "cache",
    "lesson": "batch",
    "mend": "hint",
    "middles": "center_crops",
    "opponent": "method",
    "peer": "baseline",
    "picture": "image",
    "rival": "method",
    "shipped": "bundled",
    "tape": "trials",
    "torn": "truncated",
    "trust": "input_quality",
    "truth": "tabular_benchmark",
    "twin": "lr_counterpart",
    "yardstick": "baseline",
}
# Names of functions that mean something else in the field, or say nothing.
OLD_NAMES = {
    "answer": "best_feasible",
    "consistent": "back_project",
    "cut": "split_into_stages",
    "declare": "parse_subspace",
    "endpoints": "teacher_targets",
    "need": "run_stage",
    "owners": "assign_ranks",
    "pick": "gather",
    "reach": "receptive_field",
    "strip": "comparison_grid",
    "trace": "capture_stage_io",
    "tune": "finetune",
}


def words(text: str) -> list[str]:
    "Lower-case words of prose or code: names are split at underscores and inner capitals."
    return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)]


def texts() -> Iterator[tuple[str, str]]:
    "(place, text) of all prose and code that people read, without outputs of notebooks."
    for f in sorted(ROOT.rglob("*")):
        if SKIPPED & set(f.relative_to(ROOT).parts) or f == Path(__file__).resolve():
            continue
        name = str(f.relative_to(ROOT))
        if f.suffix == ".ipynb":
            for i, cell in enumerate(json.loads(f.read_text())["cells"]):
                yield f"{name} cell {i}", "".join(cell["source"])
        elif f.suffix in (".md", ".toml", ".yml", ".yaml", ".cff") or f.name == "Makefile":
            yield name, f.read_text()
        elif f.suffix == ".py" and f.parent.name in ("tests", "bench"):
            yield name, f.read_text()  # the library's text is the notebooks'


def defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    "(line, name) of functions, classes, arguments, variables at module level and fields."
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield n.lineno, n.name
        if isinstance(n, ast.arg):
            yield n.lineno, n.arg
        if isinstance(n, (ast.Module, ast.ClassDef)):
            for a in n.body:
                targets = getattr(a, "targets", [getattr(a, "target", None)])
                for t in (t for target in targets if target for t in ast.walk(target)):
                    if isinstance(t, ast.Name):
                        yield t.lineno, t.id


def old_names(name: str, tree: ast.AST) -> list[str]:
    "Places of names in the old vocabulary."
    bad = []
    for line, n in defined(tree):
        for w in words(n):
            new = OLD_WORDS.get(w) or OLD_WORDS.get(w.removesuffix("s"))
            if new:
                bad.append(f"{name}:{line}: {n} ({new})")
    for f in ast.walk(tree):
        if isinstance(f, ast.FunctionDef) and f.name in OLD_NAMES:
            bad.append(f"{name}:{f.lineno}: {f.name} ({OLD_NAMES[f.name]})")
    return bad


def british(place: str, text: str) -> list[str]:
    return [f"{place}: {w}" for w in words(text) if BRITISH.fullmatch(w)]


def test_lines_are_short_and_hold_one_statement():
    faults = style_report.measure(ROOT / "tocsr").faults
    assert not faults, "\n".join(faults)


def test_names_are_the_fields_terms():
    bad = []
    for f in LIBRARY:
        bad += old_names(str(f.relative_to(ROOT)), ast.parse(f.read_text()))
    assert not bad, "\n".join(bad)


def test_spelling_is_american():
    bad = [b for place, text in texts() for b in british(place, text)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "code, fault",
    [
        ("x = 1; y = 2", "module.py:1: semicolon"),
        ("x = " + "1" * 120, "module.py:1: 124 columns"),
        ("f(a, b, c, d, e)", "12.0 tokens per line > 10"),
        ("def f():\n" + "    x = 1\n" * 60, "module.py:1: f has 61 lines"),
    ],
)
def test_each_fault_is_found(tmp_path, code, fault):
    (tmp_path / "module.py").write_text(code + "\n")
    faults = style_report.measure(tmp_path).faults
    assert any(f.endswith(fault) for f in faults), faults


def test_old_and_british_words_are_found():
    code = "class Enlarger:\n    peers: int\ndef strip(picture, *, size, width): pass\nGAP = 1"
    found = [f.split(": ")[1].split(" (")[0] for f in old_names("m", ast.parse(code))]
    assert sorted(found) == ["Enlarger", "GAP", "peers", "picture", "strip"]
    text = "optimiser greyLevel n_colours normalisation; noise, raise, promise, precise, otherwise"
    assert len(british("text", text)) == 4
