"""Reads TFLite files of TensorFlow's DeepLabv3 on MobileNetV2, without TensorFlow.

Such a file is a flatbuffer, tables that refer to each other by offsets, and holds operators, not
variables. They are followed from the output to the input and compared with those of TensorFlow's
`research/deeplab`. A convolution's place in the network gives its scope, which the name of its
weights must confirm. A damaged file is refused at a cost linear in its size.

Format: `tensorflow/lite/schema/schema.fbs`; the numbers of fields are those of its tables.
Network: `slim/nets/mobilenet/mobilenet_v2.py` and `deeplab/model.py` of TensorFlow's models.
"""

from __future__ import annotations

import collections
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.utils.errors import listed
from deeplab_jax.weights.torch_file import WeightsFile
from deeplab_jax.weights.torch_format.pickle_reader import Unreadable

# What a damaged file makes the functions here raise.
_DAMAGE = (struct.error, ValueError, TypeError, LookupError, ArithmeticError)
_MAX_TABLES = 100_000  # in a list; DeepLab has about 190 tensors and 75 operators
_NO_TENSOR = 2**32 - 1  # of an operator without one of its inputs

# Operators by their code.
_CODES = """
0:ADD 1:AVERAGE_POOL_2D 2:CONCATENATION 3:CONV_2D 4:DEPTHWISE_CONV_2D 6:DEQUANTIZE 9:FULLY_CONNECTED
18:MUL 19:RELU 21:RELU6 22:RESHAPE 23:RESIZE_BILINEAR 25:SOFTMAX 37:BATCH_TO_SPACE_ND
38:SPACE_TO_BATCH_ND 40:MEAN 43:SQUEEZE 45:STRIDED_SLICE 53:CAST 56:ARG_MAX 65:SLICE 70:EXPAND_DIMS
114:QUANTIZE
"""
_OPERATORS = {int(code): name for code, name in (each.split(":") for each in _CODES.split())}
# The number of an operator's field for its fused activation.
_ACTIVATION_FIELD = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 4, "ADD": 0, "MUL": 0}
_NONE, _RELU, _RELU6 = 0, 1, 3  # activations
_SAME, _VALID = 0, 1  # padding
_TYPES = {0: "<f4", 1: "<f2", 2: "<i4", 3: "|u1", 4: "<i8", 9: "|i1"}  # of a tensor's elements

_LEAVES = {"CONV_2D": "weights", "DEPTHWISE_CONV_2D": "depthwise_weights"}
# Those that belong to the layer before: its dilation, batch norm, bias and activation.
_MERGED = ("BATCH_TO_SPACE_ND", "MUL", "ADD", "RELU", "RELU6")
_MAX_MERGED = 4
_AFTER_LOGITS = (
    *("RESIZE_BILINEAR", "ARG_MAX", "SOFTMAX", "CAST"),
    *("SLICE", "STRIDED_SLICE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS"),
)
# Of MobileNetV2's blocks `expanded_conv`, `expanded_conv_1`, ... where no stride is removed.
_BLOCK_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_SCOPES = [f"MobilenetV2/expanded_conv{f'_{i}' if i else ''}" for i in range(len(_BLOCK_STRIDES))]


class _NotDeepLab(Exception):
    """The file is in order but holds another network; the message says where they differ."""


def _require(condition: object, difference: str) -> None:
    if not condition:
        raise _NotDeepLab(difference)


# The flatbuffer


