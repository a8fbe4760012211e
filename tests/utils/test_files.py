"""Atomic writes and the check that a folder can be written to."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.utils import files
from deeplab_jax.utils.errors import UserError


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.atomic_path(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path  # a rename does not cross file systems
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_and_fail():
        with files.atomic_path(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.txt"
    with files.atomic_path(path) as first, files.atomic_path(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new/data"

    def fail():
        with files.atomic_folder(path) as partial:
            (partial / "sub").mkdir()
            (partial / "sub/x").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list((tmp_path / "new").iterdir()) == []
    for _ in range(2):  # also onto an empty folder
        with files.atomic_folder(path) as partial:
            assert files.find_files(path.parent) == []
            (partial / "x").write_text("1")
        assert [child.name for child in path.iterdir()] == ["x"]
        assert path.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777
        (path / "x").unlink()
    assert list((tmp_path / "new").iterdir()) == [path]


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 3), (300, 1, 3), (1, 500), (200, 300)])
def test_a_png_holds_the_pixels_and_its_origin(tmp_path, shape):
    rng = np.random.default_rng(0)
    image, palette = rng.integers(0, 256, shape, np.uint8), rng.integers(0, 256, (256, 3), np.uint8)
    colors = image if len(shape) == 3 else palette[image]
    path = tmp_path / "a.png"
    files.write_png(path, image, None if len(shape) == 3 else palette)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(opened), image)
        np.testing.assert_array_equal(np.asarray(opened.convert("RGB")), colors)
        assert opened.info["Software"] == "deeplab_jax"
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], colors)
    assert files.is_own_picture(path)


def test_require_writable(tmp_path):
    files.require_writable(tmp_path / "new" / "folder", create=True)
    assert os.listdir(tmp_path / "new" / "folder") == []
    with pytest.raises(UserError, match=r"^--out \S*absent cannot be written to: No such file"):
        files.require_writable(tmp_path / "absent", "--out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/folder cannot be written to: Not a directory"):
        files.require_writable(tmp_path / "file" / "folder", create=True)
