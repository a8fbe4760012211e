"""Changes of an image's colours and sharpness, in place. Each is a function of its draws.

Draws are uniform in [0, 1). Images are uint8 in RGB order. A grey image, of one channel, is treated
as RGB with equal channels: saturation and hue do not change it.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from deeplab_jax.config import AugmentConfig

Image = UInt8[np.ndarray, "h w c"]

_LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue: ITU-R BT.601
_LEVELS = np.arange(256)


def distort(image: Image, config: AugmentConfig, rng: np.random.Generator) -> None:
    """Applies the operations that a config names, in the order of the functions below."""
    if rng.random() < config.photometric:
        photometric(image, rng.random(9))
    if config.color_jitter:
        color_jitter(image, config.color_jitter, rng.random(8))
    if rng.random() < config.gray:
        gray(image)
    if rng.random() < config.blur:
        blur(image, rng.random())


def photometric(image: Image, draws: Float[np.ndarray, " 9"]) -> None:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    The brightness changes by up to 32 of 255, the contrast and the saturation in HSV by a factor in
    0.5..1.5, and the hue by up to 36 degrees. The contrast changes before or after saturation and
    hue with equal probability.

    Source: Liu et al. 2016, arXiv 1512.02325 (SSD), as `PhotoMetricDistortion` of mmsegmentation,
    which rounds down after each step; this function rounds to the nearest integer.
    """
    brightness, contrast, saturation, hue = np.where(draws[:4] < 0.5, 2 * draws[4:8] - 1, 0)
    scaling = _table(1 + contrast / 2)
    first = _table(1, 32 * brightness)
    contrast_first = draws[8] < 0.5
    cv2.LUT(image, scaling[first] if contrast_first else first, image)
    _change_hsv(image, 36 * hue, 1 + saturation / 2)
    if not contrast_first:
        cv2.LUT(image, scaling, image)


def color_jitter(image: Image, strength: float, draws: Float[np.ndarray, " 8"]) -> None:
    """Changes brightness, contrast, saturation and hue, in random order.

    Brightness, contrast and saturation change by a factor in 1 - strength..1 + strength: a blend
    with black, with the image's mean grey, and with the grey image. The hue changes by up to
    90 strength degrees.

    Source: torchvision's `ColorJitter(s, s, s, s / 4)`; Chen et al. 2020, arXiv 2002.05709
    (SimCLR), appendix A, has these proportions.
    """
    change = strength * (2 * draws[:4] - 1)
    is_rgb = image.shape[2] == 3
    for step in np.argsort(draws[4:]):
        factor = 1 + change[step]
        if step == 0:
            cv2.LUT(image, _table(factor), image)
        elif step == 1:
            mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if is_rgb else image)[0]
            cv2.LUT(image, _table(factor, (1 - factor) * mean), image)
        elif step == 2 and is_rgb:
            cv2.transform(image, factor * np.eye(3) + (1 - factor) * np.array([_LUMA] * 3), image)
        elif step == 3:
            _change_hsv(image, 90 * change[step])


def gray(image: Image) -> None:
    """Replaces colours by their grey, 0.299 red + 0.587 green + 0.114 blue."""
    if image.shape[2] == 3:
        cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, image)


def blur(image: Image, draw: float) -> None:
    """Blurs an image of any number of channels by a Gaussian with a sigma of 0.1 to 2 pixels.

    Source: SimCLR (see `color_jitter`), which has this range of sigma.
    """
    cv2.GaussianBlur(image, (0, 0), 0.1 + 1.9 * draw, image)


def _table(factor: float, offset: float = 0.0) -> UInt8[np.ndarray, " 256"]:
    """Returns `factor * level + offset` for each level, rounded and clipped to 0..255."""
    return np.clip(np.rint(factor * _LEVELS + offset), 0, 255).astype(np.uint8)


def _change_hsv(image: Image, degrees: float, saturation: float = 1.0) -> None:
    """Adds to the hue, and multiplies the saturation, of an RGB image."""
    if image.shape[2] != 3 or (degrees == 0 and saturation == 1):
        return
    hue = (_LEVELS + round(degrees / 2)) % 180  # OpenCV's hue has steps of two degrees
    tables = np.stack([hue, _table(saturation), _LEVELS], axis=1).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.cvtColor(cv2.LUT(hsv, tables[None], hsv), cv2.COLOR_HSV2RGB, image)
