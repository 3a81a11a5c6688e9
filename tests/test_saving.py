"Every network of tocsr.models is a diffusers model: saved, loaded and moved without warnings."

import json
import warnings

import pytest
import torch
from diffusers import ModelMixin
from diffusers.utils import logging

from tocsr.core.config import UNetConfig
from tocsr.models.autoencoder import LowResAutoencoder, PatchPCA
from tocsr.models.diffusion import nano_unet
from tocsr.models.generator import Refiner
from tocsr.models.losses import Discriminator
from tocsr.models.regression import RegressionNet
from tocsr.models.saving import save_model
from tocsr.models.staged_unet import StagedUNet


def staged_unet():
    unet = dict(nano_unet(UNetConfig(), 4).config)
    return StagedUNet(unet=unet, architecture="[R-R-R]-[R-RA-RAA]")


MODELS = {
    "PatchPCA": lambda: PatchPCA(channels=4),
    "LowResAutoencoder": lambda: LowResAutoencoder(
        channels=4, width=8, fine=8, encoder_blocks=(1, 1)
    ),
    "StagedUNet": staged_unet,
    "Refiner": lambda: Refiner(blocks=1, width=8),
    "Discriminator": lambda: Discriminator(width=8),
    "RegressionNet": lambda: RegressionNet(blocks=1, width=8),
}


@pytest.fixture
def diffusers_log(caplog):
    "What diffusers logs, warnings and above."
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_without_warnings(name, tmp_path, diffusers_log):
    torch.manual_seed(0)
    model = MODELS[name]()
    assert isinstance(model, ModelMixin)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = save_model(model, tmp_path / "first")
        loaded = type(model).from_pretrained(folder)
        half = type(model).from_pretrained(folder, torch_dtype=torch.bfloat16)
        rebuilt = type(model).from_config(model.config)
        again = save_model(loaded, tmp_path / "second")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert rebuilt.state_dict().keys() == model.state_dict().keys()
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, again)]
    assert configs[0] == configs[1] and "_name_or_path" not in configs[0]
    assert not [r.getMessage() for r in diffusers_log.records if r.levelname == "WARNING"]
