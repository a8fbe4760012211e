"""Draws the pictures of `docs/guide.md`.

python docs/draw.py all
python docs/draw.py atrous --out atrous.png
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable
from typing import Annotated

import jax
import typer
from drawing import aspp, atrous, labels, network, training, units
from drawing.sheet import Picture
from PIL import Image

from deeplab_jax.utils.files import write_bytes

IMAGES = pathlib.Path(__file__).resolve().parent / "images"

# In the guide's order; the name is the command's and the file's.
PICTURES: dict[str, Callable[[], Picture]] = {
    draw.__name__: draw
    for draw in (
        labels.segmentation,
        labels.strides,
        labels.upsampling,
        atrous.atrous,
        atrous.gridding,
        network.output_stride,
        units.residual_units,
        aspp.aspp,
        aspp.model,
        aspp.receptive_field,
        network.cascade,
        training.poly,
        network.heads,
    )
}

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def _on_cpu() -> None:
    """Pictures are the same wherever they are drawn."""
    jax.config.update("jax_platforms", "cpu")


Out = Annotated[str, typer.Option(help="File (.png). Default: its place in docs/images.")]


def write(path: pathlib.Path, picture: Picture) -> None:
    """A PNG of at most 256 colours, which is a third as large."""
    encoded = io.BytesIO()
    image = Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE)
    image.save(encoded, "PNG", optimize=True)
    write_bytes(path, encoded.getvalue())


def _register(name: str, draw: Callable[[], Picture]) -> None:
    @app.command(name.replace("_", "-"), help=draw.__doc__)
    def command(out: Out = "") -> None:
        write(pathlib.Path(out) if out else IMAGES / f"{name}.png", draw())


for _name, _draw in PICTURES.items():
    _register(_name, _draw)


@app.command("all")
def draw_all() -> None:
    """All of them, in a minute or two."""
    for name, draw in PICTURES.items():
        write(IMAGES / f"{name}.png", draw())


if __name__ == "__main__":
    app()
