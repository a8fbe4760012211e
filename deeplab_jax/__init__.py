"""DeepLabv3 (arXiv 1706.05587) in JAX and Flax NNX: models, training and weight conversion."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deeplab_jax.config import Config
    from deeplab_jax.inference.segmenter import Segmenter, load
    from deeplab_jax.models.architecture import Architecture, architecture
    from deeplab_jax.models.deeplab import DeepLabV3, build_model
    from deeplab_jax.models.heads import ASPPHead, FCNHead
    from deeplab_jax.training.train import train
    from deeplab_jax.utils.errors import UserError
    from deeplab_jax.weights.convert import convert

# The module of each public name, imported on first use: models need no data library, and the
# processes that read data need no JAX.
_MODULES = {
    "ASPPHead": "models.heads",
    "Architecture": "models.architecture",
    "Config": "config",
    "DeepLabV3": "models.deeplab",
    "FCNHead": "models.heads",
    "Segmenter": "inference.segmenter",
    "UserError": "utils.errors",
    "architecture": "models.architecture",
    "build_model": "models.deeplab",
    "convert": "weights.convert",
    "load": "inference.segmenter",
    "train": "training.train",
}

__all__ = [
    "ASPPHead",
    "Architecture",
    "Config",
    "DeepLabV3",
    "FCNHead",
    "Segmenter",
    "UserError",
    "__version__",
    "architecture",
    "build_model",
    "convert",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("deeplab-jax")
    if name not in _MODULES:
        raise AttributeError(f"module 'deeplab_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deeplab_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
