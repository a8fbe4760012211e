"""The paper's decay of batch norm's running statistics, made for 30 000 steps.

python train.py --config configs/study/bn_decay9997.py --workdir runs/study/bn_decay9997
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["model.bn_momentum=0.9997"])
