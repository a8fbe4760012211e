"""The command `deeplab-jax`: which commands there are, and how a mistake is told."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from deeplab_jax.cli.convert import convert
from deeplab_jax.cli.data import data
from deeplab_jax.cli.evaluate import evaluate
from deeplab_jax.cli.export import export
from deeplab_jax.cli.plan import plan
from deeplab_jax.cli.predict import predict
from deeplab_jax.cli.submit import submit
from deeplab_jax.cli.summary import summary
from deeplab_jax.utils.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DeepLabv3 in JAX: train, evaluate, predict, convert, export.",
)
app.command()(convert)
app.add_typer(data, name="data")
app.command()(evaluate)
app.command()(export)
app.command()(plan)
app.command()(predict)
app.command()(submit)
app.command()(summary)


@app.callback()
def _commands(
    modules: Annotated[
        list[str],
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import this module first: it registers a backbone, head, loss or data set of "
            "your own. May be given several times, before or behind the command.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Shows the option, which `main` has taken out already."""


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
def train() -> None:
    """Train: `deeplab-jax train voc_os16 --workdir=W`; the flags are those of train.py."""


def main() -> None:
    """Runs a command; a user's mistake is one message and exit code 2."""
    try:
        modules, arguments = take_imports(sys.argv[1:])
        import_modules(modules)
        if arguments[:1] == ["train"]:  # its flags are absl's, which has every field of a config
            from deeplab_jax.cli import train as training

            training.command(arguments[1:])
        else:
            app(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def take_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the modules of `--import MODULE` off the other arguments.

    Raises:
      UserError: no module follows.
    """
    modules, others = [], []
    rest = iter(arguments)
    for argument in rest:
        option, equals, module = argument.partition("=")
        if option != "--import":
            others.append(argument)
            continue
        module = module if equals else next(rest, "")
        if not module or module.startswith("-"):
            raise UserError("--import needs the name of a module, as in --import my_backbones")
        modules.append(module)
    return modules, others


def import_modules(modules: Sequence[str]) -> None:
    """Imports modules by name, those in the current folder too.

    Raises:
      UserError: one is not there or fails.
    """
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
                "path; name it as in an import statement, without .py, and set PYTHONPATH to its "
                "folder if it lies elsewhere"
            ) from None
        except Exception as error:  # whatever the module's own code raises
            raise UserError(f"--import {module}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
