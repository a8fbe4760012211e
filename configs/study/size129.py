"""Images of 129 pixels, one more than a multiple of the output stride, as the paper's 513 are.

python train.py --config configs/study/size129.py --workdir runs/study/size129
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(
        from_python(_BASE), ["data.shapes.size=129", "data.crop_size=129", "eval.size=129"]
    )
