"""Trains DeepLabv3.

Examples:
  python train.py --config configs/voc_os16.py --workdir runs/voc
  python train.py --config configs/shapes.py --workdir runs/shapes --config.train.steps=100

Run again with the same flags, it goes on where it stopped. Every field of the config is a flag:
--config.optimizer.learning_rate=0.01, --config.model.multi_grid=1,2,4. See
deeplab_jax/config/schema.py for all of them.

On a TPU pod, under srun and under mpirun the same line, started on all hosts, is one run on all of
them. Elsewhere say where process 0 is; two processes on one machine:
  python train.py --config ... --coordinator=localhost:1234 --num_processes=2 --process_id=0 &
  python train.py --config ... --coordinator=localhost:1234 --num_processes=2 --process_id=1
Data and workdir are the same paths to all, on a file system that they share. See docs/pods.md.
"""

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

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
    # Imported when the flags have been read, so that --help and a mistake in them answer at once.
    from deeplab_jax.distributed import launch as processes
    from deeplab_jax.training.stages import train

    launch = processes.Launch(*[flag.value for flag in _LAUNCH])
    with processes.started(launch) as is_first:
        result = train(_CONFIG.value, _WORKDIR.value)
    if not is_first:
        return
    if result.miou is not None:
        print(f"mIoU {result.miou:.4f} at step {result.step}")
    if result.picture is not None:
        print(f"predictions: {result.picture}")


if __name__ == "__main__":
    from deeplab_jax.cli.flags import parse, run

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(lambda argv: sys.exit(run(main, argv)), flags_parser=parse)
