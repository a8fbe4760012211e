"""`deeplab-jax warm` compiles what `predict` then finds on disk."""

import functools
import re

import jax
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.inference import compilation


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of programs, which keeps all of them."""
    from jax.experimental.compilation_cache import compilation_cache

    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {option: jax.config.values[option] for option in options}
    for option, value in zip(options, (str(tmp_path / "cache"), 0), strict=True):
        jax.config.update(option, value)
    compilation_cache.reset_cache()
    monkeypatch.setattr(compilation, "has_onednn", lambda: False)
    yield tmp_path / "cache"
    for option, value in before.items():
        jax.config.update(option, value)
    compilation_cache.reset_cache()


@pytest.fixture
def warm(command):
    return functools.partial(command, "warm")


def programs(cache):
    return {path.name for path in cache.glob("*-cache")}


def test_predict_finds_the_programs(command, model, cache, tmp_path):
    code, out, _ = command("warm", model, "--sizes", "41x57, 33,40x56")
    assert code == 0
    lines = out.splitlines()
    for size, line in zip(("41x57", "33x33", "40x56"), lines[:3], strict=True):  # one holds all
        assert re.fullmatch(rf"{size}: program for 1x48x64, after \d+\.\d s", line)
    assert lines[3:] == [f"in {cache}"]
    kept = programs(cache)
    assert kept
    for name, size in {"a": (41, 57), "b": (33, 33), "c": (40, 56)}.items():
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / f"{name}.png")
    images = [tmp_path / f"{name}.png" for name in "abc"]
    assert command("predict", model, *images, "--out", tmp_path / "out")[0] == 0
    assert programs(cache) == kept


def test_images_that_are_cut_into_windows(warm, model, cache):
    code, out, _ = warm(model, "--sizes", "70x40", "--window", 33)
    assert code == 0
    assert out.startswith("70x40: program for windows, after ")
    assert any("windows" in name or "network" in name for name in programs(cache))


def test_programs_that_cannot_be_kept_are_not_compiled(warm, model, cache, monkeypatch):
    monkeypatch.setattr(compilation, "has_onednn", lambda: True)
    code, out, _ = warm(model, "--sizes", "41x57")
    assert code == 0
    assert out.startswith("nothing to do: on this CPU, programs call oneDNN")
    assert not programs(cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "41x57x3"], "--sizes must be a side such as 513, or height x width"),
        (["--sizes", "0"], "of 1 pixel or more; got '0'"),
        (["--sizes", "41,"], "of 1 pixel or more; got ''"),
        (["--sizes", "41", "--window", 8], "window must be 32 pixels or more"),
        (["--sizes", "99999x9", "--window", 0], "too large to be predicted at once"),
        (["--sizes", "41", "--output-stride", 5], "output_stride"),
        (["--sizes", "41,99999x99999"], "an image may have at most 1073741824 pixels"),
        (["--sizes", "41", "--batch", 10**9], "equal to 100000"),
    ],
)
def test_nonsense_is_refused(warm, model, cache, arguments, message):
    code, _, err = warm(model, *arguments)
    assert code == 2
    assert message in err
    assert not programs(cache)


def test_a_checkpoint_that_does_not_exist(warm, cache):
    code, _, err = warm("nowhere", "--sizes", "41")
    assert code == 2
    assert "nowhere is neither a weights file" in err
