"""Arguments and options that several commands have."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from deeplab_jax.cli import outputs
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import required_path


def expand_path(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """Replaces `~` in the paths of an option, which must not be empty; see `path_option`."""
    source = context.get_parameter_source(option.name or "")
    if source is None or source.name != "COMMANDLINE":
        return value
    paths = [value] if isinstance(value, str) else value
    for path in paths:
        required_path(path, option.opts[0])
    expanded = [os.path.expanduser(path) for path in paths]  # patterns stay as written
    return expanded[0] if isinstance(value, str) else expanded


def path_option(words: str, *names: str) -> Any:
    """Returns an option, with this help, that holds paths."""
    return typer.Option(*names, help=words, callback=expand_path)


def path_argument(words: str) -> Any:
    """Returns an argument, with this help, that holds paths."""
    return typer.Argument(help=words, callback=expand_path)


def output_option(words: str, *suffixes: str, name: str = "") -> Any:
    """Returns an option that holds a file to write, which is checked before the work starts."""

    def check(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
        path = expand_path(context, option, value)
        outputs.check(option.opts[0], path, *suffixes)
        return path

    return typer.Option(*([name] if name else []), help=words, callback=check)


def figure_option(words: str) -> Any:
    """Returns an option that holds the file of a chart."""
    return output_option(f"{words} (.png, .svg or .pdf).", ".png", ".svg", ".pdf")


Checkpoint = Annotated[
    str,
    path_argument(
        "Workdir, checkpoint, weights file or folder, also in a bucket (gs://, s3://); "
        "hf://org/name, or name of published weights."
    ),
]
ConfigFile = Annotated[str, path_argument("Config file, or name of a config, as train takes it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="FIELD=VALUE of the config: train.batch_size=64; repeatable."),
]
OutputStride = Annotated[
    int | None, typer.Option(help="8, 16 or 32; more for a cascade. Default: the run's.")
]
# The defaults of these are the settings of the run's own evaluation.
Scales = Annotated[
    str | None,
    typer.Option(
        help="Scales to average over: 0.5,0.75,1,1.25,1.5,1.75. Default: the run's, or 1."
    ),
]
Flip = Annotated[
    bool | None,
    typer.Option("--flip/--no-flip", help="Average over mirrored images too. Default: as the run."),
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Side of a sliding window, pixels; 0: whole images. Default: the run's, else 1025 for "
        "images of more than 4 million pixels, 0 for others."
    ),
]
Overlap = Annotated[
    float | None,
    typer.Option(help="Fraction of a window that the next covers too. Default: the run's, or 0.5."),
]
Data = Annotated[
    str,
    path_option(
        "Data set (voc, coco, cityscapes, ade20k, folder, shapes), or config file whose data "
        "section to use. Default: the data set of the training."
    ),
]
Root = Annotated[str, path_option("Folder of the data. Default: that of the config or run.")]
Split = Annotated[str, typer.Option(help="Default: the config's eval_split, val.")]
Limit = Annotated[int, typer.Option(min=0, help="Only the first N images; 0: all.")]
Calibration = Annotated[
    str, path_option("File of `deeplab-jax calibrate`. Default: that in the checkpoint's folder.")
]
Positive = Annotated[
    str,
    typer.Option(
        help="Class (name or id) against the rest. Default: of two classes, the one that is not "
        "background."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Probability, 0 to 1, from which on a pixel is of the class --positive. Default: it "
        "is of its most probable class."
    ),
]
Json = Annotated[
    str,
    output_option(
        "Write the results to this file (.json); -: print only JSON.", ".json", name="--json"
    ),
]


def check_unsure(unsure: bool, threshold: float | None, calibration: str) -> None:
    """Raises UserError if options that concern unsure pixels do not go together."""
    if unsure and threshold is not None:
        raise UserError("--unsure is about the most probable class: leave --threshold out")
    if calibration and not unsure:
        raise UserError("--calibration is for --unsure, which is missing")


def spell_views(scales: Sequence[float], flip: bool) -> str:
    """Returns the views of an image as words: "0.5, 1, and mirrored"."""
    return ", ".join(f"{scale:g}" for scale in scales) + (", and mirrored" if flip else "")


def _parse_scales(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--scales must be numbers such as 0.5,1,1.5, got {text!r}") from None


def _view_settings(
    output_stride: OutputStride = None,
    scales: Scales = None,
    flip: Flip = None,
    window: Window = None,
    overlap: Overlap = None,
) -> dict[str, Any]:
    """Returns the arguments of `inference.segmenter.load` that the options set."""
    return locals() | {"scales": _parse_scales(scales)}


def _eval_settings(
    protocol: Annotated[
        str | None,
        typer.Option(
            help="paper, native or torchvision. Default: the run's, else native for data of your "
            "own and with --window, else paper."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side that the protocol paper pads to. Default: the config's, 513."),
    ] = None,
    output_stride: OutputStride = None,
    scales: Scales = None,
    flip: Flip = None,
    window: Window = None,
    overlap: Overlap = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per batch, over all devices. Default: the run's, else 8."),
    ] = None,
) -> dict[str, Any]:
    """Returns the fields of `EvalConfig` that the options set."""
    values = locals() | {"scales": _parse_scales(scales)}
    return {name: value for name, value in values.items() if value is not None}


def add_options(build: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds the options of a function to a command.

    Args:
      build: its parameters are the options. The command takes its result as the first parameter.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        shared = inspect.signature(build, eval_str=True).parameters

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            settings = build(**{name: values.pop(name) for name in shared})
            command(settings, **values)

        parameters = [*own, *shared.values()]
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_options

    return decorate


view_options = add_options(_view_settings)
evaluation_options = add_options(_eval_settings)
