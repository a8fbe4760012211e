"""The collector is paused until the first result, whatever happens."""

import gc

import pytest

from deeplab_jax.cli.startup import paused_collector, resume_collector


def test_the_collector_works_again_after_the_first_result():
    with paused_collector():
        assert not gc.isenabled()
        resume_collector()
        assert gc.isenabled()
        resume_collector()
    assert gc.isenabled()


def test_the_collector_works_again_after_an_error():
    with pytest.raises(KeyError), paused_collector():
        raise KeyError
    assert gc.isenabled()
