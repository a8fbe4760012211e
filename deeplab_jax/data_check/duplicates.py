"""Images that are the same, or nearly: what a model is trained on cannot measure it."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
from jaxtyping import UInt8, UInt64

# Bits of 64. Of 673 photos of VOC no two are nearer than 8. Of the 101 frames of video that are
# CamVid's val, 100 have another within 6; none has one of train, which shows other streets.
NEAR = 6

_HASH_SHAPE = (8, 8)  # comparisons down and across
_FLAT = 8  # grey levels between the darkest and lightest place of an image that shows nothing


def digest(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """Equal for images of the same pixels, and, but by a chance of 2^-128, for no others."""
    shape = np.array(image.shape, np.int64).tobytes()
    return hashlib.blake2b(shape + image.tobytes(), digest_size=16).digest()


def difference_hash(image: UInt8[np.ndarray, "h w c"]) -> int | None:
    """64 bits that change little with scale, light and compression; None of a flat image.

    A bit says whether a place of the 8 x 9 grey thumbnail is darker than the next to its right
    (Krawetz 2013, "dHash").
    """
    grey = image[:, :, 0]
    if image.shape[2] >= 3:
        grey = cv2.cvtColor(np.ascontiguousarray(image[:, :, :3]), cv2.COLOR_RGB2GRAY)
    rows, columns = _HASH_SHAPE
    thumbnail = cv2.resize(grey, (columns + 1, rows), interpolation=cv2.INTER_AREA)
    if int(thumbnail.max()) - int(thumbnail.min()) < _FLAT:
        return None
    bits = thumbnail[:, :-1] < thumbnail[:, 1:]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(
    ours: UInt64[np.ndarray, " m"], theirs: UInt64[np.ndarray, " n"], limit: int = NEAR
) -> list[tuple[int, int, int]]:
    """(place in ours, place in theirs, bits that differ) of the nearest, where within the limit.

    All are compared, which takes a second for 10 000 by 100 000.
    """
    if len(theirs) == 0:
        return []
    found = []
    for place, value in enumerate(ours):
        distances = np.bitwise_count(theirs ^ value)
        nearest = int(distances.argmin())
        if distances[nearest] <= limit:
            found.append((place, nearest, int(distances[nearest])))
    return found
