"""Arguments and options that several commands have."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from deeplab_jax.config import EvalConfig
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import required_path


def expand_path(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """Replaces `~` in the paths of an option; the callback of all options that hold paths.

    Raises:
      UserError: a path is empty, as `--json=$VARIABLE` makes it if the variable is unset.
    """
    source = context.get_parameter_source(option.name or "")
    if source is None or source.name != "COMMANDLINE":
        return value
    paths = [value] if isinstance(value, str) else value
    for path in paths:
        required_path(path, option.opts[0])
    expanded = [os.path.expanduser(path) for path in paths]  # patterns stay as written
    return expanded[0] if isinstance(value, str) else expanded


Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Workdir, checkpoint, weights file (.pth, .safetensors), or name of weights that "
        "torchvision publishes.",
        callback=expand_path,
    ),
]
OutputStride = Annotated[
    int | None,
    typer.Option(help="8, 16 or 32; more for a cascade. Default: that of the training."),
]
Scales = Annotated[
    str, typer.Option(help="Image scales to average over: 0.5,0.75,1,1.25,1.5,1.75.")
]
Flip = Annotated[bool, typer.Option("--flip", help="Average over the mirrored image too.")]
Size = Annotated[
    int | None,
    typer.Option(help="Side that the protocol paper pads images to. Default: the config's, 513."),
]
Json = Annotated[
    str,
    typer.Option(
        "--json",
        help="Write the results to this file (.json); -: print only JSON.",
        callback=expand_path,
    ),
]


def parse_scales(text: str) -> tuple[float, ...]:
    """Returns the numbers of a text such as "0.5,1,1.5".

    Raises:
      UserError: a part of the text is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--scales must be numbers such as 0.5,1,1.5, got {text!r}") from None


def _eval_config(
    output_stride: OutputStride = None,
    scales: Scales = "1",
    flip: Flip = False,
    window: Annotated[
        int, typer.Option(help="Side of a sliding window, pixels; 0: whole images.")
    ] = 0,
    overlap: Annotated[
        float, typer.Option(help="Fraction of a window that the next window covers again.")
    ] = 0.5,
    batch_size: Annotated[int, typer.Option(help="Images per batch, over all devices.")] = 8,
) -> EvalConfig:
    """Returns the settings of an evaluation; the protocol is native with windows, else paper."""
    return EvalConfig(
        batch_size=batch_size,
        output_stride=output_stride,
        num_pictures=0,
        protocol="native" if window else "paper",
        scales=parse_scales(scales),
        flip=flip,
        window=window,
        overlap=overlap,
    )


def evaluation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `_eval_config` to a command.

    Args:
      command: takes the resulting `EvalConfig` as its first parameter, `settings`.
    """
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(_eval_config, eval_str=True).parameters

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        settings = _eval_config(**{name: values.pop(name) for name in shared})
        command(settings, **values)

    parameters = [*own, *shared.values()]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options
