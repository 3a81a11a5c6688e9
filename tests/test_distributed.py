"Two processes of `accelerate launch` (gloo, CPU) make the library that one process makes, to the last bit."
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
import torch
from diffusers import UNet2DConditionModel
from tocsr.store import read_weights

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
    import sys, torch
    from pathlib import Path
    from diffusers import UNet2DConditionModel
    from accelerate import PartialState
    from tocsr.store import save_weights
    from tocsr.surrogates import PAPER_ARCHITECTURE, Architecture, Fidelity, REMOVED, assemble, common_generator, cut, distill_shared, save_library, shard, surrogate_library
    from tocsr.diffusion import noise_schedule, null_context
    state, out = PartialState(cpu=True), Path(sys.argv[1])
    unet = UNet2DConditionModel.from_pretrained(out.parent, subfolder="unet").eval().requires_grad_(False)
    teacher, paper = cut(unet), Architecture.parse(PAPER_ARCHITECTURE).by_stage
    library = surrogate_library(teacher, {n: tuple(dict.fromkeys((o, "R"))) for n, o in paper.items() if o != REMOVED}, context=null_context(unet, 1))
    def batch(step):
        g = common_generator(3, step)
        return torch.randn(2, 4, 8, 8, generator=g), torch.randint(1000, (2,), generator=g), null_context(unet, 2)
    losses = distill_shared(teacher, library, batch, 3, 1e-3, out/"scratch")
    save_library(out/f"library-{state.process_index}", library, teacher)
    f_acc = Fidelity.draw(teacher, noise_schedule(), torch.randn(4, 4, 8, 8, generator=common_generator(4, 0)))(assemble(teacher, library, PAPER_ARCHITECTURE))
    save_weights(out/f"numbers-{state.process_index}.safetensors", dict(losses=losses, f_acc=f_acc.errors))
    print(f"process {state.process_index} of {state.num_processes} trained {len(shard(library, state.process_index, state.num_processes))} of {len(library)}\\n", end="", flush=True)   # one write: two processes share the pipe
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


def thin_checkpoint(folder: Path):
    "A UNet with SD 1.5's layout and key names, as thin as its group norms allow, as a diffusers folder."
    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=64, block_out_channels=(32, 64, 128, 128), cross_attention_dim=768, attention_head_dim=8).save_pretrained(folder/"unet")
    names = read_weights(folder/"unet/diffusion_pytorch_model.safetensors")
    assert {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", "mid_block.resnets.1.conv2.bias", "up_blocks.3.attentions.2.proj_out.weight"} <= names.keys()


def test_two_processes_make_the_library_of_one(tmp_path):
    thin_checkpoint(tmp_path)
    launch(tmp_path/"one", 1)
    said = launch(tmp_path/"two", 2)
    shares = [int(n) for n in re.findall(r"trained (\d+) of", said)]
    assert len(shares) == 2 and min(shares) > 0                                  # both worked
    one = tensors(tmp_path/"one/library-0") | tensors(tmp_path/"one")
    assert sum(shares) == len(list((tmp_path/"one/library-0").glob("*.safetensors"))) >= 6
    for rank in range(2):                                                        # and both hold all of it, and measure the same f_acc of the paper's vector
        two = tensors(tmp_path/f"two/library-{rank}") | {k.replace(f"numbers-{rank}", "numbers-0"): v for k, v in tensors(tmp_path/"two").items() if f"numbers-{rank}" in k}
        assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
        assert json.loads((tmp_path/f"two/library-{rank}/library.json").read_text()) == json.loads((tmp_path/"one/library-0/library.json").read_text())
