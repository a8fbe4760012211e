"""Half of the steps at output stride 16, half at 8 with frozen batch norm, as the paper's stages.

The learning rate of the second starts at a seventh of the first's, as there.

    python train.py --config configs/study/two_stages.py --workdir runs/study/two_stages
"""

import pathlib

from deeplab_jax.config import Config
from deeplab_jax.config_files import from_python, override

_BASE = pathlib.Path(__file__).with_name("base.py")


def get_config() -> Config:
    return override(
        from_python(_BASE),
        [
            "train.steps=400",
            "second_stage.steps=400",
            "second_stage.output_stride=8",
            "second_stage.learning_rate=0.043",
        ],
    )
