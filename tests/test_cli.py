"The runner: what runs again, what is an error, what an interrupt leaves."

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from typer.testing import CliRunner

import tocsr
from tocsr.cli import doctor, main, readme, reproduce
from tocsr.cli import upscale as command
from tocsr.core import cpu_threads
from tocsr.core.config import UNetConfig
from tocsr.core.cpu_threads import OtherLoad
from tocsr.core.image import to_array, to_tensor
from tocsr.inference.pipeline import TOCSRPipeline
from tocsr.models.autoencoder import fit_pca
from tocsr.models.diffusion import nano_unet, noise_schedule
from tocsr.models.generator import add_condition_channels
from tocsr.models.staged_unet import split_into_stages

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
    assert first.exit_code == 0 and "0 of 2 notebooks ran" in first.stdout
    assert re.search(rf"0 figures, 1 table, \d+ other files? +{table.parent}", first.stdout)


def test_ablations_are_a_field_of_the_overrides(repo, private_runs):
    path = notebook(repo, "01_a", "print(sorted(overrides.items()))")
    nb = json.loads(path.read_text())
    nb["cells"][1]["source"] += "\noverrides = {}"
    path.write_text(json.dumps(nb))
    r = call(
        *("reproduce", "--profile", "smoke", "--only", "a"),
        *("--no-ablations", "-p", 'overrides={"seed": 3}'),
    )
    assert r.exit_code == 0, r.stderr
    (executed,) = (private_runs / "notebooks").glob("smoke-*/01_a.ipynb")
    output = json.loads(executed.read_text())["cells"][-1]["outputs"][0]
    assert "".join(output["text"]) == "[('ablations', False), ('seed', 3)]\n"


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


def test_nothing_survives_a_runner_that_is_killed(repo, tmp_path):
    "SIGKILL leaves no time to stop children: they notice by themselves."
    notebook(repo, "01_a", WAIT)
    child = subprocess.Popen(
        [sys.executable, "-m", "tocsr", "reproduce", "--profile", "smoke"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    kernel = next(int(line.split()[1]) for line in child.stderr if line.startswith("pid"))
    below = {int(p) for p in children(child.pid)}
    assert kernel in below and len(below) >= 2, "papermill and its kernel"
    child.kill()
    child.communicate(timeout=60)
    for _ in range(600):
        alive = [p for p in below if running(p)]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive, f"processes {alive} outlived the runner"


def running(pid: int) -> bool:
    "Whether a process exists and is not a zombie."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    "Numbers of all processes below `pid`."
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = [p for p, parent in parents.items() if parent == pid]
    return found + [c for p in found for c in children(p)]


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
        (("reproduce", "-p", "force=true"), 2, ("--force",)),
        (("reproduce", "-p", "overrides=3"), 2, ("overrides", "object")),
        (("reproduce", "-p", "data_dir=photos"), 2, ("--data-dir",)),
        (("reproduce", "--time-limit", "soon"), 2, ("1h30m",)),
        (("reproduce", "--data-dir", "none"), 1, ("none", "no such folder")),
        (("reproduce", "--out", "nbs/x"), 2, ("inside nbs/",)),
        (("reproduce", "--save-outputs", "--profile", "smoke"), 2, ("cpu",)),
        (("reproduce", "--save-outputs", "--profile", "cpu", "--no-ablations"), 2, ("changed",)),
        (("doctor", "--seconds", "0"), 2, ("0.1",)),
        (("doctor", "--seconds", "nan"), 2, ("--seconds",)),
        (("doctor", "--seconds", "inf"), 2, ("--seconds", "finite")),
        (("upscale", "a.png", "--threads", "0"), 2, ("--threads",)),
        (("upscale", "a.png", "--seed", str(2**63)), 2, ("--seed", "2**63")),
        (("upscale", "a.png", "--seed", "1.5"), 2, ("--seed", "integer")),
        (("upscale", "a.png", "--scale", "0"), 2, ("above 0",)),
        (("upscale", "a.png", "--scale", "nan"), 2, ("--scale", "finite")),
        (("upscale", "a.png", "--outscale", "inf"), 2, ("finite",)),
        (("upscale", "a.png", "--max-mpixel", "inf"), 2, ("--max-mpixel",)),
        (("upscale", "a.png", "--strength", "nan"), 2, ("--strength", "finite")),
        (("upscale", "a.png", "--dtype", "int8"), 2, ("int8", "bf16")),
        (("upscale", "a.png", "--device", "cpu", "--dtype", "fp16"), 2, ("fp16", "bf16")),
        (("upscale",), 2, ("inputs", "--help")),
        (("upscale", "a.png", "--sacle", "2"), 2, ("--sacle", "--help")),
        (("upscale", "-", "a.png"), 2, ("alone",)),
        (("reprodcue",), 2, ("reprodcue",)),
    ],
)
def test_wrong_arguments_are_one_clear_line(repo, args, code, words):
    r = call(*args)
    assert (
        r.exit_code == code and all(w in r.stderr for w in words) and "Traceback" not in r.stderr
    ), r.stderr
    lines = [line for line in r.stderr.splitlines() if not line.startswith("running")]
    assert len(lines) == 1 and lines[0].startswith("tocsr: "), r.stderr


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
            "publish",
            "readme",
        )
    ]
    assert order == sorted(order)
    assert run("--version").stdout == f"tocsr {tocsr.__version__}\n"


