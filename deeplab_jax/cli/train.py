"""Trains DeepLabv3.

Examples:
  deeplab-jax train voc_os16 --workdir=runs/voc
  deeplab-jax train paper:table1_os64 --workdir=runs/table1_os64
  deeplab-jax train my_config.py --workdir=runs/mine --config.train.steps=100

The config is a Python file with get_config(), or the name of a config of this package. The same
command, run again, resumes the run. Every field of the config is a flag:
--config.optimizer.learning_rate=0.01, --config.model.multi_grid=1,2,4. In a clone,
`python train.py --config configs/voc_os16.py` takes the same flags.

On a TPU pod, under srun and under mpirun, start the same command on every host: together they are
one run. On other clusters, also set --coordinator, --num_processes and --process_id. See
docs/pods.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from deeplab_jax.cli.errors import escape_unprintable, exit_on_user_error
from deeplab_jax.config import Config, flatten
from deeplab_jax.config.io import from_python, unknown_field, with_fields
from deeplab_jax.config.rules import validate
from deeplab_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Python file with get_config().")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics and pictures; or gs://bucket/run, s3://bucket/run.",
)
_BUCKET_TIMEOUT = flags.DEFINE_float(
    "bucket_timeout",
    600,
    "Seconds that a run with its workdir in a bucket goes on while the bucket does not answer.",
    lower_bound=0,
)

_LAUNCH = [
    flags.DEFINE_string("coordinator", None, "Address of process 0: host:port, with a free port."),
    flags.DEFINE_integer(
        "num_processes", None, "Number of processes of the run; 1: this one, even on a cluster."
    ),
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0."),
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for all processes to start."),
    flags.DEFINE_integer(
        "lost_timeout", 60, "Seconds without a sign of life until a process counts as lost."
    ),
]


class _ConfigParser(flags.ArgumentParser):
    """Reads the config file in place of ml_collections, whose errors are tracebacks."""

    def parse(self, argument: str) -> Config:
        return from_python(argument)


class _TextParser(flags.ArgumentParser):
    """Keeps the values of --config.FIELD as texts, which `get_config` parses."""

    def parse(self, argument: Any) -> Any:
        return argument


flags.FLAGS["config"].parser = _ConfigParser()
# The parsers of ml_collections take no None, and join the values of a tuple that is given twice.
for _type in (bool, int, float, str, tuple, dict, object):
    config_flags.register_flag_parser_for_type(_type, _TextParser())


def get_config() -> Config:
    """Returns the config file's config with the fields that --config.FIELD=VALUE sets."""
    return with_fields(
        _CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"]), parse=True
    )


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say."""
    # Imported here, so that --help and a mistake in the flags answer at once.
    from deeplab_jax.distributed import launch
    from deeplab_jax.training.train import train

    values: list[Any] = [flag.value for flag in _LAUNCH]
    with launch.distributed_run(launch.LaunchOptions(*values)) as is_first:
        result = train(
            get_config(), str(_WORKDIR.value), bucket_timeout=float(_BUCKET_TIMEOUT.value)
        )
    if not is_first:
        return
    if result.miou is not None:
        print(f"mIoU {result.miou:.4f} at step {result.step}")
    if result.picture:
        print(f"predictions: {result.picture}")


def start(argv: list[str] | None = None) -> None:
    """Parses the flags and trains; ends the program with the exit code."""
    escape_unprintable()
    with exit_on_user_error():
        sys.argv = config_first(sys.argv if argv is None else argv)
        app.run(main, argv=sys.argv, flags_parser=_parse)


def config_first(argv: Sequence[str]) -> list[str]:
    """Moves the last --config to the front of the arguments and drops the others.

    ml_collections looks in `sys.argv` for the fields to set, after a single --config.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-config", nargs="?")
    known, rest = parser.parse_known_args(argv[1:])
    return [argv[0], *([] if known.config is None else [f"--config={known.config}"]), *rest]


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses absl flags; raises UserError for one that is missing, unknown or wrong."""
    try:
        rest = flags.FLAGS(list(argv))
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        matches = [re.match(r"--?(?:no)?config\.([\w.]+)", argument) for argument in argv]
        unknown = [match[1] for match in matches if match and match[1] not in flatten(Config())]
        if unknown:
            raise UserError(unknown_field(unknown[0])) from error
        cause = error.__context__  # absl wraps the errors of parsers
        raise UserError(str(cause if isinstance(cause, UserError) else error).strip()) from error
    if len(rest) > 1:
        raise UserError(f"unexpected {rest[1]!r}; options are given as --name=value")
    for name, example in (("config", "configs/voc_os16.py"), ("workdir", "runs/voc")):
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing or empty; for example --{name}={example}")
    validate(get_config())
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs each of its steps at INFO; --verbosity=0 shows them.
        logging.set_verbosity(logging.ERROR)
    return rest


def command(arguments: Sequence[str]) -> None:
    """Runs `deeplab-jax train CONFIG --workdir=W ...`."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(__doc__)
        print(flags.FLAGS.module_help(sys.modules[__name__]))
        return
    first, *rest = arguments
    if not first.startswith("-"):
        first = f"--config={first}"
    start(["deeplab-jax train", first, *rest])
