"""What is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

# Both sides' alike.
NUM_CLASSES = 21
AUX_WEIGHT = 0.5  # of torchvision's reference training
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload of a torchvision architecture, the same for both sides.

    Attributes:
      kind: "forward": logits at the images' size, batch norm by running statistics; "train": a
        whole step: forward, both heads' loss, backward, SGD with momentum and weight decay.
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
    """A side of a case, compiled and ready.

    Attributes:
      start: begins one execution.
      wait: returns when all that was begun is done.
      compile_seconds: of building it, its first execution included.
      peak_bytes: memory on the device while it runs, or None where it is not known.
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
    """Those of a platform, "cpu" or "gpu"; the most telling first."""
    if platform == "cpu":
        return CPU_QUICK if quick else CPU
    return GPU_QUICK if quick else GPU
