"""Files that `deeplab_jax.convert` must refuse without running or leaving anything."""

import os

import pytest

import deeplab_jax
import torch_reference
from deeplab_jax.utils.errors import UserError
from torch_reference import torch


class Attack:
    """Pickles as a call of the shell."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def attack(path):
    torch.save({"weight": Attack(f"touch {path.parent / 'marker'}")}, path)


def classifier():
    with torch.random.fork_rng():
        return torch_reference.torchvision.models.resnet18(weights=None)


def truncated(path):
    torch.save(classifier().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def other_model(name, path):
    """torchvision's other segmentation models: an FCN has a `classifier.4` too."""
    build = getattr(torch_reference.torchvision.models.segmentation, name)
    torch.save(build(weights=None, weights_backbone=None).state_dict(), path)


FILES = {
    "an FCN": (lambda path: other_model("fcn_resnet50", path), r"holds no DeepLabv3.*backbone"),
    "an LR-ASPP": (
        lambda path: other_model("lraspp_mobilenet_v3_large", path),
        r"holds no DeepLabv3.*backbone",
    ),
    "a call": (attack, r"asks for \w+\.system.*refused"),
    "a truncated file": (truncated, "damaged or truncated"),
    "a whole model": (lambda path: torch.save(classifier(), path), r"state_dict\(\)"),
    "a classifier": (
        lambda path: torch.save(classifier().state_dict(), path),
        "holds no DeepLabv3",
    ),
    "a complex tensor": (
        lambda path: torch.save({"a": torch.ones(1, dtype=torch.complex64)}, path),
        "complex64",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_bad_files_are_refused_and_leave_nothing(tmp_path, kind):
    write, message = FILES[kind]
    path = tmp_path / "bad.pth"
    write(path)
    with pytest.raises(UserError, match=f"(?s){message}"):
        deeplab_jax.convert(path, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [path]
