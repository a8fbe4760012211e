"""Advises settings without which a training on sound data may give a useless model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from deeplab_jax.config import Config, crop_shape, resolve_eval
from deeplab_jax.data.statistics import MEND_IMBALANCE, describe_imbalance
from deeplab_jax.data_check.findings import Finding
from deeplab_jax.data_check.scan import ClassCount

# Images with so many times the area of a crop are large: three times as wide and high. It is 8 for
# Cityscapes and crops of 513 pixels, 1 for VOC and CamVid.
_LARGE = 9


def advise(
    median_size: tuple[int, int] | None, classes: Sequence[ClassCount], config: Config
) -> Iterator[Finding]:
    """Yields advice on the config of a training; `median_size` is width and height in pixels."""
    if median_size is not None:
        yield from _advise_size(*median_size, config)
    pixels = {one.name: one.pixels.get("train", 0) for one in classes}
    if pixels and (
        imbalance := describe_imbalance(list(pixels), list(pixels.values()), config.loss)
    ):
        yield Finding("advice", "imbalance", imbalance, MEND_IMBALANCE, 1)


def _advise_size(width: int, height: int, config: Config) -> Iterator[Finding]:
    rows, columns = crop_shape(config.data)
    scale = math.sqrt(math.prod(config.data.scale_range))  # the mean one, by ratio
    ratio = width * height * scale**2 / (rows * columns)
    if ratio < _LARGE or config.eval.window is not None:
        return
    shrunk = scale / math.sqrt(ratio)  # the scale at which an image is as large as a crop
    low, high = (f"{shrunk / scale * factor:.2g}" for factor in config.data.scale_range)
    is_native = resolve_eval(config).protocol == "native"
    native = "" if is_native else "--config.eval.protocol=native "
    yield Finding(
        "advice",
        "large images",
        f"images are {width} x {height} pixels (median), crops {columns} x {rows}: a crop shows "
        f"{1 / ratio:.1%} of an image, so a model learns from details, and then sees far more at "
        "once in evaluation and prediction",
        f"If details tell the classes: {native}--config.eval.window={max(rows, columns)}. "
        f"If one must see whole objects: {native}--config.data.scale_range={low},{high} "
        f"--config.eval.scales={shrunk:.2g}. In both cases larger crops help, as far as memory "
        f"allows: --config.data.crop_size={rows * 2 - 1},{columns * 2 - 1}.",
        1,
    )
