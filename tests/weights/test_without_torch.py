"""torchvision's file becomes logits and a file again, where PyTorch cannot be imported."""

import os
import subprocess
import sys

import jax
import numpy as np

import torch_reference
from torch_reference import torch

PROGRAM = """
import sys

for name in ("torch", "torchvision"):
    sys.modules[name] = None  # makes `import` raise

import jax
import numpy as np

import deeplab_jax
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.weights import saved_model

source, folder, images, logits, back = sys.argv[1:]
deeplab_jax.convert(source, folder)
saved = saved_model.read(folder)
model = FunctionalModel(Architecture(**saved.info["architecture"]))
outputs, _ = jax.jit(model.apply)(saved.variables, np.load(images))
np.savez(logits, **outputs)
deeplab_jax.convert(folder, back)
"""


def test_convert_load_and_predict(tmp_path):
    reference = torch_reference.segmentation_model(
        "deeplabv3_mobilenet_v3_large", aux=True, num_classes=5
    )
    source, folder = tmp_path / "weights.pth", tmp_path / "model"
    torch.save(reference.state_dict(), source)
    images = np.random.default_rng(0).normal(size=(1, 65, 97, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    with torch.no_grad():
        expected = reference(torch.from_numpy(np.moveaxis(images, 3, 1).copy()))

    logits, back = tmp_path / "logits.npz", tmp_path / "back.pth"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, source, folder, tmp_path / "images.npy", logits, back],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        },
    )
    assert done.returncode == 0, done.stderr
    found = np.load(logits)
    assert set(found) == set(expected) == {"out", "aux"}
    for head, theirs in expected.items():
        theirs = np.moveaxis(theirs.numpy(), 1, 3)
        assert found[head].shape == theirs.shape == (1, 65, 97, 5)
        difference = np.abs(found[head] - theirs).max() / np.abs(theirs).max()
        assert difference <= 1e-4, head
    original = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    reference.load_state_dict(torch.load(back, weights_only=True), strict=True)
    assert all(torch.equal(original[name], new) for name, new in reference.state_dict().items())
