"""DeepLabv3 with MobileNetV2, as transformers and TensorFlow name its arrays.

Sources: transformers 5, `models/mobilenet_v2/modeling_mobilenet_v2.py`; tensorflow/models,
`research/deeplab/model.py` and `research/slim/nets/mobilenet/mobilenet_v2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import (
    Description,
    Family,
    Leaf,
    Shapes,
    Table,
    pool_first,
)
from deeplab_jax.weights.families.resnets import numbers, section, side
from deeplab_jax.weights.families.torchvision import width_of

_EPSILON = 1e-3  # of batch norm in the backbone; 1e-5 in the head
_HEAD_EPSILON = 1e-5


def _hf_modules(architecture: Architecture) -> Table:
    stem, head = "mobilenet_v2.conv_stem.", "segmentation_head."
    rows = [
        ("backbone.stem", f"{stem}first_conv"),
        ("backbone.block1.depthwise", f"{stem}conv_3x3"),
        ("backbone.block1.project", f"{stem}reduce_1x1"),
        *(
            (f"backbone.block{block}.{ours}", f"mobilenet_v2.layer.{block - 2}.{theirs}")
            for block in range(2, 18)
            for ours, theirs in (
                ("expand", "expand_1x1"),
                ("depthwise", "conv_3x3"),
                ("project", "reduce_1x1"),
            )
        ),
        ("classifier.aspp.branches.0", f"{head}conv_aspp"),
        ("classifier.aspp.branches.1.project", f"{head}conv_pool"),
        ("classifier.aspp.project", f"{head}conv_projection"),
    ]
    return [
        *((f"{ours}.conv", f"{theirs}.convolution") for ours, theirs in rows),
        *((f"{ours}.bn", f"{theirs}.normalization") for ours, theirs in rows),
        ("classifier.logits", f"{head}classifier.convolution"),
    ]


def _tf_modules(architecture: Architecture) -> Table:
    scope = "MobilenetV2/expanded_conv"
    rows = [
        ("backbone.stem", "MobilenetV2/Conv"),
        *(
            (
                f"backbone.block{block}.{part}",
                f"{scope}{f'_{block - 1}' if block > 1 else ''}/{part}",
            )
            for block in range(1, 18)
            for part in ("expand", "depthwise", "project")
        ),
        ("classifier.aspp.branches.0", "aspp0"),
        ("classifier.aspp.branches.1.project", "image_pooling"),
        ("classifier.aspp.project", "concat_projection"),
    ]
    return [
        *((f"{ours}.conv", theirs) for ours, theirs in rows),
        *((f"{ours}.bn", f"{theirs}/BatchNorm") for ours, theirs in rows),
        ("classifier.logits", "logits/semantic"),
    ]


def _hf_describe(shapes: Shapes, config: Mapping[str, Any]) -> Description:
    last = "mobilenet_v2.layer.15.reduce_1x1.convolution.weight"
    stem = "mobilenet_v2.conv_stem.first_conv.convolution.weight"
    logits = "segmentation_head.classifier.convolution.weight"
    fields = _fields(shapes, (stem, last, logits), in_axis=1, out_axis=0)
    if config.get("output_stride") in (8, 16, 32):
        fields["output_stride"] = int(config["output_stride"])  # JSON's may be 8.0
    if epsilon := numbers([config.get("layer_norm_eps", 0)])[:1]:
        fields |= {"backbone_bn_epsilon": epsilon[0]} if epsilon[0] > 0 else {}
    if config.get("tf_padding") is False:
        fields["padding"] = "symmetric"
    if config.get("hidden_act", "relu6") != "relu6":
        raise UserError(f"the config has hidden_act={config['hidden_act']!r}, not 'relu6'")
    preprocessor = section(config, "preprocessor_config")
    mean, std = (numbers(preprocessor.get(f"image_{field}")) for field in ("mean", "std"))
    names = section(config, "id2label")
    ordered = [names.get(str(index)) for index in range(fields["num_classes"])]
    known = all(isinstance(name, str) for name in ordered)
    classes = tuple(map(str, ordered)) if known else ()
    return Description("tf_mobilenet_v2", fields, classes, mean, std)


def _tf_describe(shapes: Shapes, config: Mapping[str, Any]) -> Description:
    last, stem = "MobilenetV2/expanded_conv_16/project/weights", "MobilenetV2/Conv/weights"
    names = (stem, last, "logits/semantic/weights")
    fields = _fields(shapes, names, in_axis=2, out_axis=3)
    if "output_stride" in config:
        fields["output_stride"] = config["output_stride"]
    return Description("tf_mobilenet_v2", fields, (), config.get("mean", ()), config.get("std", ()))


def _fields(
    shapes: Shapes, names: tuple[str, str, str], *, in_axis: int, out_axis: int
) -> dict[str, Any]:
    """Returns fields; `names` are the kernels of the stem, the last block and the logits."""
    stem, last, logits = names
    width = width_of(side(shapes, last, out_axis, 320), 320)
    return {
        "backbone": "mobilenet_v2",
        "width": width,
        "in_channels": side(shapes, stem, in_axis, 3),
        "num_classes": side(shapes, logits, out_axis, 21),
        "head_channels": max(1, round(side(shapes, logits, in_axis, 256) / width)),
    }


def _unfold_batch_norm(
    arrays: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Adds the batch norms that were folded into convolutions, so that they change nothing.

    The bias becomes the norm's. Mean 0 and variance 1 are not the statistics of the features, so
    that a model can be trained from such a file only with `train.freeze_bn`.
    """
    complete: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        scope, _, leaf = name.rpartition("/")
        if leaf != "biases" or scope.startswith("logits/"):
            complete[name] = array
            continue
        epsilon = _EPSILON if scope.startswith("MobilenetV2/") else _HEAD_EPSILON
        norm, like = f"{scope}/BatchNorm", np.zeros_like(array)
        complete |= {
            f"{norm}/gamma": like + np.sqrt(1 + epsilon, dtype=array.dtype),
            f"{norm}/beta": array,
            f"{norm}/moving_mean": like,
            f"{norm}/moving_variance": like + 1,
        }
    if len(complete) == len(arrays):
        return arrays, ()
    note = "Batch norm was folded into the convolutions: train from it with train.freeze_bn=True."
    return complete, (note,)


