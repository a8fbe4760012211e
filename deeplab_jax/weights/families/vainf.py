"""VainF's DeepLabV3Plus-Pytorch: DeepLabv3 and v3+ with torchvision's ResNets.

Source: github.com/VainF/DeepLabV3Plus-Pytorch, `network/_deeplab.py`, `network/modeling.py`.
"""

from __future__ import annotations

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.weights.families.family import Family, Table
from deeplab_jax.weights.families.resnets import aspp_rows, head_rows, resnet_rows


def _modules(architecture: Architecture) -> Table:
    resnet = resnet_rows(architecture, "backbone.")
    if architecture.decoder != "plus":
        return (*resnet, *head_rows("classifier.classifier."))
    return (
        *resnet,
        *aspp_rows("classifier.aspp"),
        (r"classifier\.decoder\.low_level\.conv", "classifier.project.0"),
        (r"classifier\.decoder\.low_level\.bn", "classifier.project.1"),
        (r"classifier\.decoder\.conv1\.conv", "classifier.classifier.0"),
        (r"classifier\.decoder\.conv1\.bn", "classifier.classifier.1"),
        (r"classifier\.logits", "classifier.classifier.3"),
    )


def _low_level_first(name: str, shape: tuple[int, ...], architecture: Architecture) -> int:
    """The decoder concatenates the low-level features before the upsampled ones."""
    if name != "classifier.decoder.conv1.conv.kernel":
        return 0
    return shape[2] - shape[3]  # the upsampled features have as many channels as the output


VAINF = Family(
    name="vainf",
    title="VainF's DeepLabV3Plus-Pytorch",
    signature=(
        ("classifier.classifier.0.convs.", "classifier.aspp.convs."),
        ("classifier.classifier.4.weight", "classifier.classifier.3.weight"),
    ),
    modules=_modules,
    assumed=("output_stride", "atrous_rates"),
    backbone="backbone.",
    first_channels=_low_level_first,
    resize="random scale 0.5..2.0 and crops of 513, bilinear, half-pixel centres",
    size=(513, 513),
)
