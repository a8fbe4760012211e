"""Reads TFLite files of TensorFlow's DeepLabv3 on MobileNetV2, without TensorFlow.

Such a file holds operators, not variables. They are followed from the output to the input and
compared with those of TensorFlow's `research/deeplab`. A convolution's place in the network gives
its scope, which the name of its weights must confirm.

Network: `slim/nets/mobilenet/mobilenet_v2.py` and `deeplab/model.py` of TensorFlow's models.
"""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.utils.errors import listed
from deeplab_jax.weights.tflite_graph import (
    ACTIVATION_FIELD,
    NONE,
    RELU,
    RELU6,
    Graph,
    Operator,
    Tensor,
    item,
)
from deeplab_jax.weights.torch_file import WeightsFile
from deeplab_jax.weights.torch_format.pickle_reader import Unreadable

_MAX_MERGED = 4  # operators after a convolution that belong to its layer
_CONVS = ("CONV_2D", "DEPTHWISE_CONV_2D")
# Those that belong to the layer before: its dilation, batch norm, bias and activation.
_MERGED = ("BATCH_TO_SPACE_ND", "MUL", "ADD", "RELU", "RELU6")
_LAYOUT = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
_POOLED = (*_LAYOUT, "AVERAGE_POOL_2D", "MEAN")
_AFTER_LOGITS = (*_LAYOUT, "RESIZE_BILINEAR", "ARG_MAX", "SOFTMAX", "CAST", "STRIDED_SLICE")
_SAME, _VALID = 0, 1  # padding
# Of MobileNetV2's blocks `expanded_conv`, `expanded_conv_1`, ... where no stride is removed.
_BLOCK_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


class _NotDeepLab(Exception):
    """The file is in order but holds another network; the message says where they differ."""


def _require(condition: object, difference: str) -> None:
    if not condition:
        raise _NotDeepLab(difference)


