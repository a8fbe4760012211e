"""Data sets in which all pixels, all pixels of a class, or most crops do not count."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import small_checkpoint
import tiny
from deeplab_jax.training import train as train_module
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError


def write_data(root, mask):
    """Writes a mask with a grey image as train and as val."""
    image = np.full((*mask.shape, 3), 128, np.uint8)
    for split in ("train", "val"):
        for kind, array in (("images", image), ("masks", mask)):
            path = root / kind / split / "0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (root / "classes.txt").write_text("background\nred fox\nbluebird\n")


def get_config(root):
    config = tiny.get_config()
    config.data = dataclasses.replace(config.data, name="folder", root=str(root))
    return config


def mask_of(*values):
    mask = np.full((33, 33), 255, np.uint8)
    mask[0, : len(values)] = values
    return mask


@pytest.fixture(autouse=True)
def no_steps(monkeypatch):
    class Reached(Exception):
        pass

    def make_train_step(*_):
        raise Reached

    monkeypatch.setattr(train_module, "make_train_step", make_train_step)
    return Reached


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_valid_pixel_is_refused_before_the_first_step(tmp_path, split):
    write_data(tmp_path, mask_of(0, 1, 2))
    for path in (tmp_path / "masks" / split).iterdir():
        Image.fromarray(mask_of()).save(path)
    with pytest.raises(UserError, match=f"every pixel of the 1 images in {split!r} has the ignore"):
        train(get_config(tmp_path), tmp_path / "run")


def test_classes_without_pixels_are_named(tmp_path, no_steps, capfd):
    write_data(tmp_path, mask_of(0, 2))
    with pytest.raises(no_steps):
        train(get_config(tmp_path), tmp_path / "run")
    assert "warning: no image in 'train' has a pixel of red fox" in capfd.readouterr().err


def test_mostly_empty_crops_are_reported(tmp_path, no_steps, capfd):
    write_data(tmp_path, mask_of(0, 1, 2))
    config = get_config(tmp_path)
    config.data.crop_size = (9,)
    with pytest.raises(no_steps):
        train(config, tmp_path / "run")
    warnings = capfd.readouterr().err
    assert "every pixel is ignored in about 99% of the crops of 'train'" in warnings
    assert "'val'" not in warnings


@pytest.mark.parametrize("weighted", [False, True])
def test_imbalance_is_reported_with_settings(tmp_path, no_steps, capfd, weighted):
    write_data(tmp_path, np.eye(33, dtype=np.uint8))
    config = get_config(tmp_path)
    config.loss.class_weights = "auto" if weighted else None
    with pytest.raises(no_steps):
        train(config, tmp_path / "run")
    warnings = capfd.readouterr().err
    assert ("background has 96.97% of the pixels (red fox 3.03%)" in warnings) != weighted
    assert warnings.count("--config.loss.class_weights=auto") == (not weighted)


def test_evaluation_without_a_valid_pixel_is_an_error(tmp_path, command):
    write_data(tmp_path / "data", mask_of())
    small_checkpoint.write(tmp_path / "model")
    options = ["--data=folder", f"--root={tmp_path / 'data'}", "--protocol=native"]
    code, _, err = command("evaluate", tmp_path / "model", *options)
    assert code == 2
    assert "there is nothing to score" in err
