"""Reads TFLite files of TensorFlow's DeepLabv3 on MobileNetV2, without TensorFlow.

Such a file holds operators, not variables. They are followed from the output to the input and
compared with those of TensorFlow's `research/deeplab`. A convolution's place in the network gives
its scope, which the name of its weights must confirm.

Network: `slim/nets/mobilenet/mobilenet_v2.py` and `deeplab/model.py` of TensorFlow's models.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.utils.errors import listed
from deeplab_jax.weights.tflite_graph import (
    ACTIVATION_FIELD,
    DAMAGE,
    NONE,
    RELU,
    RELU6,
    Graph,
    Operator,
    Tensor,
)
from deeplab_jax.weights.torch_file import WeightsFile
from deeplab_jax.weights.torch_format.pickle_reader import Unreadable

_MAX_MERGED = 4  # operators after a convolution that belong to its layer
_LEAVES = {"CONV_2D": "weights", "DEPTHWISE_CONV_2D": "depthwise_weights"}
# Those that belong to the layer before: its dilation, batch norm, bias and activation.
_MERGED = ("BATCH_TO_SPACE_ND", "MUL", "ADD", "RELU", "RELU6")
_AFTER_LOGITS = (
    *("RESIZE_BILINEAR", "ARG_MAX", "SOFTMAX", "CAST"),
    *("SLICE", "STRIDED_SLICE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS"),
)
_SAME, _VALID = 0, 1  # padding
# Of MobileNetV2's blocks `expanded_conv`, `expanded_conv_1`, ... where no stride is removed.
_BLOCK_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_SCOPES = [f"MobilenetV2/expanded_conv{f'_{i}' if i else ''}" for i in range(len(_BLOCK_STRIDES))]


class _NotDeepLab(Exception):
    """The file is in order but holds another network; the message says where they differ."""


def _require(condition: object, difference: str) -> None:
    if not condition:
        raise _NotDeepLab(difference)


class _Layer(NamedTuple):
    leaf: str
    weights: np.ndarray  # [row, column, in, out]; depthwise: [row, column, channel, 1]
    biases: np.ndarray
    strides: int
    dilation: int


class _Network(Graph):
    """A graph that is followed from its output to its input, and the layers found so far."""

    def __init__(self, content: memoryview) -> None:
        super().__init__(content)
        self.layers: dict[str, _Layer] = {}

    def operator(self, tensor: int, expected: str, *names: str) -> Operator:
        """Returns the operator that computes a tensor, which must have one of these names."""
        operator = self.producers.get(self.origin(tensor))
        if operator is None or (names and operator.name not in names):
            found = operator.name if operator else "the input"
            raise _NotDeepLab(f"it has {found} where {expected} was expected")
        return operator

    def layer(self, tensor: int, scope: str, activation: int, name: str = "CONV_2D") -> int:
        """Adds the layer of a scope, which must compute this tensor, and returns its input."""
        merged: list[Operator] = []  # the last first
        while (operator := self.operator(tensor, f"{scope} ({name})", name, *_MERGED)).name != name:
            merged.append(operator)
            computed, _ = self.operands(operator)
            found = f"it has {operator.name} where {scope} ({name}) was expected"
            _require(len(computed) == 1 and len(merged) <= _MAX_MERGED, found)
            tensor = computed[0]
        weights, biases = self._arrays(operator, scope)
        found_activation = operator.activation
        for each in reversed(merged):
            _require(not found_activation, f"{scope} has {each.name} after its activation")
            found_activation = each.activation
            if each.name in ("ADD", "MUL"):
                value = self.operands(each)[1][0].reshape(biases.shape)
                biases = biases + value if each.name == "ADD" else biases * value
            if each.name == "MUL":
                weights = weights * (value if name == "CONV_2D" else value[:, None])
        message = f"{scope} has activation {found_activation} instead of {activation}"
        _require(found_activation == activation, message)

        padding, strides = operator.option(0, "b"), operator.option(1, "i")
        dilation = operator.option(ACTIVATION_FIELD[name] + 1, "i", 1)
        tensor = self.source(operator)
        before = self.producers.get(tensor)
        after = [each for each in merged if each.name == "BATCH_TO_SPACE_ND"]
        if after and before and before.name == "SPACE_TO_BATCH_ND":  # a batch of subsampled images
            (block, pads), (_, crops) = (self.operands(each)[1] for each in (before, *after))
            tensor, dilation = self.source(before), int(block.flat[0])
            # As SAME pads 3x3. More rows and columns, to divide the size evenly, are removed after.
            same = padding == _VALID and np.array_equal(pads, crops + dilation)
        else:
            same = not after and (padding == _SAME or weights.shape[:2] == (1, 1))
        _require(same, f"{scope} is not padded as SAME")
        self.layers[scope] = _Layer(_LEAVES[name], weights, biases, strides, dilation)
        return tensor

    def _arrays(self, operator: Operator, scope: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns a convolution's weights and biases in TensorFlow's axes."""
        name = self.tensors[self.origin(operator.inputs[1])].name
        # The names of tensors that were merged are joined.
        confirmed = any(f"/{scope}/" in f"/{part}/" for part in name.split(";"))
        _require(confirmed, f"it has weights named {name[:200]} where {scope} was expected")
        weights, *biases = self.operands(operator)[1]
        weights = weights.transpose(1, 2, 3, 0)
        num_channels = weights.shape[3 if operator.name == "CONV_2D" else 2]
        bias = biases[0].reshape(num_channels) if biases else np.zeros(num_channels, np.float32)
        types = {weights.dtype.name, bias.dtype.name}
        _require(types == {"float32"}, f"{scope} has integers without a scale")
        return weights, bias


