"""Batch norm over 4 images; the batch is still of 16, computed in four parts.

python train.py --config configs/study/bn_of_4.py --workdir runs/study/bn_of_4
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["optimizer.accumulate=4"])
