"""DeepLabv3 with MobileNetV2, as transformers and TensorFlow name its arrays.

Sources: transformers 5, `models/mobilenet_v2/modeling_mobilenet_v2.py`; tensorflow/models,
`research/deeplab/model.py` and `research/slim/nets/mobilenet/mobilenet_v2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import (
    ConfigFields,
    Family,
    Leaf,
    Shapes,
    Table,
    pool_first,
)
from deeplab_jax.weights.families.reading import numbers, section

_EPSILON = 1e-3  # of batch norm in the backbone; 1e-5 in the head
_HEAD_EPSILON = 1e-5

_PARTS = (("expand", "expand_1x1"), ("depthwise", "conv_3x3"), ("project", "reduce_1x1"))
# Each convolution with its norm: here, in transformers, in TensorFlow.
_LAYERS = [
    ("backbone.stem", "mobilenet_v2.conv_stem.first_conv", "MobilenetV2/Conv"),
    *(
        (
            f"backbone.block{block}.{part}",
            f"mobilenet_v2.{f'layer.{block - 2}' if block > 1 else 'conv_stem'}.{theirs}",
            f"MobilenetV2/expanded_conv{f'_{block - 1}' if block > 1 else ''}/{part}",
        )
        for block in range(1, 18)
        for part, theirs in _PARTS
    ),
    ("classifier.aspp.branches.0", "segmentation_head.conv_aspp", "aspp0"),
    ("classifier.aspp.branches.1.project", "segmentation_head.conv_pool", "image_pooling"),
    ("classifier.aspp.project", "segmentation_head.conv_projection", "concat_projection"),
]
_HF_ROWS: Table = [
    *((f"{ours}.conv", f"{hf}.convolution") for ours, hf, _ in _LAYERS),
    *((f"{ours}.bn", f"{hf}.normalization") for ours, hf, _ in _LAYERS),
    ("classifier.logits", "segmentation_head.classifier.convolution"),
]
_TF_ROWS: Table = [
    *((f"{ours}.conv", tf) for ours, _, tf in _LAYERS),
    *((f"{ours}.bn", f"{tf}/BatchNorm") for ours, _, tf in _LAYERS),
    ("classifier.logits", "logits/semantic"),
]


def _read_hf_config(config: Mapping[str, Any], shapes: Shapes) -> ConfigFields:
    fields: dict[str, Any] = {}
    if config.get("output_stride") in (8, 16, 32):
        fields["output_stride"] = int(config["output_stride"])  # JSON's may be 8.0
    if (epsilon := numbers([config.get("layer_norm_eps", 0)])) and epsilon[0] > 0:
        fields["backbone_bn_epsilon"] = epsilon[0]
    if config.get("tf_padding") is False:
        fields["padding"] = "symmetric"
    if config.get("hidden_act", "relu6") != "relu6":
        raise UserError(f"the config has hidden_act={config['hidden_act']!r}, not 'relu6'")
    preprocessor = section(config, "preprocessor_config")
    mean, std = (numbers(preprocessor.get(f"image_{field}")) for field in ("mean", "std"))
    names = section(config, "id2label")
    num_classes = next(iter(shapes.get("segmentation_head.classifier.convolution.weight", ())), 21)
    ordered = [names.get(str(index)) for index in range(num_classes)]
    classes = tuple(name for name in ordered if isinstance(name, str))
    return ConfigFields(fields, classes, mean, std)


def _read_tf_config(config: Mapping[str, Any], shapes: Shapes) -> ConfigFields:
    stride = config.get("output_stride")
    fields = {"output_stride": stride} if stride else {}
    return ConfigFields(fields, (), config.get("mean", ()), config.get("std", ()))


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
    "architectures": "tf",
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
        ("segmentation_head.conv_aspp.convolution.weight",),
        ("mobilenet_v2.conv_stem.",),
    ),
    modules=lambda _: _HF_ROWS,
    assumed=("output_stride", "align_corners"),
    backbone="mobilenet_v2.",
    read_config=_read_hf_config,
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
    signature=(("MobilenetV2/Conv/weights",), ("aspp0/weights",), ("logits/semantic/weights",)),
    modules=lambda _: _TF_ROWS,
    assumed=("output_stride",),
    backbone="MobilenetV2/",
    read_config=_read_tf_config,
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