def run_python(code: str) -> subprocess.CompletedProcess:
    "Run code in a process of its own that imports this checkout."
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_help_loads_no_heavy_library():
    code = (
        "import sys\nfrom tocsr.cli.main import app\napp(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules)"
    )
    r = run_python(code)
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


def numeric_options() -> list[tuple[str, str, type]]:
    "(command, option, kind) of every numeric option of every command."
    group = typer.main.get_command(main.app)
    found = []
    for name, given in group.commands.items():
        (info,) = [
            i
            for i in main.app.registered_commands
            if (i.name or i.callback.__name__.replace("_", "-")) == name
        ]
        kinds = get_type_hints(info.callback)
        for p in given.params:
            for kind in (int, float):
                if kinds.get(p.name) in (kind, kind | None):
                    found.append((name, p.opts[0], kind))
    return found


def test_there_are_numeric_options():
    found = {(name, option) for name, option, _ in numeric_options()}
    assert {("upscale", "--scale"), ("upscale", "--seed"), ("plan", "--gpu-memory")} <= found


@pytest.mark.parametrize("name, option, kind", numeric_options())
def test_no_numeric_option_takes_what_is_not_finite_or_too_large(repo, name, option, kind):
    "Refused while the arguments are read, so that the required ones can be missing."
    for bad in ("nan", "inf", "-inf", "1e999") if kind is float else (2**63, -(2**63) - 1, "1.5"):
        r = call(name, f"{option}={bad}")
        assert r.exit_code == 2 and option in r.stderr, (bad, r.stderr)
        assert len(r.stderr.splitlines()) == 1 and "Traceback" not in r.stderr


def advice(tree: ast.AST) -> list[str]:
    "Strings of code, without docstrings, that tell someone to delete something."
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    return [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in texts
        if re.search(r"\b(delete|erase|rm)\b|\bremove (it|the|this|that|them|your)\b", n.value)
    ]


def test_no_message_advises_to_delete_what_tocsr_did_not_write():
    "Only results in the run store, which are computed again."
    found = {
        (f.relative_to(ROOT / "tocsr").as_posix(), text)
        for f in (ROOT / "tocsr").rglob("*.py")
        for text in advice(ast.parse(f.read_text()))
    }
    allowed = {
        ("core/store.py", "; delete the folder and run again"),  # a result without one of its files
        ("core/store.py", "); delete "),  # a damaged meta.json
    }
    assert found == allowed
    assert advice(ast.parse("raise E(f'{x}: delete it and run again')"))


