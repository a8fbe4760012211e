"""Multi-grid (1, 2, 1) in block4.

python train.py --config configs/study/grid121.py --workdir runs/study/grid121
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["model.multi_grid=1,2,1"])
