"""Batch norm never trained: its statistics stay those of the start, mean 0 and variance 1.

python train.py --config configs/study/frozen_bn.py --workdir runs/study/frozen_bn
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["train.freeze_bn=true"])
