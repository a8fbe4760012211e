"""The map of the package's rooms for `docs/architecture.md`."""

from __future__ import annotations

from matplotlib.figure import Figure

from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import GREY
from drawing.sheet import MARGIN

# From the highest floor to the lowest: room -> its contents. A room imports from lower floors.
FLOORS: tuple[dict[str, str], ...] = (
    {"cli": "the commands, one file each"},
    {"plan": "training step compiled for TPUs"},
    {"training": "stages, loop, step, losses, checkpoints"},
    {"evaluation": "evaluator, metrics, protocols, reports"},
    {
        "inference": "dl.load, windows,\nscales, files",
        "analysis": "summary, fields\nof view, figures",
        "data_check": "errors and findings\nin a data set",
        "export": "StableHLO, ONNX",
    },
    {
        "weights": "convert, download,\ninitialize",
        "visualization": "overlays, charts",
        "distributed": "mesh, hosts,\npreemption",
    },
    {
        "models": "DeepLabv3, backbones, heads,\natrous convolution",
        "data": "data sets, augmentation,\ninput pipeline",
    },
    {"config": "every field, its validation, config files"},
    {"buckets": "runs, models and data at gs:// and s3://"},
    {"utils": "errors, atomic files, registries"},
)
_COLORS = ("#e4eef8", "#cee1f2")
_LEFT = MARGIN + 70  # of the boxes; the floors' numbers are on their left


def architecture() -> Figure:
    """The rooms of the package by floor."""
    heights = [74 if len(rooms) > 1 else 42 for rooms in FLOORS]
    figure, axes = plots.diagram(plots.WIDTH, sum(heights) + 22 * len(FLOORS) + 30)
    right, y = plots.WIDTH - MARGIN, 16.0
    for index, (rooms, height) in enumerate(zip(FLOORS, heights, strict=True)):
        number = len(FLOORS) - index
        plots.text(axes, MARGIN, y + height / 2, f"floor {number}", color=GREY)
        width = (right - _LEFT - 12 * (len(rooms) - 1)) / len(rooms)
        for column, (room, contents) in enumerate(rooms.items()):
            left = _LEFT + column * (width + 12)
            plots.box(axes, left, y, width, height, fill=_COLORS[index % 2], line=0)
            if len(rooms) == 1:
                plots.text(axes, left + 16, y + height / 2, room, size=11.5, weight="bold")
                plots.text(axes, left + 150, y + height / 2, contents)
            else:
                middle = left + width / 2
                style = {"ha": "center", "max_width": width - 12}
                plots.text(axes, middle, y + 18, room, size=11.5, weight="bold", **style)
                plots.text(axes, middle, y + 50, contents, size=9.5, spacing=1.3, **style)
        y += height
        if number > 1:
            x = (_LEFT + right) / 2
            plots.arrow(axes, [(x, y + 2), (x, y + 20)])
        y += 22
    words = (
        "A room imports only from the floors below it. Rooms on one floor do not import each other."
    )
    plots.text(axes, MARGIN, y + 2, words, color=GREY)
    return figure
