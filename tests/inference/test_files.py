"""Selection of images and classes, and names of the output files."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data import labels
from deeplab_jax.data.io.masks import write_ids
from deeplab_jax.inference import files
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_png


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.jpg", "a/y.PNG", "a/deep/x.jpg", "b/x.jpg", "b/x.png", "b/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "a/.x.jpg").write_bytes(b"")
    return tmp_path


def names(*arguments, out="out"):
    found, _ = files.find_images(arguments, pathlib.Path(out))
    return [str(name) for name in found.values()]


def test_a_folder_gives_its_images_and_keeps_its_folders(folder):
    found, _ = files.find_images(["a"], pathlib.Path("out"))
    assert [str(name) for name in found.values()] == ["deep/x", "x", "y"]
    assert list(found) == [folder / "a" / n for n in ("deep/x.jpg", "x.jpg", "y.PNG")]


def test_each_image_is_taken_once_in_the_order_given(folder):
    assert names("a/y.PNG", "a/*", "a", "./a/../a/x.jpg") == ["y", "x", "deep/x"]


def test_patterns(folder):
    assert names("*/x.jpg") == ["a_x_jpg", "b_x_jpg"]
    assert names("a/**/x.jpg") == ["deep_x_jpg", "a_x_jpg"]
    assert sorted(names("b/*")) == ["notes", "x_jpg", "x_png"]


def test_a_file_with_brackets_in_its_name_is_no_pattern(folder):
    (folder / "a[1].jpg").write_bytes(b"")
    assert names("a[1].jpg") == ["a[1]"]


def test_names_that_collide_are_kept_apart(folder):
    assert names("a/x.jpg", "b/x.jpg", "a/y.PNG") == ["a_x_jpg", "b_x_jpg", "y"]
    assert names("b") == ["x_jpg", "x_png"]
    (folder / "a_b").mkdir()
    (folder / "a" / "b").mkdir()
    for name in ("a_b/c.jpg", "a/b_c.jpg", "a/b/c.jpg"):
        (folder / name).write_bytes(b"")
    found = names("a_b/c.jpg", "a/b/c.jpg", "a/b_c.jpg", "a", "b", "a/x.jpg")
    assert len(set(found)) == len(found) == 8


def test_names_differ_to_the_last(folder):
    """Where joining folders gives the same text, a number tells them apart."""
    paths = [pathlib.Path("/a_b/c.jpg"), pathlib.Path("/a/b_c.jpg"), pathlib.Path("/q/c.jpg")]
    relatives = [pathlib.Path("c.jpg"), pathlib.Path("a_b_c_jpg.jpg"), pathlib.Path("c.jpg")]
    found = files._unique_names(paths, relatives)
    assert len(set(found)) == 3


def test_earlier_outputs_are_not_images(folder):
    for name in ("x_ids.png", "x_overlay.png", "x_side_by_side.png", "x_heatmap_dog.png"):
        write_png(folder / "a" / name, np.zeros((2, 3, 3), np.uint8))
    for out in ("a", "elsewhere"):
        assert names("a", out=out) == ["deep/x", "x", "y"]
        assert names(".", out=out)[:3] == ["a/deep/x", "a/x", "a/y"]
    assert names("a/x_ids.png", out="a") == ["x_ids"]


def test_arguments_without_images_are_reported(folder):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty: the folder contains no image files"):
        names("empty")
    with pytest.raises(UserError, match=r"a/\*\.tif: no file matches the pattern"):
        names("a/*.tif")
    assert names("a/none.jpg") == ["none"]  # told when it is its turn, so that others are done


def test_ids_are_the_values_of_a_palette_png(tmp_path):
    ids = np.arange(21, dtype=np.uint8).reshape(3, 7)
    write_ids(tmp_path / "a.png", ids, labels.VOC)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), ids)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), labels.VOC.palette()[ids])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
