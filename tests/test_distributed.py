"""Two processes of `accelerate launch` (gloo, CPU) make the library that one process makes, to the
last bit.
"""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from launcher import launch_command

from tocsr.core.files import read_weights

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
    import sys
    from pathlib import Path

    import torch
    from accelerate import PartialState
    from diffusers import UNet2DConditionModel

    from tocsr.core.random import shared_step_generator
    from tocsr.models.diffusion import noise_schedule, null_context
    from tocsr.models.architecture import PAPER_ARCHITECTURE, REMOVED, Architecture
    from tocsr.models.staged_unet import split_into_stages
    from tocsr.models.surrogates import assemble, build_library, save_library
    from tocsr.search.fidelity import Fidelity
    from tocsr.stages.feature_distillation import distill_surrogates, shard_library
    from tocsr.core.files import save_weights
    from tocsr.core.store import TrainOptions

    state, out = PartialState(cpu=True), Path(sys.argv[1])
    unet = UNet2DConditionModel.from_pretrained(out.parent, subfolder="unet")
    unet.eval().requires_grad_(False)
    teacher = split_into_stages(unet)
    paper = Architecture.parse(PAPER_ARCHITECTURE).by_stage
    designs = {n: tuple(dict.fromkeys((o, "R"))) for n, o in paper.items() if o != REMOVED}
    library = build_library(teacher, designs, context=null_context(unet, 1))

    def batch(step):
        g = shared_step_generator(3, step)
        z = torch.randn(2, 4, 8, 8, generator=g)
        return z, torch.randint(1000, (2,), generator=g), null_context(unet, 2)

    options = TrainOptions(out / "scratch")
    losses = distill_surrogates(teacher, library, batch, steps=3, lr=1e-3, options=options)
    save_library(out / f"library-{state.process_index}", library, teacher)
    latents = torch.randn(4, 4, 8, 8, generator=shared_step_generator(4, 0))
    fidelity = Fidelity.draw(teacher, noise_schedule(), latents)
    f_acc = fidelity(assemble(teacher, library, PAPER_ARCHITECTURE))
    numbers = dict(losses=losses, f_acc=f_acc.errors)
    save_weights(out / f"numbers-{state.process_index}.safetensors", numbers)
    own = len(shard_library(library, state.process_index, state.num_processes))
    line = f"process {state.process_index}: {own} of {len(library)} trained"
    print(line + "\\n", end="", flush=True)  # one write: two processes share the pipe
"""


def launch(folder: Path, processes: int) -> str:
    "Train in `processes` processes; returns their output."
    folder.mkdir()
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    command = launch_command(processes) if processes > 1 else [sys.executable]
    r = subprocess.run(
        [*command, str(folder / "train.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"),
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout


def tensors(folder: Path) -> dict:
    return {
        f"{f.name}|{k}": v
        for f in sorted(folder.glob("*.safetensors"))
        for k, v in read_weights(f).items()
    }


def thin_checkpoint(folder: Path):
    """A UNet with SD 1.5's layout and key names, as thin as its group norms allow, as a diffusers
    folder.
    """
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64, 128, 128),
        cross_attention_dim=768,
        attention_head_dim=8,
    ).save_pretrained(folder / "unet")
    names = read_weights(folder / "unet/diffusion_pytorch_model.safetensors")
    assert {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "mid_block.resnets.1.conv2.bias",
        "up_blocks.3.attentions.2.proj_out.weight",
    } <= names.keys()


def test_two_processes_make_the_library_of_one(tmp_path):
    thin_checkpoint(tmp_path)
    launch(tmp_path / "one", 1)
    output = launch(tmp_path / "two", 2)
    shares = [int(n) for n in re.findall(r": (\d+) of \d+ trained", output)]
    assert len(shares) == 2 and min(shares) > 0  # both worked
    one = tensors(tmp_path / "one/library-0") | tensors(tmp_path / "one")
    assert sum(shares) == len(list((tmp_path / "one/library-0").glob("*.safetensors"))) >= 6
    for rank in range(
        2
    ):  # and both hold all of it, and measure the same f_acc of the paper's vector
        two = tensors(tmp_path / f"two/library-{rank}") | {
            k.replace(f"numbers-{rank}", "numbers-0"): v
            for k, v in tensors(tmp_path / "two").items()
            if f"numbers-{rank}" in k
        }
        assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
        assert json.loads(
            (tmp_path / f"two/library-{rank}/library.json").read_text()
        ) == json.loads((tmp_path / "one/library-0/library.json").read_text())


STAGE = """
    import os
    import sys
    from pathlib import Path

    import torch

    from tocsr.core.config import get_profile
    from tocsr.core.distributed import rank
    from tocsr.core.store import StoreError, run_stage, stage

    os.environ["TOCSR_RUNS"] = sys.argv[1 + (rank() if len(sys.argv) > 2 else 0)]


    @stage("compare", data=False)
    def tiny(run):
        return dict(value=3)


    try:
        value = run_stage("compare", get_profile("smoke", device="cpu")).results["value"]
        line = f"process {rank()}: {value}"
    except StoreError as e:
        line = f"process {rank()}: {e}"
    print(line + "\\n", end="", flush=True)
"""


def run_tiny_stage(tmp_path, *folders) -> list[str]:
    "A line of every process of a stage that returns 3."
    (tmp_path / "stage.py").write_text(textwrap.dedent(STAGE))
    r = subprocess.run(
        [*launch_command(2), str(tmp_path / "stage.py"), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"),
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return sorted(line for line in r.stdout.splitlines() if line.startswith("process "))


def test_processes_with_separate_results_folders_are_refused_with_both_places(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    lines = run_tiny_stage(tmp_path, first, second)
    assert len(lines) == 2
    for line in lines:
        assert "must share one results folder" in line and "TOCSR_RUNS" in line
        assert str(first) in line and f"process 1 on {socket.gethostname()}: {second}" in line
    assert not list(first.rglob("meta.json")) and not list(second.rglob("meta.json"))
    shared = run_tiny_stage(tmp_path, first)
    assert shared == ["process 0: 3", "process 1: 3"]
    assert not list(first.glob(".shared-*"))
