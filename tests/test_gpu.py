"What only a GPU can show: every stage at smoke size in both precisions, the pipeline beside the CPU's. Skipped without CUDA."
import pytest
import torch
from tocsr.degradations import imresize
from tocsr.images import EMBEDDED, embedded_path, read_image, to_tensor
from tocsr.pipeline import TOCSRPipeline, tile_difference
from tocsr.profiles import get_profile
from tocsr.store import MODULES, need
from tocsr.training import fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SCRATCH = dict(autoencoder=dict(start="scratch", steps=3, decoder_steps=2), teacher=dict(start="scratch", steps=3), compact=dict(start="scratch"))


@pytest.mark.parametrize("given", [{}, dict(SCRATCH, mixed_precision="bf16")], ids=["shipped, fp32", "scratch, bf16"])
def test_every_stage(given, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_RUNS", str(tmp_path/"runs"))
    net = torch.nn.Linear(2, 2)                    # as the cells of a notebook do before its stage runs
    fit(dict(net=net), lambda step, models: models["net"](torch.ones(1, 2)).sum(), 2, 0.1, tmp_path/"cpu", device="cpu")
    assert net.weight.device.type == "cpu"
    for name in MODULES: need(name, get_profile("smoke", **given))


def test_the_pipeline_agrees_with_the_cpu():
    whole = to_tensor(read_image(embedded_path(next(p for p in EMBEDDED if p.name == "chelsea"))))
    x = imresize(whole, 1/4).clamp(-1, 1)
    cpu, gpu = TOCSRPipeline.from_pretrained(), TOCSRPipeline.from_pretrained().to("cuda")
    a, b = (pipe(x, output_type="pt").images[0].cpu() for pipe in (cpu, gpu))
    assert (a - b).abs().max() < 0.5/127.5 and cpu(x).trusted == gpu(x).trusted
    assert tile_difference(gpu, x[:, :64, :64], 32, 16)["max"] < 0.5
    assert TOCSRPipeline(gpu.generator)(x, output_type="pt").images[0].shape == a.shape   # made around a model that is there already
