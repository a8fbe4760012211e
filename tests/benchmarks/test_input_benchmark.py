"""`benchmarks/input_pipeline.py`: both packages do the same work on the same files."""

import importlib
import sys

import numpy as np
import pytest

from deeplab_jax.config import DataConfig
from deeplab_jax.data.augment import augment
from deeplab_jax.data.labels import IGNORE


@pytest.fixture(scope="module")
def benchmark():
    return importlib.import_module("input_pipeline"), importlib.import_module("torchvision_input")


def test_both_sides_read_the_same_files_into_the_same_crops(benchmark, tmp_path, monkeypatch):
    ours, theirs = benchmark
    monkeypatch.setattr(ours, "_NUM_IMAGES", 2)
    files = ours.Files(tmp_path)
    config = DataConfig(crop_size=(513,), scale_range=(1.0, 1.0), flip=False)
    read = theirs.Files(files.pairs, config, shorter_side=375)
    for index in range(2):
        example = files[index]
        pixels, mask = (each.numpy() for each in read[index])
        image = pixels.transpose(1, 2, 0) * config.std + config.mean
        assert image.shape == (513, 513, 3)
        assert mask.shape == (513, 513)
        np.testing.assert_array_equal(mask[:375, :500], example["label"])
        assert (mask[375:] == IGNORE).all()
        # Decoders of JPEG differ by a grey value or two.
        assert np.abs(image[:375, :500] * 255 - example["image"]).mean() < 1
        crop = augment(
            example["image"],
            example["label"],
            np.random.default_rng(0),
            crop=(513, 513),
            scale_range=(1.0, 1.0),
            flip=False,
            fill=np.zeros(3, np.uint8),
        )
        assert (crop[1] != IGNORE).sum() == (mask != IGNORE).sum()


def test_turns_give_the_ratio_of_both_sides(benchmark, tmp_path, monkeypatch):
    ours, theirs = benchmark
    monkeypatch.setattr(ours, "_NUM_IMAGES", 4)
    monkeypatch.setattr(sys, "argv", ["input_pipeline", "--batch-size=2", "--steps=2", "--turns=1"])
    files = ours.Files(tmp_path)
    config = DataConfig(crop_size=(65,))
    read = theirs.Files(files.pairs, config, shorter_side=375)
    row = ours.turns(ours.Dataset(files, ours.shapes.LABELS), config, read, 0, ours.parse())
    assert row["ratio"] == pytest.approx(row["images_per_second"] / row["theirs_images_per_second"])
