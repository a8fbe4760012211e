"""Output stride 8: less is lost by striding; ASPP's rates are doubled, as in the paper.

python train.py --config configs/study/os8.py --workdir runs/study/os8
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["model.output_stride=8", "model.atrous_rates=4,8,12"])