# The interpreter starts without a stream as here: its number is closed and its object is None.
# Forked after the imports, which take longer than the commands.
CLOSED = """
import os
import sys
from itertools import combinations

from tocsr.cli.main import app
from tocsr.inference import pipeline

image, model = sys.argv[1:]
COMMANDS = (
    (["--version"], 0),
    (["--help"], 0),
    (["runs"], 0),
    (["info", "--model", model], 0),
    (["upscale", image, "-o", "out.png", "--model", model, "--overwrite"], 0),
    (["upscale", image, "-o", "out.png", "--model", model, "--overwrite", "--json"], 0),
    (["upscale", "-", "-o", "out.png", "--model", model, "--overwrite"], 1),
    (["upscale", image, "--scale", "0"], 2),
    (["reproduce", "--profile", "cup"], 2),
)
NAMES = ("stdin", "stdout", "stderr")
SETS = [s for n in (1, 2, 3) for s in combinations(range(3), n)]


def run(arguments, closed):
    for number in closed:
        os.close(number)
        setattr(sys, NAMES[number], None)
    try:
        app(arguments)
    except SystemExit as e:
        os._exit(e.code or 0)
    except BaseException:
        os._exit(99)
    os._exit(98)


for arguments, code in COMMANDS:
    for closed in SETS:
        child = os.fork()
        if child == 0:
            run(arguments, closed)
        got = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if "-" in arguments:  # closed: an error; open but no image: one, too
            code = 1
        print(got == code, got, code, arguments, closed, file=sys.stderr, flush=True)
"""


def test_every_command_works_with_closed_streams(tmp_path, tiny_model):
    image = tmp_path / "a.png"
    Image.new("RGB", (16, 12), "gray").save(image)
    r = subprocess.run(
        [sys.executable, "-c", CLOSED, str(image), str(tiny_model)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
    )
    rows = [line for line in r.stderr.splitlines() if line.startswith(("True", "False"))]
    assert len(rows) == 9 * 7 and not [row for row in rows if row.startswith("False")], r.stderr
    assert Image.open(tmp_path / "out.png").size == (64, 48)
    assert "Traceback" not in r.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_shell_closes_streams(tmp_path, closed):
    command = f'"{sys.executable}" -m tocsr runs {closed}'
    r = subprocess.run(
        ["sh", "-c", command], capture_output=True, env=os.environ | dict(PYTHONPATH=str(ROOT))
    )
    assert r.returncode == 0 and b"Traceback" not in r.stderr, r.stderr
    assert (b"no results" in r.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_a_closed_standard_output_takes_no_image(tmp_path, tiny_model):
    Image.new("RGB", (16, 12), "gray").save(tmp_path / "a.png")
    command = f'"{sys.executable}" -m tocsr upscale a.png -o - --model "{tiny_model}" >&-'
    r = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    assert r.returncode == 1 and "standard output (-) is closed" in r.stderr


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    "A folder with a tiny untrained model."
    torch.manual_seed(0)
    cfg = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
    smooth = F.interpolate(torch.rand(8, 3, 16, 16), 64, mode="bicubic").clamp(0, 1) * 2 - 1
    unet = add_condition_channels(split_into_stages(nano_unet(cfg, 16)), 16)
    pipe = TOCSRPipeline(fit_pca(smooth), unet, noise_schedule("v_prediction"))
    return pipe.save_pretrained(tmp_path_factory.mktemp("m") / "model")


def upscale(model, *args):
    return call("upscale", *map(str, args), "--model", str(model))


def test_results_are_next_to_their_inputs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "photos/b.jpg", "photos/deep/c.png", "d.gif"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), "gray").save(path)
    r = upscale(tiny_model, "a.png", "photos", "d.gif")
    assert r.exit_code == 0, r.stderr
    made = ("a_x4.png", "photos_x4/b.jpg", "photos_x4/deep/c.png", "d_x4.png")
    assert all(Image.open(tmp_path / name).size == (64, 48) for name in made)
    again = upscale(tiny_model, "a.png", "photos", "d.gif")
    assert again.exit_code == 0 and "0 of 4 images upscaled, 4 unchanged" in again.stderr
    # as the shell expands *.png in the second call
    twice = upscale(tiny_model, "a.png", "a_x4.png")
    assert twice.exit_code == 0 and "a_x4.png is the result of another input" in twice.stderr
    assert not (tmp_path / "a_x4_x4.png").exists()
    assert upscale(tiny_model, "a_x4.png").exit_code == 0
    assert Image.open("a_x4_x4.png").size == (256, 192)
    other = upscale(tiny_model, "a.png", "--seed", 1)
    assert other.exit_code == 2 and "--overwrite" in other.stderr
    Image.new("RGB", (16, 12), "white").save("a_x4.png")  # now a file of the user's
    mine = upscale(tiny_model, "a.png", "a_x4.png")
    assert mine.exit_code == 2 and "a_x4.png is an input" in mine.stderr
    assert Image.open("a_x4.png").size == (16, 12)
    Image.new("RGB", (16, 12)).save("d.png")
    both = upscale(tiny_model, "d.gif", "d.png", "--overwrite")
    assert both.exit_code == 2 and "would both become" in both.stderr


