"The runner: what runs again, what is an error, what an interrupt leaves."

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tocsr
from tocsr.cli import doctor, main, readme, reproduce

ROOT = Path(__file__).resolve().parents[1]


def notebook(root, name, *code):
    "A notebook with a parameters cell and `code` cells in a toy repository."
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata=dict(tags=["parameters"]) if i == 0 else {},
            execution_count=None,
            outputs=[],
            source=c,
        )
        for i, c in enumerate(('profile = ""\ndata_dir = ""\nforce = False', *code))
    ]
    nb = dict(
        cells=[dict(cell_type="markdown", id="t", metadata={}, source=f"# {name}\n> A toy.")]
        + cells,
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")),
    )
    path = root / "nbs" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(nb, indent=1, sort_keys=True) + "\n")
    return path


WRITE = """import os, pathlib
out = pathlib.Path(os.environ["TOCSR_RUNS"]) / "figures" / profile
out.mkdir(parents=True, exist_ok=True)
(out / "table_1.csv").write_text(f"forced,{force}")
print("from", pathlib.Path.cwd())"""


@pytest.fixture
def repo(tmp_path, monkeypatch):
    root = tmp_path / "repo"
    root.mkdir()
    (root / "settings.ini").write_text("[DEFAULT]\nlib_name = tocsr\n")
    notebook(root, "01_a", WRITE)
    notebook(root, "02_b", "x = 1", "y = x")
    monkeypatch.chdir(root)
    return root


def call(*args):
    return CliRunner().invoke(main.app, list(args))


def test_a_lost_file_a_changed_cell_and_force_run_again_and_nothing_else_does(repo, private_runs):
    def run(*a):
        return re.findall(r"running (\w+)", call("reproduce", "--profile", "smoke", *a).stderr)

    table = private_runs / "figures/smoke/table_1.csv"
    assert run() == ["01_a", "02_b"] and table.read_text() == "forced,False"
    table.write_text("by hand")
    assert run() == ["01_a"] and table.read_text() == "forced,False"
    assert run("--only", "a", "--force") == ["01_a"] and table.read_text() == "forced,True"
    notebook(repo, "02_b", "x = 2", "y = x")
    assert run() == ["02_b"]
    first = call("reproduce", "--profile", "smoke")
    assert (
        first.exit_code == 0
        and "0 of 2 notebooks ran" in first.stdout
        and "table_1" in first.stdout
    )


def test_an_error_names_notebook_cell_and_executed_copy(repo, private_runs):
    notebook(repo, "01_a", "x = 1", "1/(x - 1)\ny = 2")
    r = call("reproduce", "--profile", "smoke")
    line = r.stderr.strip().splitlines()[-1]
    assert r.exit_code == 1 and "Traceback" not in r.stderr
    for word in (
        "01_a.ipynb",
        "In [4]",
        "1/(x - 1)",
        "ZeroDivisionError",
        str(private_runs / "notebooks/smoke/01_a.ipynb"),
    ):
        assert word in line
    assert (private_runs / "notebooks/smoke/01_a.ipynb").is_file() and not (
        private_runs / "notebooks/smoke/01_a.json"
    ).exists()
    assert "running 02_b" not in r.stderr


