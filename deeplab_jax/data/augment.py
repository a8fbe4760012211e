"""Random scale, crop and flip of an image and its label as one affine warp."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from deeplab_jax.data.labels import IGNORE

# cv2.warpAffine takes border colours of up to four channels.
_MAX_WARP_CHANNELS = 4


def augment(
    image: UInt8[np.ndarray, "h w c"],
    label: UInt8[np.ndarray, "h w"],
    rng: np.random.Generator,
    *,
    crop: tuple[int, int],
    scale_range: tuple[float, float],
    flip: bool,
    fill: UInt8[np.ndarray, " c"],
) -> tuple[UInt8[np.ndarray, "crop_h crop_w c"], UInt8[np.ndarray, "crop_h crop_w"]]:
    """Scales, crops, flips and pads as in the paper, section 4.1.

    The scale is uniform in `scale_range`, where the authors' code draws multiples of 0.25. The
    scaled image is padded at the bottom and right where it is smaller than the crop, as there.
    The image is resampled bilinearly, without a low-pass filter, as there: down to a scale of
    0.5 that averages each pixel it passes over.

    Args:
      image: an image, any number of channels.
      label: its class ids.
      rng: its next four uniform draws decide; a generator of this image alone.
      crop: height and width of the result, pixels.
      scale_range: least and greatest scale.
      flip: whether half of the images are mirrored.
      fill: colour around the image; around the label it is `labels.IGNORE`.
    """
    draws = rng.random(4)
    scale = scale_range[0] + draws[0] * (scale_range[1] - scale_range[0])
    top, left = (
        int(draw * (max(int(scale * side) - crop_side, 0) + 1))
        for draw, side, crop_side in zip(draws[1:3], label.shape, crop, strict=True)
    )
    mirror = flip and draws[3] < 0.5
    return warp(image, label, crop_matrix(scale, top, left, crop[1], mirror), crop, fill)


def crop_matrix(
    scale: float, top: int, left: int, crop_width: int, mirror: bool
) -> Float[np.ndarray, "2 3"]:
    """The affine map from pixels of the crop to pixels of the image.

    The centre of pixel i is at i + 1/2 on a continuous axis, so at scale 1 a crop is an exact
    copy, and image and label stay on each other at any scale. OpenCV's axes have pixel i's centre
    at i: hence the halves.

    Args:
      scale: of the image.
      top: rows of the scaled image above the crop.
      left: columns of the scaled image left of the crop.
      crop_width: pixels.
      mirror: whether the crop is then mirrored.
    """
    x_step, x_origin = (-1, left + crop_width) if mirror else (1, left)
    x_shift = (x_origin + x_step * 0.5) / scale - 0.5
    y_shift = (top + 0.5) / scale - 0.5
    return np.array([[x_step / scale, 0, x_shift], [0, 1 / scale, y_shift]])


def warp(
    image: UInt8[np.ndarray, "h w c"],
    label: UInt8[np.ndarray, "h w"],
    matrix: Float[np.ndarray, "2 3"],
    shape: tuple[int, int],
    fill: UInt8[np.ndarray, " c"],
) -> tuple[UInt8[np.ndarray, "out_h out_w c"], UInt8[np.ndarray, "out_h out_w"]]:
    """Resamples the image bilinearly and the label by its nearest pixel.

    Args:
      image: an image, any number of channels.
      label: its class ids.
      matrix: from pixels of the result to pixels of the image, `(x, y, 1)` in OpenCV's axes.
      shape: height and width of the result, pixels.
      fill: colour around the image.
    """
    size = (shape[1], shape[0])
    groups = [
        cv2.warpAffine(
            image[:, :, first : first + _MAX_WARP_CHANNELS],
            matrix,
            size,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=fill[first : first + _MAX_WARP_CHANNELS].tolist(),
        ).reshape(*shape, -1)
        for first in range(0, image.shape[2], _MAX_WARP_CHANNELS)
    ]
    warped_label = cv2.warpAffine(
        label,
        matrix,
        size,
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=IGNORE,
    )
    return groups[0] if len(groups) == 1 else np.concatenate(groups, axis=2), warped_label
