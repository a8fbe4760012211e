"""ASPP with rates half as large.

python train.py --config configs/study/rates123.py --workdir runs/study/rates123
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["model.atrous_rates=1,2,3"])
