"""Advice speaks where plain training fails, and is silent for the usual data sets."""

import pytest

from deeplab_jax.config import Config, LossConfig, resolve_eval
from deeplab_jax.config.io import with_fields
from deeplab_jax.config.rules import validate
from deeplab_jax.data_check.advice import advise
from deeplab_jax.data_check.scan import ClassCount


def classes_of(**pixels):
    total = max(sum(pixels.values()), 1)
    return [
        ClassCount(index, name, (0, 0, 0), {"train": n}, {"train": n / total}, {"train": 9})
        for index, (name, n) in enumerate(pixels.items())
    ]


def kinds(size=None, classes=(), **fields):
    config = with_fields(Config(), {"data.name": "folder", "data.root": "x"} | fields)
    found = list(advise(size, classes, config))
    assert {one.level for one in found} <= {"advice"}
    return [one.kind for one in found]


def as_config(**fields):
    return {name.replace("__", "."): value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("size", "crop"),
    # VOC, CamVid, Cityscapes with small crops, a full-HD video, an image below the crop.
    [
        ((500, 375), 513),
        ((480, 360), 361),
        ((2048, 1024), 513),
        ((1920, 1080), 513),
        ((64, 48), 33),
    ],
)
def test_no_advice_on_usual_sizes(size, crop):
    assert kinds(size, **as_config(data__crop_size=(crop,))) == []


def test_large_images_get_settings_that_are_valid_and_silence_the_advice():
    config = with_fields(Config(), {"data.name": "folder", "data.root": "x"})
    (found,) = advise((4032, 3024), (), config)
    assert found.kind == "large images"
    assert "4032 x 3024 pixels (median), crops 513 x 513: a crop shows 2.2%" in found.message
    assert "--config.data.crop_size=1025,1025" in found.mend
    windows, shrunk = found.mend.split("If ")[1:]
    for text, scale in ((windows, 1), (shrunk, 0.15)):
        flags = [
            word for word in text.split() if word.startswith("--config.") and "crop" not in word
        ]
        fields = dict(flag.removeprefix("--config.").rstrip(".").split("=") for flag in flags)
        mended = with_fields(config, fields, parse=True)
        validate(mended)
        assert resolve_eval(mended).protocol == "native"
        assert list(advise((4032, 3024), (), mended)) == []
        assert mended.eval.scales == (scale,)
    low, high = mended.data.scale_range
    assert (low * high) ** 0.5 == pytest.approx(513 / (4032 * 3024) ** 0.5, rel=0.02)


def test_the_advice_counts_the_scales_of_training():
    assert kinds((4032, 3024), **as_config(data__scale_range=(0.1, 0.4))) == []
    assert kinds((1400, 1400), **as_config(data__scale_range=(1.0, 4.0))) == ["large images"]
    assert kinds((4032, 3024), **as_config(eval__window=0)) == []  # chosen by the user


def test_imbalance_names_the_classes_and_figures():
    (found,) = advise(None, classes_of(background=9840, crack=160), Config())
    assert found.kind == "imbalance"
    assert "background has 98.40% of the pixels (crack 1.60%)" in found.message
    for setting in ("class_weights=auto", "name=dice", "name=focal"):
        assert f"--config.loss.{setting}" in found.mend
        field, value = setting.split("=")
        config = Config(loss=LossConfig(**{field: value}))
        validate(config)
        assert list(advise(None, classes_of(background=9840, crack=160), config)) == []


@pytest.mark.parametrize(
    "pixels",
    [
        {"background": 7005, "cat": 909, "car": 27, "bird": 0},  # VOC
        {"road": 3296, "sky": 1754, "pole": 102, "bicyclist": 30},  # CamVid
        {"background": 92, "vessel": 8},  # of the retina: trains without weights
        {"background": 100, "crack": 0},  # absent, an error or a warning of its own
        {"background": 0, "crack": 0},
    ],
)
def test_no_advice_on_usual_shares(pixels):
    assert kinds(classes=classes_of(**pixels)) == []