_BOTH: dict[str, Any] = {
    "first_channels": pool_first,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "resize": "longer side to 513, bilinear, then padded to 513x513",
    "size": (513, 513),
    # transformers' files must have an unused convolution to 1280 channels, which is not kept.
    "writes": False,
}

HF = Family(
    name="hf",
    title="transformers' MobileNetV2",
    signature=(
        r"segmentation_head\.conv_aspp\.convolution\.weight",
        r"mobilenet_v2\.conv_stem\.",
    ),
    modules=_hf_modules,
    describe=_hf_describe,
    assumed=("output_stride", "align_corners"),
    backbone=r"mobilenet_v2\.",
    head_prefixes=("segmentation_head.", "classifier."),
    dropped=(
        (
            r"mobilenet_v2\.conv_1x1\..*",
            "belongs to the classifier, which a segmentation does not need",
        ),
    ),
    defaults={"output_stride": 8},  # of google/deeplabv3_mobilenet_v2_1.0_513
    **_BOTH,
)

TF = Family(
    name="tf",
    title="TensorFlow's research/deeplab with MobileNetV2",
    signature=(r"MobilenetV2/Conv/weights", r"aspp0/weights", r"logits/semantic/weights"),
    modules=_tf_modules,
    describe=_tf_describe,
    assumed=("output_stride",),
    backbone=r"MobilenetV2/",
    head_prefixes=("aspp0/", "image_pooling/", "concat_projection/", "logits/"),
    leaves=(
        Leaf("kernel", "/weights", (0, 1, 2, 3)),
        Leaf("depthwise_kernel", "/depthwise_weights", (0, 1, 3, 2)),
        Leaf("scale", "/gamma", (0,)),
        Leaf("norm_bias", "/beta", (0,)),
        Leaf("bias", "/biases", (0,)),
        Leaf("mean", "/moving_mean", (0,)),
        Leaf("var", "/moving_variance", (0,)),
    ),
    complete=_unfold_batch_norm,
    **_BOTH,
)
