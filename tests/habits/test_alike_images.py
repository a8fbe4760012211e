"""Near duplicates in data sets of like images, as scans, and in those of videos."""

import cv2
import numpy as np
import pytest

from deeplab_jax.data_check.check import check
from own_data import Maker

NUM = 60


def retina(rng, size=160):
    """A bright disc on black with a spot and vessels, as the scan of an eye."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    light = np.exp(-((x - rng.normal(0, 0.03)) ** 2 + (y - rng.normal(0, 0.03)) ** 2) / 0.2)
    spot = np.exp(-((x - rng.choice([-0.2, 0.2])) ** 2 + (y - rng.normal(0, 0.03)) ** 2) / 0.004)
    grey = 120 * light + 60 * spot + rng.normal(0, 3, (size, size))
    image = np.stack([grey, grey / 2, grey / 4], axis=-1)
    for _ in range(8):
        ends = rng.integers(0, size, (2, 2)).tolist()
        cv2.line(image, *map(tuple, ends), (60, 20, 10), 2)
    image[x**2 + y**2 > 0.23] = 0
    return np.clip(image, 0, 255).astype(np.uint8)


def scan(rng, size=160):
    """An ellipse with a ring and two dark halves, as a slice of a head."""
    image = np.zeros((size, size, 3), np.uint8)
    center = tuple((size // 2 + rng.integers(-4, 5, 2)).tolist())
    axes = tuple((np.array([0.3, 0.4]) * size + rng.integers(-4, 5, 2)).astype(int).tolist())
    cv2.ellipse(image, center, axes, 0, 0, 360, (180, 180, 180), -1)
    for sign in (-1, 1):
        inner = center[0] + sign * int(rng.integers(15, 22)), center[1]
        cv2.ellipse(image, inner, (8, int(rng.integers(20, 30))), 0, 0, 360, (90, 90, 90), -1)
    return cv2.add(image, rng.integers(0, 12, image.shape, np.uint8))


def frame_of(rng, size=160):
    """A frame of a street whose camera stands still; a car moves."""
    street = cv2.resize(
        np.random.default_rng(0).integers(0, 200, (7, 8, 3), np.uint8), (size, size)
    )
    x, y = rng.integers(0, size - 30, 2).tolist()
    cv2.rectangle(street, (x, y), (x + 15, y + 10), (255, 0, 0), -1)
    return street


def findings(tmp_path, pictures):
    """The near duplicates that a check finds between the first tenth of the images and the rest."""
    maker = Maker(tmp_path / "data")
    maker.text("classes.txt", "a", "b")
    for index, picture in enumerate(pictures):
        split = "val" if index < len(pictures) // 10 else "train"
        maker.save(maker.root / "images" / split / f"{index}.png", picture)
        maker.save(
            maker.root / "masks" / split / f"{index}.png",
            np.indices(picture.shape[:2], np.uint8)[0] % 2,
        )
    report, _, _ = check(maker.config())
    return [finding for finding in report.findings if finding.kind.startswith("near")]


@pytest.mark.parametrize("num", [10, NUM, 200])
@pytest.mark.parametrize("make", [retina, scan])
def test_like_images_are_no_duplicates(tmp_path, make, num):
    """Of the scans, which differ in few numbers, one in twenty may be near another by chance."""
    rng = np.random.default_rng(2)
    found = findings(tmp_path, [make(rng) for _ in range(num)])
    assert sum(finding.count for finding in found) <= num / 10 / 20


@pytest.mark.parametrize("make", [retina, scan])
def test_a_near_duplicate_among_like_images_is_found(tmp_path, make):
    rng = np.random.default_rng(2)
    pictures = [make(rng) for _ in range(NUM)]
    copy = cv2.resize(pictures[40], (200, 200), interpolation=cv2.INTER_AREA)
    pictures[2] = cv2.imdecode(cv2.imencode(".jpg", copy)[1], cv2.IMREAD_COLOR)
    (found,) = findings(tmp_path, pictures)
    assert [each.split(" (")[0] for each in found.examples] == ["val/2 ~ train/40"]
    assert "a guess" in found.message


def test_frames_of_a_camera_that_stands_still_are_near(tmp_path):
    rng = np.random.default_rng(1)
    (found,) = findings(tmp_path, [frame_of(rng) for _ in range(NUM)])
    assert found.count > NUM // 20
