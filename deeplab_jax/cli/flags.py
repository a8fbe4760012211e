"""Command-line manners of train.py: mistakes are answered by one message and exit code 2."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging
from ml_collections import config_flags

from deeplab_jax import config
from deeplab_jax.config.io import file_and_row, from_python, is_config, nearest_fields
from deeplab_jax.utils.errors import UserError


def parse(argv: Sequence[str]) -> list[str]:
    """Parses absl flags; a wrong one ends the program with what is wrong and what is near it."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-config"):
            _check_config(value if equals else following)
    try:
        rest = flags.FLAGS(list(argv))
    except (KeyError, AttributeError) as error:
        raise SystemExit(_fail(_unknown_field(argv, error))) from error
    except (flags.Error, TypeError, ValueError, ImportError, SyntaxError) as error:
        raise SystemExit(_fail(str(error).strip())) from error
    path, _ = file_and_row(config_flags.get_config_filename(flags.FLAGS["config"]))
    if not os.path.isfile(path):
        raise SystemExit(_fail(f"--config: there is no file {path}"))
    if not flags.FLAGS["verbosity"].present:
        # Orbax tells each of its steps at INFO; --verbosity=0 shows them.
        logging.set_verbosity(logging.ERROR)
    if len(rest) > 1:
        raise SystemExit(_fail(f"unexpected {rest[1]!r}; options are given as --name=value"))
    return rest


def _check_config(path: str) -> None:
    """Loads a config file, whose errors absl would tell with a traceback."""
    if is_config(path) and os.path.isfile(file_and_row(path)[0]):
        try:
            from_python(path)
        except UserError as error:
            raise SystemExit(_fail(str(error))) from error


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs a program's main function; the exit code."""
    try:
        main(argv)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _fail(
            f"the disk is full ({error.filename or 'while writing'}); make room and run again"
        )
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _unknown_field(argv: Sequence[str], error: Exception) -> str:
    """Names the flag that has no field in the config, and the fields nearest to it."""
    known = config.flatten(config.Config())
    for argument in argv:
        match = re.match(r"--config\.([\w.]+)", argument)
        if match and match[1] not in known:
            return f"the config has no field {match[1]!r}{nearest_fields(match[1], known)}"
    return str(error)
