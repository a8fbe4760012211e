"""Labels shrunk to the logits in training, instead of logits upsampled.

python train.py --config configs/study/shrunk_labels.py --workdir runs/study/shrunk_labels
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(from_python(_BASE), ["loss.upsample=false"])
