"""Neither ASPP nor a cascade: the features of block4 go to the logits.

python train.py --config configs/study/block4.py --workdir runs/study/block4
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["model.cascade=0", "model.atrous_rates=none"])
