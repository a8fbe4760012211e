"""Trains DeepLabv3.

Examples:
  python train.py --config configs/voc_os16.py --workdir runs/voc
  python train.py --config configs/shapes.py --workdir runs/shapes --config.train.steps=100

Run again with the same flags, it goes on where it stopped. Every field of the config is a flag:
--config.optimizer.learning_rate=0.01, --config.model.multi_grid=1,2,4. See deeplab_jax/config.py
for all of them.
"""

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", help_string="File with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")


def main(argv: Sequence[str]) -> None:
    # Imported when the flags have been read, so that --help and a mistake in them answer at once.
    from deeplab_jax.training.loop import train

    result = train(_CONFIG.value, _WORKDIR.value)
    if result.miou is not None:
        print(f"mIoU {result.miou:.4f} at step {result.step}")
    if result.picture is not None:
        print(f"predictions: {result.picture}")


if __name__ == "__main__":
    from deeplab_jax.flags import parse, run

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(lambda argv: sys.exit(run(main, argv)), flags_parser=parse)