@np.errstate(over="ignore", invalid="ignore")
def parse(content: memoryview) -> WeightsFile:
    """Returns the arrays of a TFLite file by TensorFlow's names, and settings from its graph.

    The names are SCOPE/weights [row, column, in, out], SCOPE/depthwise_weights [row, column,
    channel, 1] and SCOPE/biases; batch norm is folded in such files. 8-bit weights are dequantised.
    Float32 arrays are views of `content`.

    The settings are "output_stride"; and "mean" and "std" by channel, so that the network reads
    (pixel / 255 - mean) / std. Resizes with aligned corners, and the concatenation of image pooling
    and `aspp0` in this order, are verified.

    Raises:
      Unreadable: The file is damaged, or holds another network; the message says which.
    """
    try:
        network = _Network(content)
        settings = _deeplab(network)
    except DAMAGE as error:
        raise Unreadable(f"is a damaged or truncated TFLite file ({error})") from error
    except _NotDeepLab as error:
        counts = collections.Counter(operator.name for operator in network.operators).most_common()
        raise Unreadable(
            "is a TFLite file, but not of TensorFlow's DeepLabv3 on MobileNetV2 (image pooling, no "
            f"atrous branches, no decoder): {error}. Its operators are "
            f"{listed([f'{count} {name}' for name, count in counts])}"
        ) from error
    arrays: dict[str, np.ndarray] = {}
    for scope, layer in reversed(network.layers.items()):
        arrays |= {f"{scope}/{layer.leaf}": layer.weights, f"{scope}/biases": layer.biases}
    for array in arrays.values():
        array.flags.writeable = False
    return WeightsFile(arrays, "TFLite", config=settings)


def _deeplab(network: _Network) -> dict[str, Any]:
    """Follows a network from its output to its input, adds its layers and returns its settings."""
    tensor = network.outputs[0]
    while (operator := network.operator(tensor, "logits")).name in _AFTER_LOGITS:
        aligned = operator.name != "RESIZE_BILINEAR" or operator.option(2, "b")
        _require(aligned, "its logits are resized without aligned corners")
        tensor = network.source(operator)
    tensor = network.layer(tensor, "logits/semantic", NONE)
    tensor = network.layer(tensor, "concat_projection", RELU)
    joined = network.operator(tensor, "CONCATENATION", "CONCATENATION")
    branches, _ = network.operands(joined)
    _require(len(branches) == 2, f"it concatenates {len(branches)} branches instead of 2")
    resize = network.operator(branches[0], "image pooling", "RESIZE_BILINEAR")
    tensor = network.layer(network.source(resize), "image_pooling", RELU)
    pool = network.operator(tensor, "image pooling", "AVERAGE_POOL_2D", "MEAN")
    shape = network.tensors[tensor].shape
    _require(math.prod(shape[:-1]) == 1, f"it pools images to shape {shape}")
    features = network.layer(branches[1], "aspp0", RELU)
    _require(network.source(pool) == features, "its two branches have different inputs")
    tensor = _body(network, features)
    _require([tensor] == network.inputs, "its first convolution does not read its only input")
    return {
        "output_stride": _output_stride(network.layers),
        **_normalization(network.tensors[tensor]),
    }


def _body(network: _Network, tensor: int) -> int:
    """Follows MobileNetV2 from its features to its input, which it returns."""
    for scope in reversed(_SCOPES):
        operator = network.operator(tensor, scope)
        addends = network.operands(operator)[0] if operator.name == "ADD" else []
        is_residual = len(addends) == 2  # otherwise it adds a bias
        tensor = network.layer(addends[0] if is_residual else tensor, f"{scope}/project", NONE)
        tensor = network.layer(tensor, f"{scope}/depthwise", RELU6, "DEPTHWISE_CONV_2D")
        first = depthwise = network.layers[f"{scope}/depthwise"]
        if scope != _SCOPES[0]:
            tensor = network.layer(tensor, f"{scope}/expand", RELU6)
            first = network.layers[f"{scope}/expand"]
        out_channels = network.layers[f"{scope}/project"].weights.shape[3]
        expected = depthwise.strides == 1 and first.weights.shape[2] == out_channels
        correct = is_residual == expected and (not is_residual or addends[1] == tensor)
        _require(correct, f"{scope} does not add its input where MobileNetV2 does")
    return network.layer(tensor, "MobilenetV2/Conv", RELU6)


def _output_stride(layers: Mapping[str, _Layer]) -> int:
    """Returns the output stride, after comparing the strides and dilations of all layers."""
    output_stride = 2 * math.prod(layers[f"{scope}/depthwise"].strides for scope in _SCOPES)
    expected = {"MobilenetV2/Conv": (2, 1)}
    stride, dilation = 2, 1
    for scope, strides in zip(_SCOPES, _BLOCK_STRIDES, strict=True):
        # A removed stride becomes the dilation of the blocks after it.
        removed = stride == output_stride
        expected[f"{scope}/depthwise"] = (1, dilation) if removed else (strides, 1)
        stride, dilation = (stride, dilation * strides) if removed else (stride * strides, 1)
    for scope, layer in layers.items():
        correct = (layer.strides, layer.dilation) == expected.get(scope, (1, 1))
        _require(correct, f"{scope} has strides {layer.strides} and dilation {layer.dilation}")
    return output_stride


def _normalization(image: Tensor) -> dict[str, Any]:
    """Returns the mean and std of an input; those of float32 give pixel * 2 / 255 - 1."""
    mean = std = 0.5
    if image.scale.size:
        zero_point, scale = int(image.zero_point[0]), float(image.scale[0])
        _require(0 < scale < math.inf, f"its input has the scale {scale}")
        zero_point += 128 if image.dtype == "|i1" else 0
        mean, std = zero_point / 255, 1 / (255 * scale)
    return {"mean": (mean,) * 3, "std": (std,) * 3}
