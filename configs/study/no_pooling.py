"""ASPP without image pooling.

python train.py --config configs/study/no_pooling.py --workdir runs/study/no_pooling
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["model.image_pooling=false"])