def test_a_killed_kernel_is_an_error(repo):
    notebook(repo, "01_a", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    r = call("reproduce", "--profile", "smoke", "--only", "a")
    assert r.exit_code == 1 and "01_a.ipynb stopped at" in r.stderr and "died" in r.stderr


WAIT = (
    "import os, sys, time\nprint('pid', os.getpid(), file=sys.stderr, flush=True)\ntime.sleep(600)"
)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_a_record_and_no_process(repo, private_runs, number, code):
    notebook(repo, "01_a", WAIT)
    command = [sys.executable, "-m", "tocsr", "reproduce", "--profile", "smoke"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    kernel = next(int(line.split()[1]) for line in child.stderr if line.startswith("pid"))
    if number == signal.SIGINT:
        os.killpg(child.pid, number)  # as Ctrl-C does
    else:
        child.send_signal(number)  # as a scheduler does
    out, err = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in err and "nothing has finished" in out
    folder = private_runs / "notebooks/smoke"
    stopped = json.loads((folder / "01_a.stopped.json").read_text())
    assert not (folder / "01_a.json").exists() and stopped["reason"] and stopped["wall_s"] > 0
    for _ in range(100):
        if not Path(f"/proc/{kernel}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the kernel outlived the runner")


def test_a_time_limit_stops_before_the_next_notebook(repo, private_runs, monkeypatch):
    monkeypatch.setenv("TOCSR_TIME_LIMIT", "")  # restored afterwards
    monkeypatch.setenv("TOCSR_DEADLINE", "0")
    left = iter((60.0, 0.0))  # before 01_a, before 02_b
    monkeypatch.setattr(reproduce, "time_left", lambda: next(left, 60.0))
    r = call("reproduce", "--profile", "smoke", "--time-limit", "60s")
    assert r.exit_code == 75 and "time limit" in r.stderr and "running 01_a" in r.stderr
    monkeypatch.delenv("TOCSR_DEADLINE")
    assert call("reproduce", "--profile", "smoke").exit_code == 0


def test_a_stage_that_stops_at_its_time_limit_has_the_same_exit_code(repo, private_runs):
    notebook(
        repo,
        "01_a",
        "from tocsr.core.time_limit import TimeLimitReached\nraise TimeLimitReached('step 3 of 9')",
    )
    r = call("reproduce", "--profile", "smoke", "--only", "a")
    assert r.exit_code == 75 and "01_a" in r.stderr and "continue" in r.stderr
    assert (
        "TimeLimitReached"
        in json.loads((private_runs / "notebooks/smoke/01_a.stopped.json").read_text())["reason"]
    )


@pytest.mark.parametrize(
    "args, code, words",
    [
        (("reproduce", "--profile", "cup"), 2, ("'cup'", "smoke", "paper")),
        (("reproduce", "--only", "8"), 2, ("'8'", "01_a", "02_b")),
        (("reproduce", "--from", "sarch"), 2, ("'sarch'", "02_b")),
        (("reproduce", "-p", "sede=3"), 2, ("'sede'", "profile, data_dir, force")),
        (("reproduce", "-p", "seed"), 2, ("name=value",)),
        (("reproduce", "-p", "profile=smoke"), 2, ("--profile",)),
        (("reproduce", "--time-limit", "soon"), 2, ("1h30m",)),
        (("reproduce", "--data-dir", "none"), 1, ("none", "no such folder")),
        (("reproduce", "--out", "nbs/x"), 2, ("inside nbs/",)),
        (("reproduce", "--save-outputs", "--profile", "smoke"), 2, ("cpu",)),
        (("doctor", "--seconds", "0"), 2, ("0.1",)),
        (("reprodcue",), 2, ("reprodcue",)),
    ],
)
def test_wrong_arguments_are_one_clear_line(repo, args, code, words):
    r = call(*args)
    assert (
        r.exit_code == code and all(w in r.stderr for w in words) and "Traceback" not in r.stderr
    ), r.stderr


def test_the_module_and_its_options():
    def run(*a):
        return subprocess.run(
            [sys.executable, "-m", "tocsr", *a],
            capture_output=True,
            text=True,
            env=os.environ | dict(PYTHONPATH=str(ROOT)),
        )

    long = run("--help")
    short = run("-h")
    assert long.stdout == short.stdout and long.returncode == 0 and "Usage: tocsr" in long.stdout
    order = [
        long.stdout.index(f"\n  {name} ")
        for name in (
            "upscale",
            "info",
            "eval",
            "bench",
            "reproduce",
            "plan",
            "doctor",
            "runs",
            "fetch-photos",
            "readme",
        )
    ]
    assert order == sorted(order)
    assert run("--version").stdout == f"tocsr {tocsr.__version__}\n"


def test_help_loads_no_heavy_library():
    code = (
        "import sys\nfrom tocsr.cli.main import app\napp(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules)"
    )
    r = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    assert r.returncode == 0, r.stderr


def test_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    r = call("reproduce")
    assert r.exit_code == 1 and "clone it" in r.stderr
    with pytest.raises(reproduce.RunError):
        CliRunner().invoke(main.app, ["--debug", "reproduce"], catch_exceptions=False)


def test_a_damaged_notebook_is_named(repo):
    (repo / "nbs/02_b.ipynb").write_text("{")
    r = call("reproduce", "--profile", "smoke", "--only", "a")
    assert r.exit_code == 1 and "02_b.ipynb" in r.stderr and "not a notebook" in r.stderr


def test_outputs_too_large_to_commit_are_refused(repo, tmp_path):
    nb = json.loads((repo / "nbs/02_b.ipynb").read_text())
    nb["cells"][2]["outputs"] = [dict(output_type="stream", name="stdout", text=["x" * 3_000_000])]
    (tmp_path / "big.ipynb").write_text(json.dumps(nb))
    before = (repo / "nbs/02_b.ipynb").read_text()
    with pytest.raises(reproduce.RunError, match="3.0 MB"):
        reproduce.save_outputs(repo / "nbs/02_b.ipynb", tmp_path / "big.ipynb", repo)
    assert (repo / "nbs/02_b.ipynb").read_text() == before


def test_doctor_speaks_json_and_plain_text(private_runs):
    r = call("doctor", "--json", "--seconds", "0.1")
    d = json.loads(r.stdout)
    assert (
        r.exit_code == 0
        and 0 < d["speed"]["ratio"] < 2
        and d["machine"]["cores"] >= 1
        and d["free_gib"] > 0
    )
    assert (
        d["metrics"]["psnry"] is None
        and d["runs"] == str(private_runs)
        and "astronaut" in d["photographs"]["names"]
    )
    text = doctor.describe_machine(d)
    assert "allocator" in text and f"{d['speed']['gemm_gflops']} GFLOP/s" in text


def test_runs_lists_what_the_store_holds(private_runs):
    assert "no results" in call("runs").stdout
    (private_runs / "teacher/abc").mkdir(parents=True)
    (private_runs / "teacher/abc/meta.json").write_text(
        json.dumps(dict(profile=dict(name="smoke"), wall_s=61, finished="2026-01-01T00:00:00Z"))
    )
    assert re.search(r"teacher\s+abc\s+smoke\s+1 min 01 s", call("runs").stdout)


def test_the_readmes_table_is_what_was_measured():
    times = ROOT / "paper_figures/runtimes.json"
    assert (
        readme.render_readme_page(ROOT, json.loads(times.read_text()) if times.is_file() else {})
        == (ROOT / "README.md").read_text()
    ), "run tocsr readme"
