"""Programs are compiled while a model is read, and nothing needless is imported or compiled."""

import json
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import deeplab_jax
from deeplab_jax.models.architecture import ARCHITECTURES, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, saved_model, torch_file
from random_modules import random_variables

IMAGE = np.random.default_rng(0).integers(0, 256, (41, 57, 3), np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A weights file of torchvision's smallest DeepLabv3."""
    path = tmp_path_factory.mktemp("model") / "resnet18.pth"
    model = FunctionalModel.of(architecture("torchvision_resnet18", num_classes=21))
    torch_file.write(
        path, families.from_model(jax.device_get(random_variables(model)), model.architecture)
    )
    return path


def test_a_program_is_compiled_before_the_arrays_are_there(model, monkeypatch):
    expected = deeplab_jax.load(model).predict(IMAGE)
    may_read, read = threading.Event(), saved_model._read_part

    def read_late(path, name):
        assert name != "model" or may_read.wait(60)
        return read(path, name)

    monkeypatch.setattr(saved_model, "_read_part", read_late)
    segmenter = deeplab_jax.load(model, wait=False)
    try:
        segmenter.predictor.plan([IMAGE.shape[:2]], "ids", None)
        (program,) = segmenter.predictor._programs._programs.values()
        program.result(timeout=60)
    finally:
        may_read.set()
    np.testing.assert_array_equal(segmenter.predict(IMAGE), expected)
    assert segmenter.num_compilations == 1


def test_who_does_not_wait_gets_the_error_with_the_arrays(file, tmp_path):
    arrays = {name: array.copy() for name, array in torch_file.read(file).items()}
    arrays["classifier.4.bias"][0] = np.nan
    torch_file.write(tmp_path / "nan.pth", arrays)
    with pytest.raises(UserError, match=r"nan\.pth: 1 of .* cannot be weights"):
        deeplab_jax.load(tmp_path / "nan.pth")
    segmenter = deeplab_jax.load(tmp_path / "nan.pth", wait=False)
    for use in (lambda: segmenter.variables, lambda: segmenter.predict(IMAGE)):
        with pytest.raises(UserError, match=r"nan\.pth: 1 of .* cannot be weights"):
            use()


def test_a_weights_file_needs_no_orbax_and_compiles_only_the_network(file, tmp_path):
    source = """
import json, sys
import jax, numpy as np
import deeplab_jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **labels: compiled.append(labels["fun_name"])
    if event == "/jax/core/compile/backend_compile_duration" else None
)
segmenter = deeplab_jax.load(sys.argv[1])
segmenter.predict(np.zeros((33, 33, 3), np.uint8))
print(json.dumps([compiled, "orbax" in sys.modules]))
"""
    run = [sys.executable, "-c", source, str(file)]
    out = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120).stdout
    compiled, has_orbax = json.loads(out)
    assert not has_orbax
    # The second tells whether XLA calls oneDNN.
    assert sorted(compiled) == ["jit(atrous_conv)", "jit(network)"]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.startswith("torch")])
def test_no_model_is_built_to_recognize_a_file(name, monkeypatch):
    slots = families.FAMILIES["torchvision"].slots(FunctionalModel.of(ARCHITECTURES[name]))
    arrays = {key: np.broadcast_to(0.0, slot.shape) for key, slot in slots.items()}
    monkeypatch.setattr(FunctionalModel, "of", None)  # none is built
    assert families.architecture_of(arrays) == ARCHITECTURES[name]
