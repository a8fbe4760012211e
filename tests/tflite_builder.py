"""Writes small TFLite files of TensorFlow's DeepLabv3 on MobileNetV2, and of other networks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flatbuffers
import numpy as np

SAME, VALID = 0, 1
NONE, RELU, RELU6 = 0, 1, 3

# Code, the number of its options' type, and the kinds of the options' fields, by operator.
_OPERATORS = {
    "ADD": (0, 11, "b"),
    "AVERAGE_POOL_2D": (1, 5, "biiiib"),
    "CONCATENATION": (2, 10, "ib"),
    "CONV_2D": (3, 1, "biibii"),
    "DEPTHWISE_CONV_2D": (4, 2, "biiibii"),
    "DEQUANTIZE": (6, 38, ""),
    "FULLY_CONNECTED": (9, 8, "b"),
    "MUL": (18, 21, "b"),
    "RELU6": (21, 0, ""),
    "RESHAPE": (22, 17, ""),
    "RESIZE_BILINEAR": (23, 15, "iibb"),
    "BATCH_TO_SPACE_ND": (37, 24, ""),
    "SPACE_TO_BATCH_ND": (38, 25, ""),
    "ARG_MAX": (56, 40, "b"),
    "HARD_SWISH": (117, 0, ""),
}
_TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}
# Of MobileNetV2's blocks at width 0.25.
_CHANNELS = (8, 8, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 40, 40, 40, 80)
_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


@dataclasses.dataclass
class Tensor:
    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str = ""
    values: np.ndarray | None = None
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    axis: int = 0


class TFLiteFile:
    """Tensors and operators; `content` gives the file's bytes."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.operators: list[tuple[str, list[int], int, tuple[int, ...]]] = []

    def tensor(self, shape: tuple[int, ...], dtype: str = "float32", name: str = "", **more: Any):
        self.tensors.append(Tensor(tuple(shape), dtype, name, **more))
        return len(self.tensors) - 1

    def constant(self, values: Any, name: str = "", **quantization: Any) -> int:
        values = np.asarray(values)
        return self.tensor(values.shape, str(values.dtype), name, values=values, **quantization)

    def operator(self, name, inputs, shape, options=(), dtype="float32") -> int:
        output = self.tensor(shape, dtype)
        self.operators.append((name, list(inputs), output, tuple(options)))
        return output

    def content(self) -> bytes:
        builder = flatbuffers.Builder(1024)

        def vector(items, kind="i"):
            array = np.asarray(items, {"i": "<i4", "f": "<f4", "q": "<i8"}[kind])
            return builder.CreateNumpyVector(array)

        def tables(offsets):
            builder.StartVector(4, len(offsets), 4)
            for offset in reversed(offsets):
                builder.PrependUOffsetTRelative(offset)
            return builder.EndVector()

        def table(fields):
            builder.StartObject(max(fields, default=-1) + 1)
            for field, (kind, value) in fields.items():
                add = {
                    "b": builder.PrependInt8Slot,
                    "i": builder.PrependInt32Slot,
                    "t": builder.PrependUOffsetTRelativeSlot,
                }[kind]
                add(field, value, None if kind != "t" else 0)
            return builder.EndObject()

        buffers, tensors = [table({})], []
        for each in self.tensors:
            number = 0
            if each.values is not None:
                raw = np.frombuffer(each.values.tobytes(), np.uint8)
                builder.StartVector(1, len(raw), 16)
                builder.head -= len(raw)
                builder.Bytes[builder.head : builder.head + len(raw)] = raw.tobytes()
                number = len(buffers)
                buffers.append(table({0: ("t", builder.EndVector())}))
            quantization = {}
            if each.scale:
                quantization[2] = ("t", vector(each.scale, "f"))
                quantization[3] = ("t", vector(each.zero_point, "q"))
                quantization[6] = ("i", each.axis)
            fields = {0: ("t", vector(each.shape)), 1: ("b", _TYPES[each.dtype])}
            fields |= {2: ("i", number), 3: ("t", builder.CreateString(each.name))}
            fields[4] = ("t", table(quantization))
            tensors.append(table(fields))
        names = list(dict.fromkeys(name for name, *_ in self.operators))
        operators = []
        for name, inputs, output, options in self.operators:
            _, kind, kinds = _OPERATORS[name]
            fields = {0: ("i", names.index(name)), 1: ("t", vector(inputs))}
            fields |= {2: ("t", vector([output]))}
            if kind:
                numbers = enumerate(zip(kinds, options, strict=False))
                fields |= {3: ("b", kind), 4: ("t", table(dict(numbers)))}
            operators.append(table(fields))
        codes = [
            table(
                {
                    0: ("b", min(_OPERATORS[name][0], 127)),
                    2: ("i", 2),
                    3: ("i", _OPERATORS[name][0]),
                }
            )
            for name in names
        ]
        graph = {0: ("t", tables(tensors)), 1: ("t", vector([0]))}
        graph |= {2: ("t", vector([self.operators[-1][2]])), 3: ("t", tables(operators))}
        model = {0: ("i", 3), 1: ("t", tables(codes)), 2: ("t", tables([table(graph)]))}
        model |= {4: ("t", tables(buffers))}
        builder.Finish(table(model), file_identifier=b"TFL3")
        return bytes(builder.Output())


