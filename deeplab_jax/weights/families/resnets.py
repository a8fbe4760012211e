"""What families with ResNets share: rows of their tables, and reading a ResNet from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.backbones.resnet import RESNETS, STAGE_FEATURES, STEMS, Bottleneck
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import Shapes, Table

# The names of a deep stem's convolutions and norms, in turn.
TIMM_STEM = ("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")
MMSEG_STEM = tuple(f"stem.{index}" for index in (0, 1, 3, 4, 6, 7))


def resnet_rows(
    architecture: Architecture, prefix: str, deep_stem: tuple[str, ...] = TIMM_STEM
) -> Table:
    """Returns the rows of a ResNet whose names begin with `prefix` in the family."""
    stem = ("conv1", "bn1") if architecture.stem == "conv7x7" else deep_stem
    # The average pool before the convolution of the shortcut has no arrays, and yet a number.
    conv = 1 if architecture.shortcut == "avg_pool" else 0
    return (
        *(
            (rf"backbone\.stem\.{index // 2}\.{('conv', 'bn')[index % 2]}", prefix + theirs)
            for index, theirs in enumerate(stem)
        ),
        (r"backbone\.(layer\d+\.\d+\.(?:conv|bn)\d)", rf"{prefix}\1"),
        (r"backbone\.(layer\d+\.\d+\.downsample)(?:\.conv)?", rf"{prefix}\g<1>.{conv}"),
        (r"backbone\.(layer\d+\.\d+\.downsample)\.bn", rf"{prefix}\g<1>.{conv + 1}"),
        (r"backbone\.final_bn", f"{prefix}final_bn"),  # of pre-activation; no other codebase has it
    )


def aspp_rows(theirs: str) -> Table:
    """Returns the rows of an ASPP with torchvision's names."""
    branch = rf"{theirs}.convs.\g<1>"
    ours = r"classifier\.aspp\.branches\.(\d+)\."
    return (
        (ours + r"conv", f"{branch}.0"),
        (ours + r"bn", f"{branch}.1"),
        (ours + r"project\.conv", f"{branch}.1"),
        (ours + r"project\.bn", f"{branch}.2"),
        (r"classifier\.aspp\.project\.conv", f"{theirs}.project.0"),
        (r"classifier\.aspp\.project\.bn", f"{theirs}.project.1"),
    )


def read_resnet(shapes: Shapes, prefix: str, deep_stem: str = "conv1.0") -> dict[str, Any]:
    """Returns the fields of `Architecture` that a ResNet's names and shapes tell.

    Args:
      shapes: Shape of each array by its name in the family.
      prefix: Beginning of the names of the backbone's arrays.
      deep_stem: Name of the first convolution of a deep stem, after the prefix. The last one has
        the number 6 instead of 0.

    Raises:
      UserError: The backbone is another network.
    """
    blocks = [name.removeprefix(prefix) for name in shapes if name.startswith(f"{prefix}layer1.0.")]
    inner = shapes.get(f"{prefix}layer1.0.conv2.weight", (0, 0, 0, 0))
    kind = ""
    if "layer1.0.conv1.weight" not in blocks:
        kind = "no ResNet"
    elif len(inner) == 4 and inner[1] not in (0, inner[0]):
        kind = "a ResNeXt, with grouped convolutions"
    elif any(re.search(r"\.(?:se|se_module|aa)\.", name) for name in blocks):
        kind = "a ResNet with further layers in its blocks (squeeze-excite, or blur)"
    if kind:
        known = f"{', '.join(RESNETS)}, of the usual, deep-stem and pooled-shortcut forms"
        raise UserError(f"the file's backbone is {kind}; known are {known}, and MobileNets")
    found = [re.match(rf"{re.escape(prefix)}layer([1-4])\.(\d+)\.conv1\.", name) for name in shapes]
    sizes = [1 + max([-1, *(int(m[2]) for m in found if m and m[1] == n)]) for n in "1234"]
    has_bottlenecks = f"{prefix}layer1.0.conv3.weight" in shapes
    # An unknown number of blocks gives the nearest network; the report of arrays says the rest.
    backbone = min(
        (name for name, each in RESNETS.items() if (each.block is Bottleneck) == has_bottlenecks),
        key=lambda name: sum(abs(a - b) for a, b in zip(RESNETS[name].sizes, sizes, strict=True)),
    )
    features = STAGE_FEATURES[3]
    width = side(shapes, f"{prefix}layer4.0.conv1.weight", 0, features) / features
    first, stem = f"{prefix}conv1.weight", "conv7x7"
    if f"{prefix}{deep_stem}.weight" in shapes:
        first = f"{prefix}{deep_stem}.weight"
        last = side(shapes, f"{prefix}{deep_stem[:-1]}6.weight", 0, 64)
        stem = min(("deep", "deep128"), key=lambda name: abs(STEMS[name][-1] * width - last))
    pooled = len(shapes.get(f"{prefix}layer2.0.downsample.1.weight", ())) == 4
    return {
        "backbone": backbone,
        "width": width,
        "in_channels": side(shapes, first, 1, 3),
        "stem": stem,
        "shortcut": "avg_pool" if pooled else "conv1x1",
    }


def side(shapes: Shapes, name: str, axis: int, default: int) -> int:
    """Returns the size of an axis of a kernel, `default` if it is absent or no kernel."""
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) == 4 and shape[axis] else default


def channels(shapes: Shapes, name: str, width: float, default: int) -> int:
    """Returns the number of output channels of a kernel at width 1, `default` if it is absent."""
    found = side(shapes, name, 0, 0)
    return max(1, round(found / width)) if found else default


def num_branches(shapes: Shapes, pattern: str) -> int | None:
    """Returns the number of atrous branches: of names that a pattern matches, without the 1x1."""
    found = {match[1] for name in shapes if (match := re.match(pattern, name))}
    return len(found) - 1 if found else None


def has_aux_head(shapes: Shapes, logits: str, aux_logits: str) -> bool:
    """Whether there is an auxiliary head for the same classes as the main one's."""
    return aux_logits in shapes and shapes[aux_logits][:1] == shapes.get(logits, ())[:1]


def list_of_rates(value: Any) -> tuple[int, ...] | None:
    """Returns a config's rates if they are whole numbers."""
    if isinstance(value, list | tuple) and value and all(type(each) is int for each in value):
        return tuple(value)
    return None


def numbers(value: Any) -> tuple[float, ...]:
    """Returns a config's numbers; empty if they are something else, or too large for float32."""
    is_list = isinstance(value, list | tuple)
    if is_list and all(type(each) in (int, float) and abs(each) < 1e30 for each in value):
        return tuple(value)
    return ()


def section(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Returns a dictionary nested in a config; empty if it is absent or something else."""
    for key in keys:
        value = config.get(key)
        config = value if isinstance(value, dict) else {}
    return config