def test_a_quoted_pattern_is_expanded_as_a_shell_does(tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "ph [2024]"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 12)).save(folder / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for i, pattern in enumerate((f"{folder}/*.png", "~/ph*/*.png", "~/ph [2024]/*.png")):
        out = tmp_path / f"out{i}"
        r = upscale(tiny_model, pattern, "-o", f"{out}/")
        assert r.exit_code == 0 and {p.name for p in out.glob("*.png")} == {"a.png", "b.png"}
    r = upscale(tiny_model, "~/ph [2024]/a.png", "-o", "~/home.png")
    assert r.exit_code == 0 and (tmp_path / "home.png").is_file(), r.stderr
    r = upscale(tiny_model, f"{folder}/*.jpg")
    assert r.exit_code in (1, 2) and "*.jpg" in r.stderr


def test_a_large_factor_is_made_in_two_passes(tiny_model, tmp_path):
    "The same image as two calls, and the output says so."
    Image.effect_noise((17, 12), 60).convert("RGB").save(tmp_path / "a.png")
    r = upscale(tiny_model, tmp_path / "a.png", "--outscale", 6)
    assert r.exit_code == 0 and "6x in 2 passes, 4x and 1.5x" in r.stderr, r.stderr
    assert "2 passes" in r.stdout and Image.open(tmp_path / "a_x6.png").size == (102, 72)
    pipe = TOCSRPipeline.from_pretrained(tiny_model)
    image = to_tensor(np.array(Image.open(tmp_path / "a.png")))
    once = pipe.upscale_tensor(image[None])
    want = to_array(pipe.upscale_tensor(once, scale=1.5)[0]).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "a_x6.png")).astype(int) - want).max() <= 1
    assert upscale(tiny_model, tmp_path / "a.png", "-s", 16).exit_code == 0
    assert Image.open(tmp_path / "a_x16.png").size == (272, 192)
    r = upscale(tiny_model, tmp_path / "a.png", "--scale", 17)
    assert r.exit_code == 2 and "at most 16" in r.stderr
    limit = dict(quality=95, max_pixels=10_000_000)  # as large a result as 40 Mpixel at factor 4
    assert command.reading_options(None, None, [4, 2.0], 4) == limit


