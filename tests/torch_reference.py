"""torchvision's models as references; the only module of the tests that imports torchvision."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from speed.theirs import import_torchvision

torch = pytest.importorskip("torch", reason="install the `test` extra")


torchvision = import_torchvision()


def segmentation_model(
    architecture: str, *, seed: int = 0, aux: bool = False, num_classes: int = 21
) -> Any:
    """A model of `torchvision.models.segmentation`, such as "deeplabv3_resnet50", in eval mode."""
    build = getattr(torchvision.models.segmentation, architecture)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(weights=None, weights_backbone=None, aux_loss=aux, num_classes=num_classes)
    return randomize(model, seed)


def shallow_segmentation_model(num_units: tuple[int, ...], *, seed: int = 0) -> Any:
    """torchvision's DeepLabv3 with an auxiliary head on a bottleneck ResNet of these stages."""
    resnet, deeplabv3 = torchvision.models.resnet, torchvision.models.segmentation.deeplabv3
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = resnet.ResNet(
            resnet.Bottleneck, list(num_units), replace_stride_with_dilation=[False, True, True]
        )
        model = deeplabv3._deeplabv3_resnet(backbone, 21, True)
    return randomize(model, seed)


def classifier(architecture: str, *, seed: int = 0, num_classes: int = 10) -> Any:
    """A model of `torchvision.models`, such as "resnet18", in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(torchvision.models, architecture)(weights=None, num_classes=num_classes)
    return randomize(model, seed)


def randomize(model: Any, seed: int) -> Any:
    """Gives batch norm statistics and affine parameters that a mistake cannot hide behind.

    Fresh ones are zeros and ones: a converter that swapped mean with bias would go unnoticed.
    Scales lie near 1 so that the signal neither dies nor explodes over a hundred layers; biases
    of the last layers, which start at zero, are drawn too.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def uniform(tensor: Any, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 2.0)
            elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and module.bias is not None:
                uniform(module.bias, -0.5, 0.5)
    return model.eval()


def bits(tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor's type, shape and bytes; NumPy has no bfloat16 to ask PyTorch for."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    return (
        str(tensor.dtype),
        tuple(tensor.shape),
        tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def array_bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """An array's type, shape and bytes, as `bits` gives them."""
    return f"torch.{array.dtype}", array.shape, array.tobytes()


def assert_same(arrays: Mapping[str, np.ndarray], tensors: Mapping[str, Any]) -> None:
    """The same names in the same order, the same types, shapes and bits."""
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        assert array_bits(arrays[name]) == bits(tensor), name


def write_zip(
    path: pathlib.Path, entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED
) -> pathlib.Path:
    """An archive of these entries."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def torch_zip(
    path: pathlib.Path, pickled: bytes, contents: Mapping[str, bytes] | None = None
) -> pathlib.Path:
    """An archive like PyTorch's, of a pickle and the bytes of its storages."""
    data = {f"a/data/{key}": content for key, content in (contents or {}).items()}
    return write_zip(path, {"a/data.pkl": pickled, "a/byteorder": b"little", **data})
