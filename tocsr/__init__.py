__version__ = "0.1.0"

import logging
from importlib import import_module
from typing import TYPE_CHECKING

# diffusers imports bitsandbytes where it is installed, which warns about a missing kernel package
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from tocsr.inference.pipeline import TOCSRPipeline
    from tocsr.core.config import get_profile
    from tocsr.core.store import run_stage
    from tocsr.stages.compress import compress

__all__ = ["TOCSRPipeline", "compress", "get_profile", "run_stage"]

_DEFINITIONS = {  # name -> module:name of the definition, imported at first use
    "TOCSRPipeline": "tocsr.inference.pipeline:TOCSRPipeline",
    "get_profile": "tocsr.core.config:get_profile",
    "run_stage": "tocsr.core.store:run_stage",
    "compress": "tocsr.stages.compress:compress",
    # components of pipelines: model_index.json names them as ["tocsr", class], and diffusers looks
    # for their base class, which tells it how to load them, in the same module
    "StagedUNet": "tocsr.models.staged_unet:StagedUNet",
    "LowResAutoencoder": "tocsr.models.autoencoder:LowResAutoencoder",
    "PatchPCA": "tocsr.models.autoencoder:PatchPCA",
    "Refiner": "tocsr.models.generator:Refiner",
    "ModelMixin": "diffusers:ModelMixin",
}


def __getattr__(name: str):
    if name not in _DEFINITIONS:
        raise AttributeError(f"module 'tocsr' has no attribute {name!r}")
    module, attribute = _DEFINITIONS[name].split(":")
    return getattr(import_module(module), attribute)


def __dir__():
    return sorted({*globals(), *__all__})
