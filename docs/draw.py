"""Draws the pictures of `docs/guide.md`, `docs/architecture.md` and `docs/augmentation.md`.

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
from drawing import architecture, aspp, atrous, augmentation, labels, network, training, units
from matplotlib.figure import Figure
from PIL import Image

from deeplab_jax.utils.files import write_bytes
from deeplab_jax.visualization import plots

IMAGES = pathlib.Path(__file__).resolve().parent / "images"

# The guide's in its order, then those of other pages; the name is the command's and the file's.
PICTURES: dict[str, Callable[[], Figure]] = {
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
        architecture.architecture,
        augmentation.photometric,
        augmentation.color_jitter,
        augmentation.gray,
        augmentation.blur,
        augmentation.rotation,
        augmentation.max_class_share,
        augmentation.cutmix,
        augmentation.classmix,
        augmentation.copy_paste,
    )
}

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def _on_cpu() -> None:
    """Computes on the CPU, so that the pictures are the same on every machine."""
    jax.config.update("jax_platforms", "cpu")


Out = Annotated[str, typer.Option(help="File (.png, .svg or .pdf). Default: a PNG in docs/images.")]


def write(path: pathlib.Path, figure: Figure) -> None:
    """Writes a figure; a PNG gets at most 256 colours, which makes it a third as large."""
    if path.suffix.lower() != ".png":
        plots.save(path, figure)
        return
    encoded = io.BytesIO()
    image = Image.fromarray(plots.rasterize(figure)).quantize(256, dither=Image.Dither.NONE)
    image.save(encoded, "PNG", optimize=True)
    write_bytes(path, encoded.getvalue())


def _register(name: str, draw: Callable[[], Figure]) -> None:
    @app.command(name.replace("_", "-"), help=draw.__doc__)
    def command(out: Out = "") -> None:
        write(pathlib.Path(out) if out else IMAGES / f"{name}.png", draw())


for _name, _draw in PICTURES.items():
    _register(_name, _draw)


@app.command("all")
def draw_all() -> None:
    """Draw all of them, in a minute or two."""
    for name, draw in PICTURES.items():
        write(IMAGES / f"{name}.png", draw())


if __name__ == "__main__":
    app()
