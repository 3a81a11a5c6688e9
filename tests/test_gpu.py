"""What only a GPU can show: every stage at smoke size in both precisions, the pipeline against the
CPU's.

Skipped without CUDA.
"""

import pytest
import torch

from tocsr.core.config import get_profile
from tocsr.core.image import imresize, read_image, to_tensor
from tocsr.core.store import MODULES, run_stage
from tocsr.core.training import fit
from tocsr.data.images import EMBEDDED, embedded_path
from tocsr.inference.model_info import tile_difference
from tocsr.inference.pipeline import TOCSRPipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SCRATCH = dict(
    autoencoder=dict(start="scratch", steps=3, decoder_steps=2),
    teacher=dict(start="scratch", steps=3),
    compact=dict(start="scratch"),
)


@pytest.mark.parametrize(
    "given", [{}, dict(SCRATCH, mixed_precision="bf16")], ids=["bundled, fp32", "scratch, bf16"]
)
def test_every_stage(given, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_RUNS", str(tmp_path / "runs"))
    net = torch.nn.Linear(2, 2)  # as the cells of a notebook do before its stage runs
    fit(
        dict(net=net),
        lambda step, models: models["net"](torch.ones(1, 2)).sum(),
        2,
        0.1,
        tmp_path / "cpu",
        device="cpu",
    )
    assert net.weight.device.type == "cpu"
    for name in MODULES:
        run_stage(name, get_profile("smoke", **given))


def test_the_pipeline_agrees_with_the_cpu():
    whole = to_tensor(read_image(embedded_path(next(p for p in EMBEDDED if p.name == "chelsea"))))
    x = (imresize(whole, 1 / 4).clamp(-1, 1) + 1) / 2
    cpu = TOCSRPipeline.from_pretrained()
    gpu = TOCSRPipeline.from_pretrained().to("cuda")
    a, b = (pipe(x, output_type="pt").images[0].cpu() for pipe in (cpu, gpu))
    assert (a - b).abs().max() < 0.5 / 255
    assert tile_difference(gpu, x[:, :64, :64], 32, 16)["max"] < 0.5
    assert (
        TOCSRPipeline(**gpu.components, **gpu.parameters)(x, output_type="pt").images[0].shape
        == a.shape
    )  # made around a model that is there already
