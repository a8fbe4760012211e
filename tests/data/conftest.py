"""A fixture: a small data set of images and masks, written by `own_data.Maker`."""

import pytest

from own_data import NAMES, Maker


@pytest.fixture
def maker(tmp_path):
    maker = Maker(tmp_path / "my data")
    maker.text("classes.txt", *NAMES)
    return maker


@pytest.fixture
def flat(maker):
    """Two pairs in one folder each, both of train."""
    maker.pair("a")
    maker.pair("b")
    maker.text("train.txt", "a", "b")
    return maker
