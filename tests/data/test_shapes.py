"""The generated data set: deterministic, exact labels, and colours that do not reveal the class."""

import pickle

import cv2
import numpy as np
import pytest

from deeplab_jax import data
from deeplab_jax.config import DataConfig, ShapesConfig
from deeplab_jax.data.datasets import shapes
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.utils.errors import UserError


def source(split="train", **fields):
    return data.load(DataConfig(name="shapes", shapes=ShapesConfig(**fields)), split).source


def test_an_example_depends_only_on_seed_split_and_index():
    ours = source()
    backwards = [ours[index] for index in reversed(range(6))][::-1]
    again = pickle.loads(pickle.dumps(ours))
    longer = source(num_train=8000)
    for index in range(6):
        for other in (backwards[index], again[index], longer[index]):
            np.testing.assert_array_equal(ours[index]["image"], other["image"])
            np.testing.assert_array_equal(ours[index]["label"], other["label"])
    assert [ours[index]["name"] for index in (0, 12)] == [
        "shapes-train-000000",
        "shapes-train-000012",
    ]
    images = [ours[0], ours[1], source("val")[0], source(seed=1)[0], source(seed=-1)[0]]
    for first, one in enumerate(images):
        for other in images[:first]:
            assert (one["image"] != other["image"]).mean() > 0.5


def test_lengths_and_bounds():
    assert len(source(num_train=7)) == 7
    assert len(source("val", num_eval=3)) == 3
    assert source("val")[199]["name"] == "shapes-val-000199"
    for index in (-1, 200):
        with pytest.raises(IndexError, match=r"\[0, 200\)"):
            source("val")[index]


@pytest.mark.parametrize("size", [16, 33, 96])
def test_format(size):
    example = source(size=size)[3]
    assert example["image"].shape == (size, size, 3)
    assert example["label"].shape == (size, size)
    assert example["image"].dtype == example["label"].dtype == np.uint8
    assert example["image"].flags.c_contiguous


def test_classes_are_balanced_and_borders_thin():
    labels = np.stack([source()[index]["label"] for index in range(400)])
    pixels = np.bincount(labels.ravel(), minlength=256) / labels.size
    assert set(np.flatnonzero(pixels)) == {*range(shapes.LABELS.num_classes), IGNORE}
    assert 0.5 < pixels[0] < 0.8
    assert pixels[1 : shapes.LABELS.num_classes].min() > 0.01
    assert 0.02 < pixels[IGNORE] < 0.15
    class_ids = range(1, shapes.LABELS.num_classes)
    present = [(labels == class_id).any((1, 2)).mean() for class_id in class_ids]
    assert max(present) < 1.5 * min(present)


def test_a_border_separates_any_two_classes():
    for index in range(50):
        label = source()[index]["label"].astype(int)
        for one, other in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            known = (one != IGNORE) & (other != IGNORE)
            np.testing.assert_array_equal(one[known], other[known])


def test_radii_and_number_of_shapes_are_the_configs():
    """A disc's area is its radius; the border takes one pixel off its rim."""
    discs = source(size=128, max_shapes=1, radius_range=(0.25, 0.25))
    areas = [(discs[index]["label"] == 1).sum() for index in range(40)]
    whole = np.pi * (0.25 * 128 - 1) ** 2
    assert max(areas) == pytest.approx(whole, rel=0.05)
    small = source(size=128, max_shapes=9, radius_range=(0.04, 0.05))
    counts = [
        cv2.connectedComponents((small[index]["label"] != 0).astype(np.uint8))[0] - 1
        for index in range(40)
    ]
    assert max(counts) in (8, 9)
    assert min(counts) == 1


def test_outlines_are_of_their_class():
    """Area over that of the convex hull, and holes, tell most classes apart without this code."""
    solidity = {"disc": 1, "triangle": 1, "cross": 0.72}
    circularity = {"disc": 1.0, "triangle": np.pi / (3 * np.sqrt(3))}
    for class_id, name in enumerate(shapes.LABELS.names[1:], start=1):
        coverage = shapes._coverage(
            np.random.default_rng(0), 800, class_id, np.array([400, 400]), 300
        )
        contours, nesting = cv2.findContours(
            (coverage > 127).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
        )
        assert len(contours) == (2 if name == "ring" else 1)
        outer = contours[int(np.flatnonzero(nesting[0][:, 3] < 0)[0])]
        area = cv2.contourArea(outer)
        if name in solidity:
            hull = cv2.contourArea(cv2.convexHull(outer))
            assert area / hull == pytest.approx(solidity[name], abs=0.05)
        if name in circularity:
            perimeter = cv2.arcLength(cv2.approxPolyDP(outer, 3, True), True)
            assert 4 * np.pi * area / perimeter**2 == pytest.approx(circularity[name], abs=0.03)
        moments = cv2.moments(outer)
        center = (moments["m10"] / moments["m00"], moments["m01"] / moments["m00"])
        assert center == pytest.approx((399.5, 399.5), abs=1)


def test_image_and_label_are_aligned():
    """Steps of the image's brightness are under the ignored borders, not beside them."""
    under, beside = [], []
    for index in range(60):
        example = source()[index]
        image = cv2.GaussianBlur(example["image"], (3, 3), 0).astype(float)
        steps = np.hypot(
            np.abs(cv2.Sobel(image, cv2.CV_64F, 1, 0)).sum(2),
            np.abs(cv2.Sobel(image, cv2.CV_64F, 0, 1)).sum(2),
        )
        border = (example["label"] == IGNORE).astype(np.uint8)
        near = cv2.dilate(border, np.ones((7, 7), np.uint8)) - cv2.dilate(
            border, np.ones((3, 3), np.uint8)
        )
        under.append(steps[border == 1].mean())
        beside.append(steps[near == 1].mean())
    assert np.mean(under) > 2.5 * np.mean(beside)


def test_colour_does_not_reveal_the_class():
    """The mean colour of each shape is that of all, up to the error of the sample."""
    num_classes = shapes.LABELS.num_classes
    sums, squares, counts = (np.zeros((num_classes, width)) for width in (3, 3, 1))
    for index in range(600):
        example = source()[index]
        for class_id in np.unique(example["label"][example["label"] < num_classes]):
            color = example["image"][example["label"] == class_id].mean(0)
            sums[class_id] += color
            squares[class_id] += color**2
            counts[class_id] += 1
    means = sums / counts
    errors = np.sqrt((squares / counts - means**2) / counts)
    assert np.abs((means[1:] - means[1:].mean(0)) / errors[1:]).max() < 4
    assert np.ptp(means[1:], axis=0).max() < 20
    assert np.all(means[1:] > means[0] + 80)  # shapes are seen at once, their class is not


@pytest.mark.parametrize("split", ["trainaug", "trainval", "vall"])
def test_unknown_split(split):
    with pytest.raises(UserError, match=rf"train.*val.*'{split}'"):
        data.load(DataConfig(name="shapes"), split)


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"unknown data set 'shape' .*'shapes'\?.*coco.*folder"):
        data.load(DataConfig(name="shape"), "train")
