"""Cases built with torchvision."""

from __future__ import annotations

import contextlib
import importlib
import time
from typing import Any

import numpy as np

from deeplab_jax.utils.errors import UserError

from .cases import (
    AUX_WEIGHT,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Built,
    Case,
)


def import_torchvision() -> Any:
    """Imports torchvision, even if its compiled operators do not load with this PyTorch.

    torchvision's wheel on PyPI is built for CUDA. With a CPU build of PyTorch its operators are
    missing, and the import fails where it registers a fake kernel for one of them. The models need
    none of them, so declaring the operators is enough for the import to succeed.

    Raises:
      UserError: PyTorch or torchvision is not installed.
    """
    try:
        import torch

        with contextlib.suppress(ImportError, RuntimeError):
            return _torchvision()
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        return _torchvision()
    except ImportError as error:
        raise UserError(
            f"torchvision cannot be imported ({error}): install torch and torchvision to compare"
        ) from error


_LIBRARIES: list[Any] = []  # a declaration is removed when its library is freed


def _torchvision() -> Any:
    importlib.import_module("torchvision.models.segmentation")
    return importlib.import_module("torchvision")


def modes(case: Case) -> tuple[str, ...]:
    """Returns the modes of PyTorch that may be the fastest for a case."""
    if case.dtype == "float32":
        return ("eager", "channels_last", "channels_last, compile")
    autocast = ("channels_last, autocast", "channels_last, autocast, compile")
    if case.kind == "train":
        return autocast
    return (*autocast, "channels_last, bfloat16 weights, compile")


def build(case: Case, mode: str) -> Built:
    """Builds a case in one of `modes`, on the GPU if torch has one.

    Raises:
      UserError: PyTorch or torchvision is not installed.
    """
    vision = import_torchvision()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    # Otherwise torch compiles a case of another size for dynamic sizes, and stops compiling after
    # eight cases.
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    model = _model(vision, case).to(device)
    layout = torch.channels_last if "channels_last" in mode else torch.contiguous_format
    model = model.to(memory_format=layout)
    if "bfloat16 weights" in mode:
        model = model.to(torch.bfloat16)
    rng = np.random.default_rng(0)
    shape = (case.batch, 3, case.height, case.width)
    images = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    dtype = torch.bfloat16 if "bfloat16 weights" in mode else torch.float32
    images = images.to(device, dtype).contiguous(memory_format=layout)

    def autocast() -> Any:
        if "autocast" not in mode:
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16)

    compiled = torch.compile if "compile" in mode else (lambda function: function)
    if case.kind == "forward":
        start = _forward(torch, model, images, autocast, compiled)
    else:
        start = _train(torch, model, images, case, autocast, compiled)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        start()
    wait()
    seconds = time.perf_counter() - begun
    peak = int(torch.cuda.max_memory_allocated()) if device == "cuda" else None
    return Built(start, wait, seconds, peak)


def _model(vision: Any, case: Case) -> Any:
    """Returns torchvision's DeepLabv3, also at output stride 16, unlike its own constructors."""
    segmentation = vision.models.segmentation
    backbone = getattr(vision.models, case.backbone)(
        weights=None, replace_stride_with_dilation=[False, case.output_stride == 8, True]
    )
    aux = case.kind == "train"
    layers = {"layer4": "out"} | ({"layer3": "aux"} if aux else {})
    features = vision.models._utils.IntermediateLayerGetter(backbone, layers)
    rates = [rate * 8 // case.output_stride for rate in (12, 24, 36)]
    classifier = segmentation.deeplabv3.DeepLabHead(2048, NUM_CLASSES, rates)
    aux_classifier = segmentation.fcn.FCNHead(1024, NUM_CLASSES) if aux else None
    return segmentation.DeepLabV3(features, classifier, aux_classifier)


def _forward(torch: Any, model: Any, images: Any, autocast: Any, compiled: Any) -> Any:
    model.eval()
    forward = compiled(lambda x: model(x)["out"])

    def start() -> None:
        with torch.inference_mode(), autocast():
            forward(images)

    return start


def _train(torch: Any, model: Any, images: Any, case: Case, autocast: Any, compiled: Any) -> Any:
    model.train()
    labels = np.random.default_rng(1).integers(
        0, NUM_CLASSES, (case.batch, case.height, case.width)
    )
    target = torch.from_numpy(labels).to(images.device)
    options = {"fused": True} if images.device.type == "cuda" else {}
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        **options,
    )
    cross_entropy = torch.nn.functional.cross_entropy

    def objective(images: Any, target: Any) -> Any:
        outputs = model(images)
        losses = {
            name: cross_entropy(logits, target, ignore_index=255)
            for name, logits in outputs.items()
        }
        return losses["out"] + AUX_WEIGHT * losses["aux"]

    objective = compiled(objective)

    def start() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = objective(images, target)
        loss.backward()
        optimizer.step()

    return start
