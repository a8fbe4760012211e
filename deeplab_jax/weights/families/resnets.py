"""Rows of tables that families with ResNets share."""

from __future__ import annotations

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.weights.families.family import Table

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


def head_rows(theirs: str) -> Table:
    """Returns the rows of torchvision's heads; the main one's names begin with `theirs`."""
    return (
        *aspp_rows(f"{theirs}0"),
        (r"classifier\.head_conv\.conv", f"{theirs}1"),
        (r"classifier\.head_conv\.bn", f"{theirs}2"),
        (r"classifier\.logits", f"{theirs}4"),
        (r"aux_classifier\.head_conv\.conv", "aux_classifier.0"),
        (r"aux_classifier\.head_conv\.bn", "aux_classifier.1"),
        (r"aux_classifier\.logits", "aux_classifier.4"),
    )
