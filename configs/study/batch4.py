"""A batch of 4 instead of 16, over as many steps: a quarter of the images.

python train.py --config configs/study/batch4.py --workdir runs/study/batch4
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["train.batch_size=4"])
