"""Weights of classes from the data, and what the config and the run make of them."""

import json

import numpy as np
import pytest

import tiny
from deeplab_jax.config import Config, LossConfig
from deeplab_jax.config.io import with_fields
from deeplab_jax.config.rules import validate
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.training import class_weights
from deeplab_jax.training import train as train_module
from deeplab_jax.utils.errors import UserError


class Masks:
    """A source of blank images with given labels."""

    def __init__(self, *masks):
        self.masks = [np.array(mask, np.uint8) for mask in masks]

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        mask = self.masks[index]
        image = np.zeros((*mask.shape, 3), np.uint8)
        return {"image": image, "label": mask, "name": str(index)}


@pytest.fixture
def dataset():
    """Class 0: 5 of 8 pixels; class 1: 2 of 5; class 2: 1 of 3; class 3: none."""
    masks = Masks([[0, 0, 0, 1, 1, 255]], [[0, 0, 2]], [[255, 255]])
    return Dataset(masks, labels.named("a", "b", "c", "d"))


def test_auto_becomes_numbers_and_reports_them(dataset, capfd):
    config = class_weights.resolve(LossConfig(class_weights="auto"), dataset)
    # By hand: the median of the frequencies 5/8, 2/5 and 1/3, divided by each.
    assert config.class_weights == pytest.approx(((2 / 5) / (5 / 8), 1, (2 / 5) / (1 / 3), 1))
    said = capfd.readouterr().err
    assert "class weights: a 0.64, b 1, c 1.2, d 1 (no pixels)" in said
    assert class_weights.resolve(LossConfig(), dataset).class_weights is None
    class_weights.resolve(LossConfig(class_weights="auto"), dataset, quiet=True)
    assert capfd.readouterr().err == ""


def test_only_ignored_pixels_give_even_weights():
    config = class_weights.resolve(
        LossConfig(class_weights="auto"),
        Dataset(Masks([[255]]), labels.named("a", "b")),
        quiet=True,
    )
    assert config.class_weights == (1, 1)


def test_another_number_of_weights_than_classes_is_refused(dataset):
    with pytest.raises(UserError, match="has 3 numbers, but the data set has 4 classes: a, b, c"):
        class_weights.resolve(LossConfig(class_weights=(1, 2, 3)), dataset)


def parsed(text):
    """The config after a flag of the command line."""
    return with_fields(Config(), {"loss.class_weights": text}, parse=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("1,2,0.5", (1, 2, 0.5)), ("None", None), ("(3,)", (3,))],
)
def test_the_command_line_takes_numbers_auto_and_none(text, value):
    config = parsed(text)
    assert config.loss.class_weights == value
    validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "hinge"}, "cross_entropy, focal, dice or lovasz, got 'hinge'"),
        ({"class_weights": "automatic"}, "None, auto, or numbers of 0 or more .*'automatic'"),
        ({"class_weights": 2}, r"None, auto, or numbers .*\(a,b,\.\.\.\), not all 0, got 2"),
        ({"class_weights": ("a",)}, "None, auto, or numbers"),
        ({"class_weights": (1.0, -1.0)}, "None, auto, or numbers of 0 or more"),
        ({"class_weights": (float("nan"), 1.0)}, "None, auto, or numbers of 0 or more"),
        ({"focal_gamma": -1.0}, "must be 0 or more"),
        ({"name": "dice", "class_weights": "auto"}, "must be None with loss.name = dice"),
        ({"name": "lovasz", "hard_pixel_fraction": 0.5}, "must be 1 with loss.name = lovasz"),
    ],
)
def test_a_wrong_loss_is_named(fields, message):
    config = Config(loss=LossConfig(**fields))
    with pytest.raises(UserError, match=rf"config\.loss\.\w+ .*{message}"):
        validate(config)


def test_a_run_steps_with_its_weights_and_keeps_auto_in_its_config(tmp_path, capfd, monkeypatch):
    class Stop(Exception):
        pass

    def make_train_step(model, config, mesh):
        assert len(config.loss.class_weights) == model.architecture.num_classes
        raise Stop

    monkeypatch.setattr(train_module, "make_train_step", make_train_step)
    config = tiny.get_config()
    config.loss = LossConfig(name="focal", class_weights="auto")
    with pytest.raises(Stop):
        train_module.train(config, tmp_path)
    assert "class weights: background 0." in capfd.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["loss"]["class_weights"] == "auto"
