"""What the shapes of a file's arrays, and the values of a config, say of its model."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from deeplab_jax.models.architecture import ARCHITECTURES
from deeplab_jax.models.backbones.mobilenet import divisible_channels
from deeplab_jax.models.backbones.resnet import RESNETS, STAGE_FEATURES, STEMS, Bottleneck
from deeplab_jax.models.layers import scaled_channels
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import Family, Shapes

# Returns the shape [row, column, in, out] of a convolution's kernel by its module's name here; ()
# if the file has none of that name.
Kernel = Callable[[str], tuple[int, ...]]

# The last convolution of each MobileNet, which no other backbone has, and its channels at width 1.
_MOBILENETS = {
    "mobilenet_v2": ("backbone.block17.project.conv", 320),
    "mobilenet_v3_large": ("backbone.last.conv", 960),
}
_MAX_BRANCHES = 100  # of ASPP
_WIDTHS = [step / 20 for step in range(1, 61)]  # of MobileNets


class ShapeFields(NamedTuple):
    """What the shapes of a file's arrays tell of its model.

    Attributes:
      name: A key of `ARCHITECTURES`, which gives the fields that shapes do not tell.
      fields: Fields of `Architecture`, with the backbone.
      num_rates: Number of ASPP's atrous branches; None if there is no ASPP.
    """

    name: str
    fields: dict[str, Any]
    num_rates: int | None


def read_shapes(family: Family, shapes: Shapes) -> ShapeFields:
    """Returns what the shapes of a file's arrays tell of its model.

    Args:
      family: The file's family.
      shapes: Shapes by the names in the family's table.

    Raises:
      UserError: The backbone is unknown, or the family has no model with it.
    """
    prefix = family.architectures or family.name

    def kernels(backbone: str = "", **fields: Any) -> Kernel:
        """Returns a `Kernel` that finds names as in a model with these fields."""
        names = [name for name in ARCHITECTURES if name.startswith(f"{prefix}_{backbone}")]
        if not names:
            return lambda module: ()
        module_names = family.module_names(dataclasses.replace(ARCHITECTURES[names[0]], **fields))
        leaf = next(each for each in family.leaves if each.name == "kernel")

        def kernel(module: str) -> tuple[int, ...]:
            shape = shapes.get(module_names(module) + leaf.their_name, ())
            is_kernel = len(shape) == 4 and 0 not in shape
            return tuple(shape[axis] for axis in leaf.axes) if is_kernel else ()

        return kernel

    is_plus = bool(kernels(decoder="plus")("classifier.decoder.low_level.conv"))
    known: dict[str, Any] = {"decoder": "plus" if is_plus else "bilinear"}
    depthwise = kernels(**known, separable_aspp=True)("classifier.aspp.branches.1.depthwise")
    known |= {"separable_aspp": bool(depthwise)}
    fields = known | _read_backbone(shapes, lambda **backbone: kernels(**known, **backbone))
    kernel = kernels(**fields)
    logits, project = kernel("classifier.logits"), kernel("classifier.aspp.project.conv")
    fields["num_classes"] = logits[3] if logits else 21
    if project:
        fields["head_channels"] = max(1, round(project[3] / fields["width"]))
    aux_conv, aux_logits = map(kernel, ("aux_classifier.head_conv.conv", "aux_classifier.logits"))
    fields["aux_head"] = bool(aux_logits) and aux_logits[3:] == logits[3:]
    if family.name == "mmseg":  # whose head may be on other features, or have other channels
        features = kernel("backbone.layer4.0.conv1")[2:3]
        quarter = tuple(scaled_channels(channels, 1 / 4) for channels in features)
        fields["aux_head"] &= aux_conv[2:] == features + quarter
    branches = (f"classifier.aspp.branches.{index}.conv" for index in range(_MAX_BRANCHES))
    num_branches = sum(bool(kernel(branch)) for branch in branches)
    # Models of the paper, written with torchvision's names, have no 3x3 after ASPP.
    is_papers = logits and not kernel("classifier.head_conv.conv")
    if family.name == "torchvision" and is_papers:
        prefix = "paper"
    name = f"{prefix}{'plus' if is_plus else ''}_{fields['backbone']}"
    if name not in ARCHITECTURES:
        raise UserError(f"{family.title} has no model with the backbone {fields['backbone']} here")
    del fields["decoder"]  # the name has it
    return ShapeFields(name, fields, num_branches - 1 if num_branches else None)


def _read_backbone(shapes: Shapes, kernels: Callable[..., Kernel]) -> dict[str, Any]:
    """Returns the fields of the backbone; `kernels` is the function in `read_shapes`."""
    for backbone, (last, published) in _MOBILENETS.items():
        kernel = kernels(backbone=backbone)
        if found := kernel(last):
            fits = [w for w in _WIDTHS if divisible_channels(published * w) == found[3]]
            width = min([1.0, *fits], key=lambda w: (w not in fits, abs(w - found[3] / published)))
            first = kernel("backbone.stem.conv")
            in_channels = first[2] if first else 3
            return {"backbone": backbone, "width": width, "in_channels": in_channels}
    kernel = kernels(backbone="resnet50", stem="conv7x7")
    inner = kernel("backbone.layer1.0.conv2")
    kind = ""
    if not kernel("backbone.layer1.0.conv1"):
        kind = "no ResNet"
    elif inner and inner[2] != inner[3]:
        kind = "a ResNeXt, with grouped convolutions"
    elif any(re.search(r"\blayer1\.0\..*\b(?:se|se_module|aa)\.", name) for name in shapes):
        kind = "a ResNet with further layers in its blocks (squeeze-excite, or blur)"
    if kind:
        known = f"{', '.join(RESNETS)}, of the usual, deep-stem and pooled-shortcut forms"
        raise UserError(f"the file's backbone is {kind}; known are {known}, and MobileNets")
    sizes = [
        next(i for i in itertools.count() if not kernel(f"backbone.layer{stage}.{i}.conv1"))
        for stage in range(1, 5)
    ]
    has_bottlenecks = bool(kernel("backbone.layer1.0.conv3"))
    # An unknown number of blocks gives the nearest network; the report of arrays says the rest.
    backbone = min(
        (name for name, each in RESNETS.items() if (each.block is Bottleneck) == has_bottlenecks),
        key=lambda name: sum(abs(a - b) for a, b in zip(RESNETS[name].sizes, sizes, strict=True)),
    )
    last_stage = kernel("backbone.layer4.0.conv1")
    width = last_stage[3] / STAGE_FEATURES[3] if last_stage else 1.0
    stem, first = "conv7x7", kernel("backbone.stem.0.conv")
    deep = kernels(backbone=backbone, stem="deep")
    if last_of_stem := deep("backbone.stem.2.conv"):
        channels = last_of_stem[3] / width
        stem = min(("deep", "deep128"), key=lambda name: abs(STEMS[name][-1] - channels))
        first = deep("backbone.stem.0.conv")
    pooled = kernels(backbone=backbone, shortcut="avg_pool")("backbone.layer2.0.downsample.conv")
    return {
        "backbone": backbone,
        "width": width,
        "in_channels": first[2] if first else 3,
        "stem": stem,
        "shortcut": "avg_pool" if pooled else "conv1x1",
    }


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
