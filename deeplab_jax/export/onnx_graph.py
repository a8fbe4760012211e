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
    """A value that depends on the images."""

    name: str  # in the graph
    # In the trace, with channels last; sizes may be symbolic. In the graph, the channels of a
    # tensor of rank 4 come second.
    shape: tuple[Any, ...]
    scope: str  # module that computes it, such as `backbone.layer4.0.conv2`
    index: int = 0  # number of the node that computes it, from 1; 0 for the images


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array that does not depend on the images, with the axes of the trace."""

    value: Any
    name: str = ""  # of the variable that it is computed from

    @property
    def scope(self) -> str:
        return self.name.rpartition(".")[0]


class Graph:
    """Nodes in the order of computation, named after their modules and types."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._name_counts: collections.Counter[str] = collections.Counter()
        self._first_maps: dict[str, str] = {}  # name of the first map of each height and width
        self._sides: dict[str, str] = {}  # name of each symbolic height and width

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
        if len(shape) == 4:
            self._first_maps.setdefault(str(shape[1:3]), name)
        return Tensor(name, shape, scope, len(self._nodes))

    def constant(self, value: np.ndarray, name: str) -> str:
        """Adds an initializer with the axes of the graph, and returns its unique name."""
        unique = self._unique(name)
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), unique))
        return unique

    def add_bias(self, tensor: Tensor, bias: Constant) -> bool:
        """Adds a bias to the convolution that computes a tensor; returns whether it could.

        It can if the convolution has no bias, and this one is one number per channel.
        """
        if tensor.index == 0:
            return False
        node = self._nodes[tensor.index - 1]
        if node.op_type != "Conv" or len(node.input) != 2:
            return False
        if bias.value.size != tensor.shape[3] or bias.value.shape[-1] != bias.value.size:
            return False
        node.input.append(self.constant(bias.value.reshape(-1), bias.name))
        return True

    def sides(self, shape: tuple[Any, ...], scope: str, *, before: Sequence[int] = ()) -> str:
        """Returns the name of int64 `[*before, height, width]` of a map.

        Symbolic sizes are read from the first map with the same height and width.
        """
        if not any(map(export.is_symbolic_dim, shape[1:3])):
            return self.constant(np.array([*before, *shape[1:3]], np.int64), f"{scope}/sides")
        key = str(shape[1:3])
        if key not in self._sides:
            inputs = [self._first_maps[key]]
            self._sides[key] = self.add("Shape", inputs, (2,), scope, start=2, end=4).name
        if not before:
            return self._sides[key]
        inputs = [self.constant(np.array(before, np.int64), f"{scope}/before"), self._sides[key]]
        return self.add("Concat", inputs, (len(before) + 2,), scope, axis=0).name

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
