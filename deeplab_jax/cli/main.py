"""The program `deeplab-jax`: its commands, and the option --import."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from deeplab_jax.cli.bisect import bisect
from deeplab_jax.cli.calibrate import calibrate
from deeplab_jax.cli.convert import convert
from deeplab_jax.cli.data import data
from deeplab_jax.cli.demo import demo
from deeplab_jax.cli.errors import escape_unprintable, exit_on_user_error
from deeplab_jax.cli.evaluate import evaluate
from deeplab_jax.cli.export import export
from deeplab_jax.cli.plan import plan
from deeplab_jax.cli.predict import predict
from deeplab_jax.cli.push import push
from deeplab_jax.cli.replay import replay
from deeplab_jax.cli.submit import submit
from deeplab_jax.cli.summary import summary
from deeplab_jax.cli.warm import warm
from deeplab_jax.utils.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from deeplab_jax import __version__

        print(f"deeplab-jax {__version__}")
        raise typer.Exit


@app.callback()
def options(
    modules: Annotated[
        list[str],
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import a module that registers your own backbone, head, loss or data set. "
            "Repeatable; before or after the command.",
        ),
    ] = [],  # noqa: B006
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version)
    ] = False,
) -> None:
    """DeepLabv3 in JAX: train, evaluate, predict, convert, export.

    `deeplab-jax COMMAND --help` explains a command and its options.

    Examples:
      deeplab-jax train voc_os16 --workdir=runs/voc
      deeplab-jax evaluate runs/voc
      deeplab-jax predict runs/voc photo.jpg --out predicted
      deeplab-jax --import my_backbones summary my_config.py
    """
    escape_unprintable()


# The flags of `train` are absl's, which have every field of the config; so Typer passes all on.
@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train a model: `deeplab-jax train voc_os16 --workdir=runs/voc`."""
    from deeplab_jax.cli.train import command

    command(context.args)


for command in (
    *(evaluate, calibrate, predict, warm, convert, push, export, demo),
    *(summary, plan, submit, replay, bisect),
):
    app.command()(command)
app.add_typer(data, name="data")


def main() -> None:
    """Runs a command; a user's mistake is one message and exit code 2."""
    atexit.register(gc.freeze)  # Python's last collection only takes time
    with exit_on_user_error():
        # --import may also follow the command, where Typer knows only the command's own options.
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(
            "--import", dest="modules", metavar="MODULE", action="append", default=[]
        )
        known, arguments = parser.parse_known_args()
        import_modules(known.modules)
        app(arguments)


def import_modules(modules: Sequence[str]) -> None:
    """Imports modules from the current folder or the Python path."""
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise UserError(f"--import {module}: {error.name} is missing") from None
            raise UserError(
                f"--import {module}: there is no such module in {os.getcwd()} or on the Python "
                "path. Write the name as in an import statement, without .py; if its file is in "
                "another folder, add that folder to PYTHONPATH"
            ) from None
        except Exception as error:  # whatever the module's own code raises
            raise UserError(f"--import {module}: {type(error).__name__}: {error}") from error
