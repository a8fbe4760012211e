"""An ONNX graph under construction: nodes, initializers and unique names."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from jax import export
from onnx import helper, numpy_helper

OPSET = 18  # supported by onnxruntime 1.14 and later; the first whose Resize has `axes`
IR_VERSION = 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value that depends on the images.

    Attributes:
      name: name in the graph.
      shape: shape in the trace, with channels last; sizes may be symbolic. In the graph, the
        channels of a tensor of rank 4 come second.
      scope: module that computes it, such as `backbone.layer4.0.conv2`.
      index: position of the node that computes it, in the order of computation.
    """

    name: str
    shape: tuple[Any, ...]
    scope: str
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array that does not depend on the images, with the axes of the trace.

    Attributes:
      value: the array.
      name: name of the variable that it is computed from, or "".
    """

    value: Any
    name: str = ""

    @property
    def scope(self) -> str:
        return self.name.rpartition(".")[0]


class Graph:
    """Nodes in the order of computation, named after their modules and types."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._producers: dict[str, onnx.NodeProto] = {}
        self._name_counts: collections.Counter[str] = collections.Counter()
        self._first_maps: dict[str, str] = {}  # name of the first map of each height and width
        self._spatial_shapes: dict[str, str] = {}

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        shape: tuple[Any, ...],
        scope: str,
        **attributes: Any,
    ) -> Tensor:
        """Adds a node and returns its output. Convolutions are named as their modules."""
        name = self._unique(scope if op_type == "Conv" else f"{scope}/{op_type}".lstrip("/"))
        node = helper.make_node(op_type, list(inputs), [name], name=name, **attributes)
        self._nodes.append(node)
        self._producers[name] = node
        if len(shape) == 4:
            self._first_maps.setdefault(str(shape[1:3]), name)
        return Tensor(name, shape, scope, len(self._nodes))

    def constant(self, value: np.ndarray, name: str) -> str:
        """Adds an initializer with the axes of the graph, and returns its unique name."""
        unique = self._unique(name)
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), unique))
        return unique

    def add_bias(self, tensor: Tensor, bias: Constant) -> bool:
        """Adds a bias to the convolution that computes a tensor.

        Returns:
          Whether it was added: the tensor comes from a convolution without a bias, and `bias` is
          one number per channel.
        """
        node = self._producers.get(tensor.name)
        if node is None or node.op_type != "Conv" or len(node.input) != 2:
            return False
        if bias.value.size != tensor.shape[3] or bias.value.shape[-1] != bias.value.size:
            return False
        node.input.append(self.constant(bias.value.reshape(-1), bias.name))
        return True

    def spatial_shape(self, shape: tuple[Any, ...], scope: str) -> str:
        """Returns the name of int64 `[2]`, the height and width of a map.

        Symbolic sizes are read from the first map with the same height and width.
        """
        if not any(map(export.is_symbolic_dim, shape[1:3])):
            return self.constant(np.array(shape[1:3], np.int64), f"{scope}/sides")
        key = str(shape[1:3])
        if key not in self._spatial_shapes:
            inputs = [self._first_maps[key]]
            self._spatial_shapes[key] = self.add("Shape", inputs, (2,), scope, start=2, end=4).name
        return self._spatial_shapes[key]

    def expand_shape(self, shape: tuple[Any, ...], scope: str) -> str:
        """Returns the name of int64 `[1, 1, height, width]`, to expand one number per channel."""
        if not any(map(export.is_symbolic_dim, shape[1:3])):
            return self.constant(np.array([1, 1, *shape[1:3]], np.int64), f"{scope}/spread")
        ones = self.constant(np.array([1, 1], np.int64), f"{scope}/ones")
        inputs = [ones, self.spatial_shape(shape, scope)]
        return self.add("Concat", inputs, (4,), scope, axis=0).name

    def model(
        self, images: onnx.ValueInfoProto, output: onnx.ValueInfoProto, result: Tensor
    ) -> onnx.ModelProto:
        """Returns the model that computes a tensor, which is renamed to the name of `output`."""
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
        self._name_counts[name] += 1
        if self._name_counts[name] == 1:
            return name
        return self._unique(f"{name}_{self._name_counts[name]}")
