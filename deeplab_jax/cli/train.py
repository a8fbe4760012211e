"""Trains DeepLabv3.

Examples:
  deeplab-jax train voc_os16 --workdir=runs/voc
  deeplab-jax train paper:table1_os64 --workdir=runs/table1_os64
  deeplab-jax train my_config.py --workdir=runs/mine --config.train.steps=100

The config is a file with get_config(), or the name of one of this package's. Run again with the
same flags, it goes on where it stopped. Every field of the config is a flag:
--config.optimizer.learning_rate=0.01, --config.model.multi_grid=1,2,4. In a clone,
`python train.py --config configs/voc_os16.py` takes the same flags.

On a TPU pod, under srun and under mpirun the same line, started on all hosts, is one run on all of
them. Elsewhere say where process 0 is with --coordinator. See docs/pods.md.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from deeplab_jax.cli.flags import parse, run
from deeplab_jax.config.io import is_config
from deeplab_jax.utils.errors import UserError, did_you_mean

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

_CONFIG = config_flags.DEFINE_config_file("config", help_string="File with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")

_LAUNCH = [
    flags.DEFINE_string("coordinator", None, "Of process 0: host:port, a port that is free there."),
    flags.DEFINE_integer("num_processes", None, "Of the run; 1: alone, whatever a cluster says."),
    flags.DEFINE_integer("process_id", None, "Of this process, from 0."),
    flags.DEFINE_integer("start_timeout", 300, "Seconds in which all processes must have come."),
    flags.DEFINE_integer(
        "lost_timeout", 60, "Seconds without answer till a process counts as lost."
    ),
]


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say."""
    # Imported when the flags have been read, so that --help and a mistake in them answer at once.
    from deeplab_jax.distributed import launch
    from deeplab_jax.training.stages import train

    values: list[Any] = [flag.value for flag in _LAUNCH]
    with launch.started(launch.Launch(*values)) as is_first:
        result = train(_CONFIG.value, str(_WORKDIR.value))
    if not is_first:
        return
    if result.miou is not None:
        print(f"mIoU {result.miou:.4f} at step {result.step}")
    if result.picture is not None:
        print(f"predictions: {result.picture}")


def start(argv: list[str] | None = None) -> None:
    """Parses the flags and trains; the program ends with the exit code."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(lambda rest: sys.exit(run(main, rest)), argv=argv, flags_parser=parse)


def command(arguments: Sequence[str]) -> None:
    """`deeplab-jax train CONFIG --workdir=W ...`.

    Raises:
      UserError: there is no config of that name.
    """
    if not arguments or {"--help", "-h"} & set(arguments):
        print(__doc__)
        print(flags.FLAGS.module_help(sys.modules[__name__]))
        return
    first, *rest = arguments
    if not first.startswith("-"):
        first = f"--config={config_path(first)}"
    # absl and ml_collections read the fields of the config from here.
    sys.argv = ["deeplab-jax train", first, *rest]
    start(sys.argv)


def config_path(config: str) -> str:
    """Returns the file of a config that is given as a file, or by the name of one of ours.

    Raises:
      UserError: it is neither; names the nearest.
    """
    if is_config(config):
        return config
    name, colon, row = config.partition(":")
    names = sorted(path.stem for path in CONFIGS.glob("*.py"))
    if name not in names:
        raise UserError(
            f"there is no config {name!r}{did_you_mean(name, names)}: give a file that ends in "
            f".py, or one of {', '.join(names)}"
        )
    return f"{CONFIGS / name}.py{colon}{row}"