class DeepLab(TFLiteFile):
    """A DeepLab with MobileNetV2 of width 0.25; `arrays` are those that its reader must return.

    Args:
      kind: "float32", "float16" (with DEQUANTIZE operators) or "int8" (per channel).
      output_stride: 8, 16 or 32.
      batched: Whether dilated convolutions are written as in older files: SPACE_TO_BATCH_ND, a
        convolution, BATCH_TO_SPACE_ND, then MUL and ADD of a batch norm, and RELU6.
      changes: Scope: what its convolution has instead; see `conv`.
    """

    def __init__(
        self, kind="float32", output_stride=16, batched=False, size=65, **more: Any
    ) -> None:
        super().__init__()
        self.kind, self.batched, self.arrays = kind, batched, {}
        self.changes = more.get("changes", {})
        self.random = np.random.default_rng(3)
        input_type = {"scale": (1 / 128,), "zero_point": (0,)} if kind == "int8" else {}
        dtype = "int8" if kind == "int8" else "float32"
        x = self.tensor((1, size, size, 3), dtype, "input", **input_type)
        x = self.conv("MobilenetV2/Conv", x, 8, 3, strides=2, activation=RELU6)
        stride, rate = 2, 1
        for block, nominal in enumerate(_STRIDES):
            removed = stride == output_stride
            strides, dilation = (1, rate) if removed else (nominal, 1)
            stride, rate = (stride, rate * nominal) if removed else (stride * nominal, rate)
            scope = f"MobilenetV2/expanded_conv{f'_{block}' if block else ''}"
            start, channels = x, _CHANNELS[block]
            if block:
                width = self.tensors[x].shape[3] * 6
                x = self.conv(f"{scope}/expand", x, width, activation=RELU6)
            x = self.depthwise(f"{scope}/depthwise", x, strides, dilation)
            x = self.conv(f"{scope}/project", x, channels)
            if strides == 1 and self.tensors[x].shape == self.tensors[start].shape:
                x = self.operator("ADD", [x, start], self.tensors[x].shape, [NONE])
        self.head(x, size, **more)

    def head(self, x, size, aspp_first=False, corners=1, branches=0, **_):
        side = self.tensors[x].shape[1]
        pooled = self.operator(
            "AVERAGE_POOL_2D", [x], (1, 1, 1, _CHANNELS[-1]), [VALID, side, side, side, side, NONE]
        )
        pooled = self.conv("image_pooling", pooled, 8, activation=RELU)
        sizes = self.constant(np.int32([side, side]))
        options = [0, 0, corners, 0]
        pooled = self.operator("RESIZE_BILINEAR", [pooled, sizes], (1, side, side, 8), options)
        joined = [pooled, self.conv("aspp0", x, 8, activation=RELU)]
        joined += [self.conv(f"aspp{i + 1}", x, 8, activation=RELU) for i in range(branches)]
        joined = joined[::-1] if aspp_first else joined
        x = self.operator("CONCATENATION", joined, (1, side, side, 8 * len(joined)), [3, NONE])
        x = self.conv("concat_projection", x, 8, activation=RELU)
        x = self.conv("logits/semantic", x, 5)
        x = self.operator("RESIZE_BILINEAR", [x, sizes], self.tensors[x].shape, options)
        sizes = self.constant(np.int32([size, size]))
        x = self.operator("RESIZE_BILINEAR", [x, sizes], (1, size, size, 5), options)
        self.operator("ARG_MAX", [x, self.constant(np.int32(3))], (1, size, size), [4], "int64")

    def conv(self, scope, x, out, kernel=1, strides=1, activation=NONE):
        shape = self.tensors[x].shape
        weights = self.random.normal(size=(out, kernel, kernel, shape[3])) / math.sqrt(shape[3])
        change = self.changes.get(scope, {})
        activation = change.get("activation", activation)
        strides, padding = change.get("strides", strides), change.get("padding", SAME)
        inputs = [x, *self.parameters(scope, "weights", weights, 0, change.get("name", scope))]
        side = -(-shape[1] // strides)
        options = [padding, strides, strides, activation, 1, 1]
        return self.operator("CONV_2D", inputs, (1, side, side, out), options)

    def depthwise(self, scope, x, strides, dilation):
        shape = self.tensors[x].shape
        weights = self.random.normal(size=(1, 3, 3, shape[3]))
        change = self.changes.get(scope, {})
        dilation = change.get("dilation", dilation)
        inputs = self.parameters(scope, "depthwise_weights", weights, 3, change.get("name", scope))
        side = -(-shape[1] // strides)
        out = (1, side, side, shape[3])
        if dilation == 1 or not self.batched:
            options = [SAME, strides, strides, 1, RELU6, dilation, dilation]
            return self.operator("DEPTHWISE_CONV_2D", [x, *inputs], out, options)
        more = -side % dilation
        block = self.constant(np.int32([dilation, dilation]))
        pads = self.constant(np.int32([[dilation, dilation + more]] * 2))
        crops = self.constant(np.int32([[0, more]] * 2))
        small = (side + more) // dilation
        batch = (dilation**2, small + 2, small + 2, shape[3])
        x = self.operator("SPACE_TO_BATCH_ND", [x, block, pads], batch)
        batch = (dilation**2, small, small, shape[3])
        x = self.operator("DEPTHWISE_CONV_2D", [x, *inputs], batch, [VALID, 1, 1, 1, NONE, 1, 1])
        x = self.operator("BATCH_TO_SPACE_ND", [x, block, crops], out)
        scale, shift = self.random.normal(size=(2, shape[3])).astype(np.float32)
        x = self.operator("MUL", [self.constant(scale), x], out, [NONE])
        x = self.operator("ADD", [x, self.constant(shift)], out, [NONE])
        kernel, biases = (
            self.arrays[f"{scope}/{each}"] for each in ("depthwise_weights", "biases")
        )
        self.arrays[f"{scope}/depthwise_weights"] = kernel * scale[:, None]
        self.arrays[f"{scope}/biases"] = biases * scale + shift
        return self.operator("RELU6", [x], out)

    def parameters(self, scope, leaf, weights, axis, name) -> list[int]:
        """Returns the tensors of weights and biases, and notes the arrays that they stand for."""
        biases = self.random.normal(size=weights.shape[axis])
        name = f"MobilenetV2/expanded_conv_9/project/Conv2D_Fold;{name}/{leaf}"
        if self.kind == "int8":
            scale = np.float32(0.01 + self.random.random(len(biases)) / 50)
            broadcast = scale.reshape([-1 if i == axis else 1 for i in range(4)])
            weights = np.clip(np.round(weights / broadcast), -127, 127).astype(np.int8)
            biases = np.round(biases / scale * 100).astype(np.int32)
            more = {"scale": tuple(scale), "zero_point": (0,) * len(scale)}
            tensors = [self.constant(weights, name, axis=axis, **more)]
            finer = tuple(np.float32(scale / 100))
            tensors += [self.constant(biases, **(more | {"scale": finer}))]
            values = weights * np.float64(broadcast), biases * np.float64(finer)
        else:
            values = [each.astype(self.kind) for each in (weights, biases)]
            tensors = [self.constant(values[0], name), self.constant(values[1])]
            if self.kind == "float16":
                tensors = [
                    self.operator("DEQUANTIZE", [each], self.tensors[each].shape)
                    for each in tensors
                ]
        weights, self.arrays[f"{scope}/biases"] = (each.astype(np.float32) for each in values)
        self.arrays[f"{scope}/{leaf}"] = np.transpose(weights, (1, 2, 3, 0))
        return tensors


def classifier() -> bytes:
    """A MobileNet of two convolutions and a fully connected layer, with an activation of v3."""
    file = TFLiteFile()
    x = file.tensor((1, 32, 32, 3))
    for scope, shape in [("MobilenetV3/Conv", (32, 32, 3)), ("MobilenetV3/Conv_1", (16, 16, 8))]:
        weights = file.constant(np.ones((8, 3, 3, shape[2]), np.float32), f"{scope}/weights")
        biases = file.constant(np.zeros(8, np.float32))
        out = (1, shape[0] // 2, shape[1] // 2, 8)
        x = file.operator("CONV_2D", [x, weights, biases], out, [SAME, 2, 2, NONE, 1, 1])
        x = file.operator("HARD_SWISH", [x], out)
    weights = file.constant(np.ones((4, 512), np.float32), "MobilenetV3/Logits/weights")
    file.operator("FULLY_CONNECTED", [x, weights], (1, 4), [NONE])
    return file.content()