class _Layer(NamedTuple):
    operator: str
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
            computed, constants = self.operands(operator)
            has_constant = constants or operator.name not in ("ADD", "MUL")
            _require(
                len(computed) == 1 and has_constant and len(merged) <= _MAX_MERGED,
                f"it has {operator.name} where {scope} ({name}) was expected",
            )
            tensor = computed[0]
        weights, biases = self._arrays(operator, scope)
        found, after = operator.activation, None
        for each in reversed(merged):
            if each.name == "BATCH_TO_SPACE_ND":
                after = each
                continue
            _require(not found, f"{scope} has {each.name} after its activation")
            found = each.activation
            if each.name in ("ADD", "MUL"):
                value = self.operands(each)[1][0].astype(np.float32).reshape(-1)
                _require(value.size in (1, biases.size), f"{each.name} has {value.size} values")
                biases = biases + value if each.name == "ADD" else biases * value
            if each.name == "MUL":
                weights = weights * (value if name == "CONV_2D" else value[:, None])
        _require(found == activation, f"{scope} has activation {found} instead of {activation}")

        option, first = operator.options.number, ACTIVATION_FIELD[name] + 1  # of its dilations
        strides, dilation, padding = option(1, "i"), option(first, "i", 1), option(0, "b")
        square = (strides, dilation) == (option(2, "i"), option(first + 1, "i", 1))
        _require(square, f"{scope} has other strides or dilations for columns than for rows")
        tensor = self.source(operator)
        before = self.producers.get(tensor)
        batched = before is not None and before.name == "SPACE_TO_BATCH_ND"
        if after or batched:
            if not (after and before and batched and padding == _VALID):
                raise _NotDeepLab(f"{scope} is dilated in another way")
            tensor, dilation = self._dilated(before, after, scope)
        elif weights.shape[:2] != (1, 1):
            _require(padding == _SAME, f"{scope} is not padded as SAME")
        self.layers[scope] = _Layer(name, weights, biases, strides, dilation)
        return tensor

    def _arrays(self, operator: Operator, scope: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns a convolution's weights and biases in TensorFlow's axes."""
        computed, constants = self.operands(operator)
        _require(computed == [self.source(operator)] and constants, f"{scope} has no weights")
        weights_name = self.tensors[self.origin(operator.inputs[1])].name
        # The names of tensors that were merged are joined.
        confirmed = any(f"/{scope}/" in f"/{part}/" for part in weights_name.split(";"))
        _require(confirmed, f"it has weights named {weights_name[:200]} where {scope} was expected")
        weights, depthwise = constants[0], operator.name != "CONV_2D"
        kernel = weights.ndim == 4 and (not depthwise or len(weights) == 1)
        _require(kernel, f"{scope} has weights of shape {weights.shape}")
        weights = weights.transpose(1, 2, 3, 0)
        num_channels = weights.shape[2 if depthwise else 3]
        biases = constants[1] if len(constants) > 1 else np.zeros(num_channels, np.float32)
        _require(biases.shape == (num_channels,), f"{scope} has biases of shape {biases.shape}")
        types = {weights.dtype.name, biases.dtype.name}
        _require(types == {"float32"}, f"{scope} has integers without a scale")
        return weights, biases

    def _dilated(self, before: Operator, after: Operator, scope: str) -> tuple[int, int]:
        """Returns the input and dilation of a convolution of a batch of subsampled images."""
        computed, sizes = self.operands(before)
        sizes += self.operands(after)[1]
        known = [each.shape for each in sizes] == [(2,), (2, 2)] * 2
        integers = all(each.dtype.kind == "i" for each in sizes)
        _require(computed and known and integers, f"{scope} is dilated in another way")
        (dilation, columns), pads, _, crops = sizes
        # As SAME pads 3x3. More rows and columns, to divide the size evenly, are removed after.
        same = dilation == columns and np.all(pads - crops == dilation)
        _require(same, f"{scope} is not padded as SAME")
        return computed[0], int(dilation)


@np.errstate(over="ignore", invalid="ignore")
def parse(content: memoryview) -> WeightsFile:
    """Returns the arrays of a TFLite file by TensorFlow's names, and settings from its graph.

    The names are SCOPE/weights [row, column, in, out], SCOPE/depthwise_weights [row, column,
    channel, 1] and SCOPE/biases; batch norm is folded in such files. 8-bit weights are dequantised.
    Float32 arrays are views of `content`.

    The settings are "output_stride"; "dilations", of the blocks' depthwise convolutions;
    "align_corners" of the resize of the logits, absent if they are not resized; "mean" and "std" by
    channel, so that the network reads (pixel / 255 - mean) / std; "input_size" (height, width); and
    "concat_order", the scopes of the branches in the order of their concatenation.

    Raises:
      Unreadable: The file is damaged, or holds another network; the message says which.
    """
    network = _Network(content)
    try:
        settings = _deeplab(network)
    except _NotDeepLab as error:
        counts = collections.Counter(operator.name for operator in network.operators)
        weights = [item(each.inputs, 1) for each in network.operators if each.name in _CONVS]
        names = [item(network.tensors, index).name.partition(";")[0] for index in weights]
        scopes = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
        raise Unreadable(
            "is a TFLite file, but not of TensorFlow's DeepLabv3 on MobileNetV2 (image pooling, no "
            f"atrous branches, no decoder): {error}. Its operators are "
            f"{listed([f'{count} {name}' for name, count in counts.most_common()])}; "
            f"the first scopes of its weights are {listed(scopes)}"
        ) from error
    arrays: dict[str, np.ndarray] = {}
    for scope, layer in reversed(network.layers.items()):
        kind = "weights" if layer.operator == "CONV_2D" else "depthwise_weights"
        arrays |= {f"{scope}/{kind}": layer.weights, f"{scope}/biases": layer.biases}
    for array in arrays.values():
        array.flags.writeable = False
    return WeightsFile(arrays, "TFLite", config=settings)


def _deeplab(network: _Network) -> dict[str, Any]:
    """Follows a network from its output to its input, adds its layers and returns its settings."""
    settings: dict[str, Any] = {}
    tensor = item(network.outputs, 0)
    while (operator := network.operator(tensor, "logits")).name in _AFTER_LOGITS:
        resized = item(network.tensors, tensor).shape
        tensor = network.source(operator)
        if operator.name == "RESIZE_BILINEAR" and resized != item(network.tensors, tensor).shape:
            corners, half_pixel_centers = (operator.options.number(each, "b") for each in (2, 3))
            _require(corners or half_pixel_centers, "its resize is TensorFlow 1's without corners")
            _require("align_corners" not in settings, "its logits are resized twice")
            settings["align_corners"] = bool(corners)
    tensor = network.layer(tensor, "logits/semantic", NONE)
    tensor = network.layer(tensor, "concat_projection", RELU)
    joined = network.operator(tensor, "CONCATENATION", "CONCATENATION")
    branches, _ = network.operands(joined)
    _require(len(branches) == 2, f"it concatenates {len(branches)} branches instead of 2")
    _require(joined.options.number(0, "i") in (3, -1), "it does not concatenate channels")
    pooled = [network.operator(each, "a branch").name == "RESIZE_BILINEAR" for each in branches]
    _require(sum(pooled) == 1, "not one of its branches is image pooling")
    settings["concat_order"] = tuple("image_pooling" if each else "aspp0" for each in pooled)
    resize = network.operator(branches[pooled.index(True)], "a resize")
    tensor = network.layer(network.source(resize), "image_pooling", RELU)
    shape = item(network.tensors, tensor).shape
    while (pool := network.operator(tensor, "image pooling", *_POOLED)).name in _LAYOUT:
        tensor = network.source(pool)
    _require(shape and math.prod(shape) == shape[-1], f"it pools images to shape {shape}")
    features = network.layer(branches[pooled.index(False)], "aspp0", RELU)
    _require(network.source(pool) == features, "its two branches have different inputs")
    tensor = _body(network, features, settings)
    _require([tensor] == network.inputs, "its first convolution does not read its only input")
    num_convs = sum(operator.name in _CONVS for operator in network.operators)
    _require(num_convs == len(network.layers), f"{num_convs} convolutions are too many")
    return settings | _input_settings(item(network.tensors, tensor))


def _body(network: _Network, tensor: int, settings: dict[str, Any]) -> int:
    """Follows MobileNetV2 from its features to its input, which it returns."""
    blocks: list[tuple[int, int]] = []  # strides and dilation, the last first
    for block in reversed(range(len(_BLOCK_STRIDES))):
        scope = f"MobilenetV2/expanded_conv{f'_{block}' if block else ''}"
        operator = network.operator(tensor, scope)
        addends = network.operands(operator)[0] if operator.name == "ADD" else []
        is_residual = len(addends) == 2  # otherwise it adds a bias
        tensor = network.layer(addends[0] if is_residual else tensor, f"{scope}/project", NONE)
        tensor = network.layer(tensor, f"{scope}/depthwise", RELU6, "DEPTHWISE_CONV_2D")
        first = depthwise = network.layers[f"{scope}/depthwise"]
        if block:
            tensor = network.layer(tensor, f"{scope}/expand", RELU6)
            first = network.layers[f"{scope}/expand"]
        out_channels = network.layers[f"{scope}/project"].weights.shape[3]
        expected = depthwise.strides == 1 and first.weights.shape[2] == out_channels
        correct = is_residual == expected and (not is_residual or addends[1] == tensor)
        _require(correct, f"{scope} does not add its input where MobileNetV2 does")
        blocks.append((depthwise.strides, depthwise.dilation))
    tensor = network.layer(tensor, "MobilenetV2/Conv", RELU6)

    # A removed stride becomes the dilation of the blocks after it.
    settings["output_stride"] = 2 * math.prod(strides for strides, _ in blocks)
    settings["dilations"] = tuple(dilation for _, dilation in reversed(blocks))
    stride, dilation, expected_blocks = 2, 1, []
    for strides in _BLOCK_STRIDES:
        removed = stride == settings["output_stride"]
        expected_blocks.append((1, dilation) if removed else (strides, 1))
        stride, dilation = (stride, dilation * strides) if removed else (stride * strides, 1)
    found = blocks[::-1]
    _require(found == expected_blocks, f"the strides and dilations of its blocks are {found}")
    for scope, layer in network.layers.items():
        strides = 2 if scope == "MobilenetV2/Conv" else 1
        same = layer.operator != "CONV_2D" or (layer.strides, layer.dilation) == (strides, 1)
        _require(same, f"{scope} has strides {layer.strides} and dilation {layer.dilation}")
    return tensor


def _input_settings(image: Tensor) -> dict[str, Any]:
    _require(len(image.shape) == 4 and image.shape[3] == 3, f"it reads shape {image.shape}")
    mean = std = 0.5  # the input of float32 is pixel * 2 / 255 - 1
    if image.dtype in ("|u1", "|i1"):
        _require(image.scale.size == 1 and image.scale[0] > 0, "its input has no scale")
        zero_point = int(image.zero_point.sum()) + (128 if image.dtype == "|i1" else 0)
        mean, std = zero_point / 255, 1 / (255 * float(image.scale[0]))
    else:
        _require(image.dtype == "<f4", "its input is not of float32, int8 or uint8")
    return {"mean": (mean,) * 3, "std": (std,) * 3, "input_size": image.shape[1:3]}
