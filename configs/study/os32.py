"""Output stride 32: no atrous convolution in the backbone; ASPP's rates are halved.

python train.py --config configs/study/os32.py --workdir runs/study/os32
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["model.output_stride=32", "model.atrous_rates=1,2,3"])
