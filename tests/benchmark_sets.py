"Test sets for tests: from a local folder, or downloaded where that is allowed."

import os
from pathlib import Path

import pytest

from tocsr.core.download import FetchError
from tocsr.data.benchmarks import Benchmark, load_benchmark


def find_set(name: str) -> Benchmark:
    "A set of $TOCSR_TEST_DATA, $TOCSR_DATA or ../shared/data; TOCSR_DOWNLOAD=1 fetches it."
    folders = [os.environ.get(k) for k in ("TOCSR_TEST_DATA", "TOCSR_DATA")]
    folders.append(str(Path(__file__).resolve().parents[2] / "shared/data"))
    for root in filter(None, folders):
        try:
            return load_benchmark(name, root, download=False)
        except FetchError:
            continue
    if os.environ.get("TOCSR_DOWNLOAD") == "1":
        return load_benchmark(name)
    pytest.skip(f"no {name}: set TOCSR_DATA to its folder, or TOCSR_DOWNLOAD=1")