def test_precision_and_threads(tiny_model, tmp_path, monkeypatch):
    Image.effect_noise((16, 12), 60).convert("RGB").save(tmp_path / "a.png")
    results = {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / f"{dtype}.png"
        r = upscale(tiny_model, tmp_path / "a.png", "-o", out, "--dtype", dtype, "--device", "cpu")
        assert r.exit_code == 0, r.stderr
        results[dtype] = np.asarray(Image.open(out)).astype(int)
    assert 0 < np.abs(results["fp32"] - results["bf16"]).max() < 40
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    load = OtherLoad()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(OtherLoad, "free_threads", lambda self: 1)
    command.choose_threads(None, load)
    command.choose_threads(3, load)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command.choose_threads(None, load)
    assert used == [1, 3]


@pytest.mark.parametrize(
    "busy, cores, threads", [(0, 8, 8), (0.4, 8, 8), (3, 8, 5), (7.8, 8, 1), (20, 8, 1), (0, 1, 1)]
)
def test_threads_are_the_cores_that_others_leave_free(busy, cores, threads, monkeypatch):
    "Ticks of /proc/stat over ten seconds in which this process did nothing."
    ticks = iter(((0, 0), (int(1000 * busy), 1000 * cores)))
    monkeypatch.setattr(cpu_threads, "_core_ticks", lambda: next(ticks))
    monkeypatch.setattr(cpu_threads, "_allowed_cores", lambda: set(range(cores)))
    monkeypatch.setattr(cpu_threads, "count_cores", lambda: cores)
    monkeypatch.setattr(cpu_threads.time, "process_time", lambda: 0.0)
    clock = iter((0.0, 10.0))
    monkeypatch.setattr(cpu_threads.time, "monotonic", lambda: next(clock))
    if busy > cores:  # where the system counts nothing, the load average without this process
        monkeypatch.setattr(cpu_threads, "_core_ticks", lambda: None)
        monkeypatch.setattr(os, "getloadavg", lambda: (busy + 1, 0, 0))
    assert OtherLoad().free_threads() == threads


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 8),
        ({"_QUOTA_V2": "max 100000"}, 8),
        ({"_QUOTA_V2": "250000 100000"}, 3),
        ({"_QUOTA_V2": "50000 100000"}, 1),
        ({"_QUOTA_V1": "-1", "_PERIOD_V1": "100000"}, 8),
        ({"_QUOTA_V1": "200000", "_PERIOD_V1": "100000"}, 2),
    ],
)
def test_the_quota_of_a_container_limits_the_cores(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_threads, "_allowed_cores", lambda: set(range(8)))
    for name in ("_QUOTA_V2", "_QUOTA_V1", "_PERIOD_V1"):
        monkeypatch.setattr(cpu_threads, name, tmp_path / name)
        if name in files:
            (tmp_path / name).write_text(files[name])
    assert cpu_threads.count_cores() == cores


def test_the_threads_of_this_machine():
    "Nothing replaced: the files of this system, whatever they say."
    code = (
        "from tocsr.cli.upscale import choose_threads\n"
        "from tocsr.core.cpu_threads import OtherLoad, count_cores\n"
        "load = OtherLoad()\nsum(range(10**6))\n"
        "assert 1 <= choose_threads(None, load) <= count_cores()"
    )
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env["PYTHONPATH"] = str(ROOT)
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr


def test_loading_is_announced_before_torch_is_imported(tmp_path):
    code = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise ImportError('torch is being imported')\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from tocsr.cli.main import app\napp(['upscale', 'a.png'])"
    )
    r = run_python(code)
    assert r.stderr.splitlines() == ["tocsr: loading model", "tocsr: torch is being imported"]


def test_completion_names_the_commands_without_loading_torch():
    env = os.environ | dict(
        PYTHONPATH=str(ROOT),
        _TOCSR_COMPLETE="complete_bash",
        COMP_WORDS="tocsr up",
        COMP_CWORD="1",
    )
    code = (
        "import sys\nfrom tocsr.cli.main import app\n"
        "try:\n    app(prog_name='tocsr')\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert r.stdout.split() == ["upscale"], r.stderr
