"""The pictures of `docs/augmentation.md`: what each operation does to crops of generated shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from deeplab_jax.config import DataConfig, ShapesConfig
from deeplab_jax.data import color, mixing, randomness
from deeplab_jax.data.augment import augment
from deeplab_jax.data.datasets import shapes
from deeplab_jax.visualization import plots
from drawing.labels import COLORS
from drawing.sheet import MARGIN, Pixels, colored

_SIZE, _SCALE = 96, 2  # pixels of a crop, and units of the figure for each
_PITCH = _SIZE * _SCALE + 24
_FIRST, _SECOND = 3, 22  # examples with several shapes

Panel = tuple[str, Pixels]


def _example(index: int) -> mixing.Crop:
    config = DataConfig(name="shapes", shapes=ShapesConfig(size=_SIZE, num_eval=index + 1))
    example = shapes.load(config, "val").source[index]
    return example["image"], example["label"]


def _row(panels: Sequence[Panel]) -> Figure:
    figure, axes = plots.diagram(plots.WIDTH, _SIZE * _SCALE + 60)
    for column, (title, pixels) in enumerate(panels):
        left = MARGIN + column * _PITCH
        plots.text(axes, left, 20, title)
        plots.picture(axes, pixels, left, 38, _SCALE)
    return figure


def _rng(seed: int) -> np.random.Generator:
    return randomness.generator(seed, randomness.AUGMENT, 0)


def photometric() -> Figure:
    """Three draws of photometric distortion."""
    panels = [("image", _example(_FIRST)[0])]
    for seed in (1, 2, 3):
        panels.append((f"distorted, draw {seed}", _example(_FIRST)[0]))
        color.photometric(panels[-1][1], _rng(seed).random(9))
    return _row(panels)


def color_jitter() -> Figure:
    """The same draw of colour jitter at three strengths."""
    panels = [("image", _example(_FIRST)[0])]
    for strength in (0.2, 0.5, 1.0):
        panels.append((f"strength {strength:g}", _example(_FIRST)[0]))
        color.color_jitter(panels[-1][1], strength, _rng(5).random(8))
    return _row(panels)


def gray() -> Figure:
    """Two images without their colours."""
    panels = []
    for title, index in (("one", _FIRST), ("another", _SECOND)):
        panels += [(f"{title} image", _example(index)[0]), ("in grey", _example(index)[0])]
        color.gray(panels[-1][1])
    return _row(panels)


def blur() -> Figure:
    """The range of sigma."""
    panels = [("image", _example(_FIRST)[0])]
    for sigma in (0.5, 1.0, 2.0):
        panels.append((f"sigma {sigma:g} pixels", _example(_FIRST)[0]))
        color.blur(panels[-1][1], (sigma - 0.1) / 1.9)
    return _row(panels)


def _crop(seed: int, scale: float, **options: float) -> mixing.Crop:
    return augment(
        *_example(_FIRST),
        _rng(seed),
        crop=(_SIZE, _SIZE),
        scale_range=(scale, scale),
        flip=False,
        fill=np.array([124, 116, 104], np.uint8),
        **options,
    )


def rotation() -> Figure:
    """A rotated image with its label; what comes from outside is ignored."""
    before, after = _crop(2, 1.0), _crop(2, 1.0, rotation=30.0)
    panels = [("image", before[0]), ("label", colored(before[1], COLORS))]
    return _row([*panels, ("rotated", after[0]), ("its label", colored(after[1], COLORS))])


def max_class_share() -> Figure:
    """The crop of one draw, and that of the first draw in which no class has most of the pixels."""
    panels: list[Panel] = []
    for title, share in (("any crop", 1.0), ("share at most 0.75", 0.75)):
        image, label = _crop(9, 3.0, max_class_share=share)
        panels += [(title, image), ("its label", colored(label, COLORS))]
    return _row(panels)


def _mixed(name: str, seed: int) -> Figure:
    crop, other = _example(_FIRST), _example(_SECOND)
    panels = [("first crop", crop[0].copy()), ("second crop", other[0])]
    mask = mixing.MASKS[name](other[1], _rng(seed), shapes.LABELS)
    mixing.paste(crop, other, mask)
    return _row([*panels, ("mixed", crop[0]), ("its label", colored(crop[1], COLORS))])


def cutmix() -> Figure:
    """A rectangle of the second crop on the first."""
    return _mixed("cutmix", 1)


def classmix() -> Figure:
    """Half of the second crop's classes on the first."""
    return _mixed("classmix", 5)


def copy_paste() -> Figure:
    """Some of the second crop's objects on the first."""
    return _mixed("copy_paste", 5)
