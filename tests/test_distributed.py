"Two processes of `accelerate launch` (gloo, CPU) make the library that one process makes, to the last bit."
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
import torch
from tocsr.store import read_weights

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
    import sys, torch
    from pathlib import Path
    from diffusers import UNet2DConditionModel
    from accelerate import PartialState
    from tocsr.store import save_weights
    from tocsr.surrogates import common_generator, cut, distill_shared, save_library, shard, surrogate_library
    from tocsr.diffusion import null_context
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, block_out_channels=(32, 32), cross_attention_dim=16, attention_head_dim=2, layers_per_block=1,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval().requires_grad_(False)
    teacher = cut(unet)
    library = surrogate_library(teacher, context=null_context(unet, 1))
    def batch(step):
        g = common_generator(3, step)
        return torch.randn(2, 4, 8, 8, generator=g), torch.randint(1000, (2,), generator=g), null_context(unet, 2)
    state, out = PartialState(cpu=True), Path(sys.argv[1])
    losses = distill_shared(teacher, library, batch, 4, 1e-3, out/"scratch")
    save_library(out/f"library-{state.process_index}", library, teacher)
    save_weights(out/f"losses-{state.process_index}.safetensors", dict(losses=losses))
    print("process", state.process_index, "of", state.num_processes, "trained", len(shard(library, state.process_index, state.num_processes)), "of", len(library))
"""


def launch(folder: Path, processes: int) -> str:
    "Train in `processes` processes; what they said."
    folder.mkdir()
    (folder/"train.py").write_text(textwrap.dedent(SCRIPT))
    # --multi_gpu is accelerate's name for torchrun; --cpu would ask for MPI. The script's PartialState(cpu=True) makes it gloo on the CPU.
    start = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    r = subprocess.run([sys.executable, *(start if processes > 1 else []), str(folder/"train.py"), str(folder)], capture_output=True, text=True, timeout=600,
                       env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"))
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout


def tensors(folder: Path) -> dict:
    return {f"{f.name}|{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in read_weights(f).items()}


def test_two_processes_make_the_library_of_one(tmp_path):
    launch(tmp_path/"one", 1)
    said = launch(tmp_path/"two", 2)
    shares = [int(n) for n in re.findall(r"trained (\d+) of", said)]
    assert len(shares) == 2 and min(shares) > 0                                  # both worked
    one = tensors(tmp_path/"one/library-0")
    assert len(one) > 100 and sum(shares) == len(list((tmp_path/"one/library-0").glob("*.safetensors")))
    for rank in range(2):                                                        # and both hold all of it
        two = tensors(tmp_path/f"two/library-{rank}")
        assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
        assert torch.equal(read_weights(tmp_path/"one/losses-0.safetensors")["losses"], read_weights(tmp_path/f"two/losses-{rank}.safetensors")["losses"])
        assert json.loads((tmp_path/f"two/library-{rank}/library.json").read_text()) == json.loads((tmp_path/"one/library-0/library.json").read_text())
