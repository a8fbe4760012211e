"""An ONNX graph as it is written: nodes, initializers and unique names."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from jax import export
from onnx import helper, numpy_helper

OPSET = 18  # of onnxruntime 1.14 and later; its Resize takes the axes that are resized
IR_VERSION = 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value that depends on the images.

    Attributes:
      name: in the graph.
      shape: as in JAX, channels last; sizes may be left open. In the graph the channels of a
        shape of four come second.
      scope: module that it comes from, as in `backbone.layer4.0.conv2`.
      place: of the node that gives it, in the order of computation.
    """

    name: str
    shape: tuple[Any, ...]
    scope: str
    place: int = 0


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that does not: an array as in JAX, and the variable's name that it comes from."""

    value: Any
    name: str = ""

    @property
    def scope(self) -> str:
        return self.name.rpartition(".")[0]


class Graph:
    """Nodes in the order of computation, each named by its module and type."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._producers: dict[str, onnx.NodeProto] = {}
        self._taken: collections.Counter[str] = collections.Counter()
        self._maps: dict[str, str] = {}  # by height and width, the first of them
        self._sides: dict[str, str] = {}

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        shape: tuple[Any, ...],
        scope: str,
        **attributes: Any,
    ) -> Tensor:
        """A node and the tensor that it gives; convolutions have their module's plain name."""
        name = self._unique(scope if op_type == "Conv" else f"{scope}/{op_type}".lstrip("/"))
        node = helper.make_node(op_type, list(inputs), [name], name=name, **attributes)
        self._nodes.append(node)
        self._producers[name] = node
        if len(shape) == 4:
            self._maps.setdefault(str(shape[1:3]), name)
        return Tensor(name, shape, scope, len(self._nodes))

    def constant(self, value: np.ndarray, name: str) -> str:
        """An initializer of this array as it is."""
        unique = self._unique(name)
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), unique))
        return unique

    def add_bias(self, tensor: Tensor, bias: Constant) -> bool:
        """Makes `bias`, one number a channel, part of a convolution without one; whether it is."""
        node = self._producers.get(tensor.name)
        if node is None or node.op_type != "Conv" or len(node.input) != 2:
            return False
        if bias.value.size != tensor.shape[3] or bias.value.shape[-1] != bias.value.size:
            return False
        node.input.append(self.constant(bias.value.reshape(-1), bias.name))
        return True

    def sides(self, shape: tuple[Any, ...], scope: str) -> str:
        """Name of int64 `[2]`: height and width of a map's shape, constant where they are.

        Sizes left open are those of the first map of such a shape.
        """
        if not any(map(export.is_symbolic_dim, shape[1:3])):
            return self.constant(np.array(shape[1:3], np.int64), f"{scope}/sides")
        key = str(shape[1:3])
        if key not in self._sides:
            first = self._maps[key]
            self._sides[key] = self.add("Shape", [first], (2,), scope, start=2, end=4).name
        return self._sides[key]

    def spread(self, shape: tuple[Any, ...], scope: str) -> str:
        """Name of int64 `[1, 1, height, width]`, to which `Expand` spreads one number a channel."""
        if not any(map(export.is_symbolic_dim, shape[1:3])):
            return self.constant(np.array([1, 1, *shape[1:3]], np.int64), f"{scope}/spread")
        ones = self.constant(np.array([1, 1], np.int64), f"{scope}/ones")
        return self.add("Concat", [ones, self.sides(shape, scope)], (4,), scope, axis=0).name

    def model(
        self, images: onnx.ValueInfoProto, output: onnx.ValueInfoProto, result: Tensor
    ) -> onnx.ModelProto:
        """The graph whose output is this tensor, under the name that `output` says."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [output.name if name == result.name else name for name in names]
        graph = helper.make_graph(
            self._nodes, "deeplab", [images], [output], initializer=self._initializers
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="deeplab_jax",
        )

    def _unique(self, name: str) -> str:
        self._taken[name] += 1
        return name if self._taken[name] == 1 else self._unique(f"{name}_{self._taken[name]}")
