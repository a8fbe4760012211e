"""Draws photos of concrete, half of them with a crack, in the layout and values of CrackForest.

python docs/make_cracks.py crack_data

`Images/001.jpg` has the mask `Masks/001_label.PNG`: 0 is concrete, 255 a crack, 3 and 4 parts of
its edge, as in the copy of CrackForest (Shi et al. 2016) that tutorials on transfer learning use.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import Annotated

import cv2
import numpy as np
import typer

_HEIGHT, _WIDTH = 160, 240
_STEPS = 60  # corners of a crack


def draw_concrete(rng: np.random.Generator) -> np.ndarray:
    """Draws grey concrete: noise of three scales and dark pores, float32 `[h, w]`, 0..255."""
    image = np.full((_HEIGHT, _WIDTH), rng.uniform(110, 170), np.float32)
    for scale, strength in ((1, 8), (4, 6), (40, 14)):
        shape = (_HEIGHT // scale + 1, _WIDTH // scale + 1)
        noise = rng.normal(0, strength, shape).astype(np.float32)
        image += cv2.resize(noise, (_WIDTH, _HEIGHT), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(5, 25)):
        x, y = int(rng.integers(_WIDTH)), int(rng.integers(_HEIGHT))
        cv2.circle(image, (x, y), int(rng.integers(1, 4)), float(rng.uniform(60, 100)), -1)
    return image


def draw_crack(rng: np.random.Generator) -> np.ndarray:
    """Draws a crack that winds through the whole image, as uint8 `[h, w]` of 0 and 255."""
    mask = np.zeros((_HEIGHT, _WIDTH), np.uint8)
    start, end = rng.uniform(0.1, 0.9, 2) * _HEIGHT
    detour = np.cumsum(rng.normal(0, 3, _STEPS))
    detour -= np.linspace(0, detour[-1], _STEPS)  # a bridge: it ends where the line does
    xs, ys = np.linspace(0, _WIDTH - 1, _STEPS), np.linspace(start, end, _STEPS) + detour
    points = np.stack([xs, ys], axis=1).round().astype(np.int32)
    for first, second in itertools.pairwise(points):
        thickness = int(rng.integers(2, 5))
        cv2.line(mask, first.tolist(), second.tolist(), 255, thickness)
    return mask


def main(
    folder: Annotated[pathlib.Path, typer.Argument(help="Folder to create.")],
    num_images: Annotated[int, typer.Option(min=2)] = 120,
    seed: int = 0,
) -> None:
    """Draw photos of concrete and masks of their cracks."""
    images, masks = folder / "Images", folder / "Masks"
    for path in (images, masks):
        path.mkdir(parents=True)
    for index in range(1, num_images + 1):
        rng = np.random.default_rng((seed, index))
        image, mask = draw_concrete(rng), np.zeros((_HEIGHT, _WIDTH), np.uint8)
        if index % 2:
            mask = draw_crack(rng)
            image -= cv2.GaussianBlur(mask, (0, 0), 0.8) * np.float32(rng.uniform(0.2, 0.35))
            edge = (cv2.erode(mask, np.ones((3, 3), np.uint8)) == 0) & (mask == 255)
            mask[edge & (rng.random(mask.shape) < 0.2)] = rng.choice([3, 4])
        grey = image.clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(images / f"{index:03d}.jpg"), cv2.merge([grey] * 3))
        cv2.imwrite(str(masks / f"{index:03d}_label.PNG"), mask)
    print(f"{num_images} images and masks in {folder}")


if __name__ == "__main__":
    typer.run(main)
