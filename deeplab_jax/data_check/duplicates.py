"""Hashes that find equal and nearly equal images."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
from jaxtyping import Bool, Int16, UInt8, UInt64

# Largest number of different bits, of 64, between near duplicates. Among 673 photos of VOC, no two
# differ in fewer than 8 bits. Of the 101 video frames in CamVid's val, 100 have another one within
# 6 bits, and none has one in train, which shows other streets.
NEAR = 6

# Images are alike if half of all pairs differ in at most so many bits. The numbers are 27 for
# CamVid's frames, and 32 for VOC's photos. Few images do not show what they have in common.
_ALIKE = 20
_MIN_SET = 6

_HASH_SHAPE = (8, 8)  # comparisons down and across
_MIN_CONTRAST = 8  # grey levels between darkest and lightest pixel; images with less have no hash


def digest(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """Hashes shape and pixels of an image; different images collide with probability 2^-128."""
    shape = np.array(image.shape, np.int64).tobytes()
    return hashlib.blake2b(shape + image.tobytes(), digest_size=16).digest()


def thumbnail_gradients(image: UInt8[np.ndarray, "h w c"]) -> Int16[np.ndarray, " 64"] | None:
    """Computes how much brighter each pixel of the 8 x 9 grey thumbnail is than its left one.

    Returns None for an image almost without contrast.
    """
    grey = image[:, :, 0]
    if image.shape[2] >= 3:
        grey = cv2.cvtColor(np.ascontiguousarray(image[:, :, :3]), cv2.COLOR_RGB2GRAY)
    rows, columns = _HASH_SHAPE
    thumbnail = cv2.resize(grey, (columns + 1, rows), interpolation=cv2.INTER_AREA)
    if int(thumbnail.max()) - int(thumbnail.min()) < _MIN_CONTRAST:
        return None
    return np.diff(thumbnail.astype(np.int16), axis=1).ravel()


def hash_images(gradients: Int16[np.ndarray, "n 64"]) -> UInt64[np.ndarray, " n"]:
    """Computes 64 bits of each image that change little with scale, brightness and compression.

    A bit is set if a gradient is positive (Krawetz 2013, "dHash"). If the images of the set are
    alike, as scans of one organ are, it is set if the gradient is greater than the set's median:
    what all images have in common does not count then.
    """

    def pack(bits: Bool[np.ndarray, "n 64"]) -> UInt64[np.ndarray, " n"]:
        return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)

    hashes = pack(gradients > 0)
    if len(hashes) < _MIN_SET:
        return hashes
    first, second = np.random.default_rng(0).integers(len(hashes), size=(2, 1000))
    if np.median(np.bitwise_count(hashes[first] ^ hashes[second])) > _ALIKE:
        return hashes
    return pack(gradients > np.median(gradients, axis=0))


def near_pairs(
    hashes: UInt64[np.ndarray, " m"], others: UInt64[np.ndarray, " n"], limit: int = NEAR
) -> list[tuple[int, int, int]]:
    """Finds for each hash the nearest other one, if it differs in at most `limit` bits.

    Compares all of them, which takes a second for 10 000 by 100 000. Returns the index in `hashes`,
    that in `others` and the number of different bits of each pair.
    """
    if len(others) == 0:
        return []
    pairs = []
    for index, value in enumerate(hashes):
        distances = np.bitwise_count(others ^ value)
        nearest = int(distances.argmin())
        if distances[nearest] <= limit:
            pairs.append((index, nearest, int(distances[nearest])))
    return pairs