class _Data:
    """The bytes of a file. The vectors read from them are limited in length together."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.left = 2 * len(content) + 2**16

    def number(self, position: int, code: str) -> int:
        return int(struct.unpack_from(f"<{code}", self.content, position)[0])

    def vector(self, position: int, dtype: str) -> np.ndarray:
        count = self.number(position, "I")
        self.left -= count * np.dtype(dtype).itemsize
        if self.left < 0:
            raise ValueError("its vectors overlap")
        return np.frombuffer(self.content, dtype, count, position + 4)


class _Table(NamedTuple):
    """A table of a flatbuffer. Its fields have numbers, and may be absent."""

    data: _Data
    position: int

    def _find(self, field: int) -> int:
        vtable = self.position - self.data.number(self.position, "i")
        known = 4 + 2 * field < self.data.number(vtable, "H")
        offset = self.data.number(vtable + 4 + 2 * field, "H") if known else 0
        return self.position + offset if offset else 0

    def number(self, field: int, code: str, default: int = 0) -> int:
        return self.data.number(at, code) if (at := self._find(field)) else default

    def table(self, field: int) -> _Table | None:
        at = self._find(field)
        return _Table(self.data, at + self.data.number(at, "I")) if at else None

    def vector(self, field: int, dtype: str) -> np.ndarray:
        target = self.table(field)
        return self.data.vector(target.position, dtype) if target else np.zeros(0, dtype)

    def tables(self, field: int) -> list[_Table]:
        target, offsets = self.table(field), self.vector(field, "<u4").tolist()
        if len(offsets) > _MAX_TABLES:
            raise ValueError(f"it has {len(offsets)} tensors or operators")
        start = target.position + 4 if target else 0
        return [_Table(self.data, start + 4 * i + offset) for i, offset in enumerate(offsets)]


class _Tensor:
    """A tensor's shape, type, name and scale; `buffer` is the number of its constant values."""

    def __init__(self, table: _Table) -> None:
        self.shape = tuple(table.vector(0, "<i4").tolist())
        self.dtype = _TYPES.get(table.number(1, "b"))
        self.buffer = table.number(2, "I")
        self.name = table.vector(3, "|u1").tobytes().decode(errors="replace")
        self.scale, self.zero_point, self.axis = np.zeros(0), np.zeros(0, np.int64), 0
        if quantization := table.table(4):
            self.scale = quantization.vector(2, "<f4").astype(np.float64)
            self.zero_point = quantization.vector(3, "<i8")
            self.axis = quantization.number(6, "i")  # that has a scale for each index

    def values(self, raw: np.ndarray) -> np.ndarray:
        """Returns the tensor of these bytes: float32, or integers if it has no scale."""
        if self.dtype is None:
            raise Unreadable(f"holds {self.name[:200]} in a type that is not read")
        values = raw.view(self.dtype).reshape(self.shape)
        if values.dtype.kind == "f":
            return values.astype(np.float32, copy=False)
        if self.scale.size == 0:
            return values
        channels = [n if axis == self.axis else 1 for axis, n in enumerate(self.shape)]
        scale, zero_point = (
            each if each.size == 1 else each.reshape(channels)
            for each in (self.scale, self.zero_point)
        )
        return np.asarray(scale * (values - zero_point), np.float32)


class _Operator:
    """An operator with the numbers of its tensors, and its activation, fused or its own."""

    def __init__(self, table: _Table, codes: list[_Table]) -> None:
        code, self._options = codes[table.number(0, "I")], table.table(4)
        # Codes above 127 have a field of their own.
        number = max(code.number(0, "b"), code.number(3, "i"))
        self.name = _OPERATORS.get(number, f"operator {number}")
        self.inputs = [i for i in table.vector(1, "<u4").tolist() if i != _NO_TENSOR]
        self.outputs = table.vector(2, "<u4").tolist()
        self.activation = {"RELU": _RELU, "RELU6": _RELU6}.get(self.name, _NONE)
        if self.name in _ACTIVATION_FIELD:
            self.activation = self.option(_ACTIVATION_FIELD[self.name], "b")

    def option(self, field: int, code: str, default: int = 0) -> int:
        return self._options.number(field, code, default) if self._options else default


# The network


class _Layer(NamedTuple):
    leaf: str
    weights: np.ndarray  # [row, column, in, out]; depthwise: [row, column, channel, 1]
    biases: np.ndarray
    strides: int
    dilation: int


