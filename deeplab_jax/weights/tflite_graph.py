"""Reads the graph of a TFLite file without TensorFlow: its tensors, operators and constants.

A TFLite file is a flatbuffer: tables that refer to each other by offsets. A damaged one makes the
functions here raise one of `DAMAGE`, at a cost linear in the file's size.

Format: `tensorflow/lite/schema/schema.fbs`; the numbers of fields are those of its tables.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from deeplab_jax.weights.torch_format.pickle_reader import Unreadable

DAMAGE = (struct.error, ValueError, TypeError, LookupError, ArithmeticError)
_MAX_TABLES = 100_000  # in a vector of tables; DeepLab has about 190 tensors and 75 operators
_NO_TENSOR = 2**32 - 1  # of an operator without one of its inputs

# Operators by their code. Others are only counted, for the error message.
_CODES = """
0:ADD 1:AVERAGE_POOL_2D 2:CONCATENATION 3:CONV_2D 4:DEPTHWISE_CONV_2D 6:DEQUANTIZE 9:FULLY_CONNECTED
14:LOGISTIC 17:MAX_POOL_2D 18:MUL 19:RELU 21:RELU6 22:RESHAPE 23:RESIZE_BILINEAR 25:SOFTMAX
32:CUSTOM 34:PAD 37:BATCH_TO_SPACE_ND 38:SPACE_TO_BATCH_ND 40:MEAN 41:SUB 43:SQUEEZE
45:STRIDED_SLICE 53:CAST 56:ARG_MAX 65:SLICE 70:EXPAND_DIMS 77:SHAPE 83:PACK 114:QUANTIZE
"""
_OPERATORS = {int(code): name for code, name in (each.split(":") for each in _CODES.split())}
# The number of an operator's field for its fused activation.
ACTIVATION_FIELD = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 4, "ADD": 0, "MUL": 0}
NONE, RELU, RELU6 = 0, 1, 3  # activations
_TYPES = {0: "<f4", 1: "<f2", 2: "<i4", 3: "|u1", 4: "<i8", 9: "|i1"}  # of a tensor's elements


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


class Tensor:
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


class Operator:
    """An operator with the numbers of its tensors, and its activation, fused or its own."""

    def __init__(self, table: _Table, codes: list[_Table]) -> None:
        code, self._options = codes[table.number(0, "I")], table.table(4)
        # Codes above 127 have a field of their own.
        number = max(code.number(0, "b"), code.number(3, "i"))
        self.name = _OPERATORS.get(number, f"operator {number}")
        self.inputs = [i for i in table.vector(1, "<u4").tolist() if i != _NO_TENSOR]
        self.outputs = table.vector(2, "<u4").tolist()
        self.activation = {"RELU": RELU, "RELU6": RELU6}.get(self.name, NONE)
        if self.name in ACTIVATION_FIELD:
            self.activation = self.option(ACTIVATION_FIELD[self.name], "b")

    def option(self, field: int, code: str, default: int = 0) -> int:
        return self._options.number(field, code, default) if self._options else default


class Graph:
    """The operators, tensors and constants of a file's first graph."""

    def __init__(self, content: memoryview) -> None:
        data = _Data(content)
        model = _Table(data, data.number(0, "I"))
        graph, codes = model.tables(2)[0], model.tables(1)
        self.tensors = [Tensor(table) for table in graph.tables(0)]
        self.inputs, self.outputs = (graph.vector(i, "<u4").tolist() for i in (1, 2))
        self.operators = [Operator(table, codes) for table in graph.tables(3)]
        self.buffers = model.tables(4)
        self._constants: dict[int, np.ndarray | None] = {}
        self.producers: dict[int, Operator] = {}
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

    def operands(self, operator: Operator) -> tuple[list[int], list[np.ndarray]]:
        """Returns an operator's computed inputs and the values of its constant ones."""
        values = [self.constant(index) for index in operator.inputs]
        computed = [i for i, value in zip(operator.inputs, values, strict=True) if value is None]
        return [self.origin(i) for i in computed], [each for each in values if each is not None]

    def source(self, operator: Operator) -> int:
        """Returns an operator's first input."""
        return self.origin(operator.inputs[0])
