"""Values of JAX_PLATFORMS that this machine does not have."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

import small_checkpoint
from conftest import ROOT
from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.export import export as export_module
from deeplab_jax.utils.errors import UserError

HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    small_checkpoint.write(folder)
    return folder


@pytest.mark.parametrize(
    ("platforms", "arguments"),
    [
        pytest.param(
            "cuda", "train shapes --workdir=run", marks=pytest.mark.skipif(HAS_CUDA, reason="")
        ),
        ("nonsense", "predict {} README.md --out=predicted"),
        ("nonsense,tpux", "export {} model.onnx"),
    ],
)
def test_the_platforms_of_the_machine_are_named(tmp_path, checkpoint, platforms, arguments):
    command = [sys.executable, "-m", "deeplab_jax.cli", *arguments.format(checkpoint).split()]
    environment = os.environ | {"JAX_PLATFORMS": platforms, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: JAX_PLATFORMS={platforms} cannot be used here" in done.stderr
    assert "Platforms that JAX can use here: " in done.stderr
    assert "cpu" in done.stderr.partition("can use here: ")[2]
    assert "pip install 'deeplab-jax[cuda]'" in done.stderr
    assert "pip install 'deeplab-jax[tpu]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AssertionError()])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), exit_on_user_error():
        raise error


def test_an_export_asks_for_the_cpu_too(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.extend.backend, "backends", lambda: {"cuda": None})
    with pytest.raises(UserError, match=r"set JAX_PLATFORMS to \w+,cpu, or unset it"):
        export_module.export(checkpoint, tmp_path / "model.stablehlo")
