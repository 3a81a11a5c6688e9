"""Give an empty environment the core dependencies of tocsr, and nothing else, without a download.

    python tests/slim_environment.py path/to/other/python

links what `pip install tocsr` would install there from the environment of the running Python.
"""

import csv
import subprocess
import sys
import tomllib
from collections import defaultdict
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def core_requirements() -> list[str]:
    "The requirements in pyproject.toml without any extra."
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def closure(requirements: list[str]) -> dict[str, Distribution]:
    "The distributions that these requirements bring here, by name, with all that those need."
    found: dict[tuple[str, frozenset], Distribution] = {}
    todo = [Requirement(r) for r in requirements]
    while todo:
        wanted = todo.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in found:
            continue
        found[key] = distribution(wanted.name)
        for r in map(Requirement, found[key].requires or ()):
            extras = wanted.extras or {""}
            if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras):
                todo.append(r)
    return {name: d for (name, _), d in found.items()}


def files_of(d: Distribution) -> list[str]:
    "Files of a distribution below site-packages."
    rows = csv.reader((d.read_text("RECORD") or "").splitlines())
    return [r[0] for r in rows if not r[0].startswith("..") and not r[0].endswith(".pyc")]


def link(chosen: dict[str, Distribution], target: Path):
    "Links to the files of `chosen` in `target`; to a whole folder where no other has files in it."
    owners = defaultdict(set)
    for d in distributions():
        for top in {f.partition("/")[0] for f in files_of(d)}:
            owners[top].add(canonicalize_name(d.name))
    shared = {top for top, names in owners.items() if not names <= chosen.keys()}
    for d in chosen.values():
        tops = ((f.partition("/")[0], f) for f in files_of(d))
        for f in {f if top in shared else top for top, f in tops}:
            if not (target / f).exists():
                (target / f).parent.mkdir(parents=True, exist_ok=True)
                (target / f).symlink_to(d.locate_file(f))


if __name__ == "__main__":
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.check_output([sys.argv[1], "-c", code], text=True).strip()
    chosen = closure(core_requirements())
    link(chosen, Path(site))
    print(f"{len(chosen)} distributions linked")