class _Network:
    """A file's first graph, followed from its output to its input, and the layers found so far."""

    def __init__(self, content: memoryview) -> None:
        data = _Data(content)
        model = _Table(data, data.number(0, "I"))
        graph, codes = model.tables(2)[0], model.tables(1)
        self.tensors = [_Tensor(table) for table in graph.tables(0)]
        self.inputs, self.outputs = (graph.vector(i, "<u4").tolist() for i in (1, 2))
        self.operators = [_Operator(table, codes) for table in graph.tables(3)]
        self.buffers = model.tables(4)
        self.layers: dict[str, _Layer] = {}
        self._constants: dict[int, np.ndarray | None] = {}
        self.producers: dict[int, _Operator] = {}
        used: set[int] = set()
        for operator in self.operators:
            used.update(operator.inputs)
            if not used.isdisjoint(operator.outputs):  # a cycle, which could be followed forever
                raise ValueError("an operator's input is computed later")
            self.producers |= dict.fromkeys(operator.outputs, operator)

    def origin(self, tensor: int) -> int:
        """Returns the tensor that this one was converted from, to another type or scale."""
        while (operator := self.producers.get(tensor)) and "QUANTIZE" in operator.name:
            tensor = operator.inputs[0]
        return tensor

    def constant(self, tensor: int) -> np.ndarray | None:
        """Returns a tensor's values; None if it is computed."""
        tensor = self.origin(tensor)
        if tensor not in self._constants:
            found = self.tensors[tensor]
            raw = self.buffers[found.buffer].vector(0, "|u1")
            self._constants[tensor] = found.values(raw) if raw.size else None
        return self._constants[tensor]

    def operands(self, operator: _Operator) -> tuple[list[int], list[np.ndarray]]:
        """Returns an operator's computed inputs and the values of its constant ones."""
        values = [self.constant(index) for index in operator.inputs]
        computed = [i for i, value in zip(operator.inputs, values, strict=True) if value is None]
        return [self.origin(i) for i in computed], [each for each in values if each is not None]

    def source(self, operator: _Operator) -> int:
        """Returns an operator's first input."""
        return self.origin(operator.inputs[0])

    def operator(self, tensor: int, expected: str, *names: str) -> _Operator:
        """Returns the operator that computes a tensor, which must have one of these names."""
        operator = self.producers.get(self.origin(tensor))
        if operator is None or (names and operator.name not in names):
            found = operator.name if operator else "the input"
            raise _NotDeepLab(f"it has {found} where {expected} was expected")
        return operator

    def layer(self, tensor: int, scope: str, activation: int, name: str = "CONV_2D") -> int:
        """Adds the layer of a scope, which must compute this tensor, and returns its input."""
        merged: list[_Operator] = []  # the last first
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
        dilation = operator.option(_ACTIVATION_FIELD[name] + 1, "i", 1)
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

    def _arrays(self, operator: _Operator, scope: str) -> tuple[np.ndarray, np.ndarray]:
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
    except _DAMAGE as error:
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
    return WeightsFile(arrays, settings)


def _deeplab(network: _Network) -> dict[str, Any]:
    """Follows a network from its output to its input, adds its layers and returns its settings."""
    tensor = network.outputs[0]
    while (operator := network.operator(tensor, "logits")).name in _AFTER_LOGITS:
        aligned = operator.name != "RESIZE_BILINEAR" or operator.option(2, "b")
        _require(aligned, "its logits are resized without aligned corners")
        tensor = network.source(operator)
    tensor = network.layer(tensor, "logits/semantic", _NONE)
    tensor = network.layer(tensor, "concat_projection", _RELU)
    joined = network.operator(tensor, "CONCATENATION", "CONCATENATION")
    branches, _ = network.operands(joined)
    _require(len(branches) == 2, f"it concatenates {len(branches)} branches instead of 2")
    resize = network.operator(branches[0], "image pooling", "RESIZE_BILINEAR")
    tensor = network.layer(network.source(resize), "image_pooling", _RELU)
    pool = network.operator(tensor, "image pooling", "AVERAGE_POOL_2D", "MEAN")
    shape = network.tensors[tensor].shape
    _require(math.prod(shape[:-1]) == 1, f"it pools images to shape {shape}")
    features = network.layer(branches[1], "aspp0", _RELU)
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
        tensor = network.layer(addends[0] if is_residual else tensor, f"{scope}/project", _NONE)
        tensor = network.layer(tensor, f"{scope}/depthwise", _RELU6, "DEPTHWISE_CONV_2D")
        first = depthwise = network.layers[f"{scope}/depthwise"]
        if scope != _SCOPES[0]:
            tensor = network.layer(tensor, f"{scope}/expand", _RELU6)
            first = network.layers[f"{scope}/expand"]
        out_channels = network.layers[f"{scope}/project"].weights.shape[3]
        expected = depthwise.strides == 1 and first.weights.shape[2] == out_channels
        correct = is_residual == expected and (not is_residual or addends[1] == tensor)
        _require(correct, f"{scope} does not add its input where MobileNetV2 does")
    return network.layer(tensor, "MobilenetV2/Conv", _RELU6)


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


def _normalization(image: _Tensor) -> dict[str, Any]:
    """Returns the mean and std of an input; those of float32 give pixel * 2 / 255 - 1."""
    mean = std = 0.5
    if image.scale.size:
        zero_point, scale = int(image.zero_point[0]), float(image.scale[0])
        _require(0 < scale < math.inf, f"its input has the scale {scale}")
        zero_point += 128 if image.dtype == "|i1" else 0
        mean, std = zero_point / 255, 1 / (255 * scale)
    return {"mean": (mean,) * 3, "std": (std,) * 3}
