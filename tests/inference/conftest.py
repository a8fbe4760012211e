"""What the tests of prediction share: a small model and its compiled programs."""

import threading

import pytest

import deeplab_jax
import small_checkpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of a small checkpoint of three classes, its functions and its arrays."""
    path = tmp_path_factory.mktemp("model") / "fox"
    return path, *small_checkpoint.write(path)


@pytest.fixture(scope="session")
def model(saved):
    return saved[0]


@pytest.fixture(scope="session")
def loaded(model):
    return deeplab_jax.load(model)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which commands run, and leave neither parts of files nor threads."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("*.partial"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]
