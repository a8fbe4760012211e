"""The measured workloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

# The same in both packages.
NUM_CLASSES = 21
AUX_WEIGHT = 0.5  # as in torchvision's reference training
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload of a torchvision architecture, the same for both packages.

    Attributes:
      kind: "forward": logits at the images' size, batch norm with running statistics; "train": a
        full step: forward, loss of both heads, backward, SGD with momentum and weight decay.
      backbone: "resnet50" or "resnet101".
      output_stride: 8 or 16.
      batch, height, width: of the images.
      dtype: of the computation; parameters are float32.
    """

    kind: str
    backbone: str
    output_stride: int
    batch: int
    height: int
    width: int
    dtype: str

    @property
    def name(self) -> str:
        shape = f"{self.batch}x{self.height}x{self.width}"
        return f"{self.kind} {self.backbone} os{self.output_stride} {shape} {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Built:
    """A case compiled for one package.

    Attributes:
      start: starts one execution.
      wait: blocks until all started executions are finished.
      compile_seconds: time to build it, including its first execution.
      peak_bytes: peak memory on the device while it runs, or None if it is not known.
    """

    start: Callable[[], None]
    wait: Callable[[], None]
    compile_seconds: float
    peak_bytes: int | None


CPU_QUICK = (
    Case("forward", "resnet50", 8, 1, 513, 513, "float32"),
    Case("train", "resnet50", 8, 2, 257, 257, "float32"),
)
CPU = (
    *CPU_QUICK,
    Case("forward", "resnet50", 16, 1, 513, 513, "float32"),
    Case("forward", "resnet50", 8, 1, 520, 693, "float32"),
    Case("forward", "resnet50", 8, 4, 257, 257, "float32"),
    Case("forward", "resnet101", 8, 1, 513, 513, "float32"),
    Case("forward", "resnet101", 16, 1, 513, 513, "float32"),
    Case("train", "resnet50", 16, 2, 257, 257, "float32"),
    Case("train", "resnet101", 16, 2, 257, 257, "float32"),
    Case("train", "resnet50", 16, 2, 513, 513, "float32"),
)
GPU_QUICK = (
    Case("train", "resnet101", 16, 16, 513, 513, "bfloat16"),
    Case("forward", "resnet50", 8, 32, 513, 513, "bfloat16"),
)
GPU = (
    *GPU_QUICK,
    Case("train", "resnet50", 8, 16, 513, 513, "bfloat16"),
    Case("forward", "resnet101", 16, 32, 513, 513, "bfloat16"),
    Case("forward", "resnet50", 8, 1, 520, 693, "bfloat16"),
)


def cases(platform: str, *, quick: bool) -> tuple[Case, ...]:
    """Returns the cases of a platform, "cpu" or "gpu"; the most informative first."""
    if platform == "cpu":
        return CPU_QUICK if quick else CPU
    return GPU_QUICK if quick else GPU
