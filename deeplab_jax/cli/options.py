"""Options that commands share which evaluate a model on a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deeplab_jax.cli import outputs

if TYPE_CHECKING:
    from deeplab_jax.config import EvalConfig

Size = Annotated[
    int | None, typer.Option(help="Side that paper pads images to. Default: the config's, 513.")
]
OutputStride = Annotated[
    int | None,
    typer.Option(help="8, 16 or 32; more with a cascade. Default: the checkpoint's."),
]
Scales = Annotated[str, typer.Option(help="Average over these: 0.5,0.75,1,1.25,1.5,1.75.")]
Flip = Annotated[bool, typer.Option("--flip", help="Average over mirror images too.")]
Window = Annotated[int, typer.Option(help="Side of a sliding window; 0: whole images.")]
Overlap = Annotated[float, typer.Option(help="Share of a window that the next covers.")]
BatchSize = Annotated[int, typer.Option(help="Images at once, over all devices.")]


def evaluation(
    protocol: str,
    output_stride: int | None,
    scales: str,
    flip: bool,
    window: int,
    overlap: float,
    batch_size: int,
) -> EvalConfig:
    """What the options say, but for the size; windows go with the protocol native.

    Raises:
      UserError: the scales are no numbers.
    """
    from deeplab_jax.config import EvalConfig

    return EvalConfig(
        batch_size=batch_size,
        output_stride=output_stride,
        num_pictures=0,
        protocol=protocol or ("native" if window else "paper"),
        scales=outputs.parse_scales(scales),
        flip=flip,
        window=window,
        overlap=overlap,
    )
