"""Random scale, crop, flip and rotation of an image and its label as one affine warp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from deeplab_jax.data.labels import IGNORE, class_counts

_MAX_WARP_CHANNELS = 4  # of border colours that cv2.warpAffine accepts
_MAX_TRIES = 10  # crops that are drawn to satisfy `max_class_share`, as in mmsegmentation


def augment(
    image: UInt8[np.ndarray, "h w c"],
    label: UInt8[np.ndarray, "h w"],
    rng: np.random.Generator,
    *,
    crop: tuple[int, int],
    scale_range: Sequence[float],
    flip: bool,
    fill: UInt8[np.ndarray, " c"],
    rotation: float = 0.0,
    max_class_share: float = 1.0,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[UInt8[np.ndarray, "crop_h crop_w c"], UInt8[np.ndarray, "crop_h crop_w"]]:
    """Scales, crops, flips and pads an image and its label as in the paper, section 4.1.

    The scale is uniform in `scale_range`; the authors' code draws multiples of 0.25. As in their
    code, a scaled image smaller than the crop is padded at the bottom and right, and the image is
    resampled bilinearly without a low-pass filter, which uses every pixel down to a scale of 0.5.

    Args:
      image: an image with any number of channels.
      label: the class ids of the image.
      rng: a generator for this image. Four uniform numbers are drawn; then one if images are
        rotated, and two for each further place of the crop.
      crop: height and width of the result, pixels.
      scale_range: smallest and largest scale.
      flip: whether to mirror half of the images.
      fill: colour of the image's padding; the label's is `labels.IGNORE`.
      rotation: largest angle, degrees. The image turns about the centre of its visible part by an
        angle that is uniform in -rotation..rotation.
      max_class_share: up to 10 places of the crop are drawn until no class covers more than this
        fraction of the valid pixels, and there is one; the last is taken as it is. Source: mmseg's
        `RandomCrop(cat_max_ratio)`.
      out: arrays for the result; None: new ones.
    """
    draws = rng.random(4)
    scale = scale_range[0] + draws[0] * (scale_range[1] - scale_range[0])
    mirror = flip and draws[3] < 0.5
    angle = rotation * (2 * rng.random() - 1) if rotation else 0.0
    place = draws[1:3]
    for tries in reversed(range(_MAX_TRIES if max_class_share < 1 else 1)):
        top, left = (
            int(draw * (max(int(scale * side) - crop_side, 0) + 1))
            for draw, side, crop_side in zip(place, label.shape, crop, strict=True)
        )
        matrix = crop_matrix(scale, top, left, crop[1], mirror)
        if angle:
            y, x = (
                (start + min(scale * side, crop_side) / 2) / scale - 0.5
                for start, side, crop_side in zip((top, left), label.shape, crop, strict=True)
            )
            turn = cv2.getRotationMatrix2D((x, y), angle, 1.0)
            matrix = turn @ np.vstack([matrix, (0, 0, 1)])
        if not tries or _largest_share(_warp_label(label, matrix, crop)) <= max_class_share:
            break
        place = rng.random(2)
    return warp(image, label, matrix, crop, fill, out)


def crop_matrix(
    scale: float, top: int, left: int, crop_width: int, mirror: bool
) -> Float[np.ndarray, "2 3"]:
    """Returns the affine map from pixels of the crop to pixels of the image.

    The crop begins at the row `top` and the column `left` of the scaled image. The centre of pixel
    i is at i + 1/2, so a crop at scale 1 is an exact copy, and the image and its label stay aligned
    at any scale. In OpenCV's axes the centre of pixel i is at i, hence the halves in the code.
    """
    x_step, x_origin = (-1, left + crop_width) if mirror else (1, left)
    x_shift = (x_origin + x_step * 0.5) / scale - 0.5
    y_shift = (top + 0.5) / scale - 0.5
    return np.array([[x_step / scale, 0, x_shift], [0, 1 / scale, y_shift]])


def _largest_share(label: UInt8[np.ndarray, "h w"]) -> float:
    """The largest class's fraction of the valid pixels; infinite if there is no valid pixel."""
    counts = class_counts(label, IGNORE)
    return counts.max() / counts.sum() if counts.any() else math.inf


def warp(
    image: UInt8[np.ndarray, "h w c"],
    label: UInt8[np.ndarray, "h w"],
    matrix: Float[np.ndarray, "2 3"],
    shape: tuple[int, int],
    fill: UInt8[np.ndarray, " c"],
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[UInt8[np.ndarray, "out_h out_w c"], UInt8[np.ndarray, "out_h out_w"]]:
    """Warps an image with bilinear interpolation and its label with the nearest pixel.

    Args:
      image: an image with any number of channels.
      label: the class ids of the image.
      matrix: affine map of `(x, y, 1)` from the result to the image, in OpenCV's axes.
      shape: height and width of the result, pixels.
      fill: colour of the pixels outside the image.
      out: contiguous arrays for the result; None: new ones.
    """
    num_channels = image.shape[2]
    if out is None:
        out = np.empty((*shape, num_channels), np.uint8), np.empty(shape, np.uint8)
    warped, warped_label = out
    linear = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    whole = warped if num_channels <= _MAX_WARP_CHANNELS else None
    for first in range(0, num_channels, _MAX_WARP_CHANNELS):
        part = (..., slice(first, first + _MAX_WARP_CHANNELS))
        group = cv2.warpAffine(
            image[part],
            matrix,
            shape[::-1],
            whole,
            linear,
            cv2.BORDER_CONSTANT,
            fill[part].tolist(),
        )
        if whole is None:
            warped[part] = group.reshape(*shape, -1)
    _warp_label(label, matrix, shape, warped_label)
    return out


def _warp_label(
    label: UInt8[np.ndarray, "h w"],
    matrix: Float[np.ndarray, "2 3"],
    shape: tuple[int, int],
    out: np.ndarray | None = None,
) -> UInt8[np.ndarray, "out_h out_w"]:
    nearest = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(label, matrix, shape[::-1], out, nearest, cv2.BORDER_CONSTANT, IGNORE)
