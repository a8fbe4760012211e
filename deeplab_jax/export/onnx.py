"""ONNX export, as a graph of standard operators."""

from __future__ import annotations

import collections
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from deeplab_jax.export.program import Program
from deeplab_jax.models.ops.convolution import XLA
from deeplab_jax.utils.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGES = ("onnx", "onnxruntime")
# Axes of images, probabilities and logits, as indices of the axes in JAX.
LAYOUTS = {"nhwc": (0, 1, 2, 3), "nchw": (0, 3, 1, 2)}


def check(layout: str) -> None:
    """Raises UserError for an unknown layout, or if a package of the extra `onnx` is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"exporting to ONNX needs {' and '.join(missing)}: pip install 'deeplab-jax[onnx]'"
        )
    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def to_onnx(program: Program, layout: str = "nhwc") -> ModelProto:
    """Returns the program as an ONNX model that passed ONNX's checker.

    `layout` holds for the images and, except for ids, for the output: a name in `LAYOUTS`.

    Raises:
      UserError: an operation of the model has no rule. The message names its module.
    """
    import onnx
    from onnx import helper

    from deeplab_jax.export.onnx_graph import Constant, Graph, Tensor
    from deeplab_jax.export.onnx_lowering import lower

    images = program.images
    trace = jax.make_jaxpr(program.using(XLA))(program.variables, images)
    variables = [
        Constant(np.asarray(array), path[-1].key)
        for path, array in jax.tree_util.tree_leaves_with_path(program.variables)
    ]
    graph = Graph()
    argument = Tensor("images", images.shape, "")
    if layout == "nhwc":
        argument = graph.add("Transpose", ["images"], images.shape, "", perm=[0, 3, 1, 2])
    result: Any = lower(graph, trace.jaxpr, trace.consts, [*variables, argument])
    if layout == "nhwc" and len(result.shape) == 4:
        scope = result.scope
        result = graph.add("Transpose", [result.name], result.shape, scope, perm=[0, 2, 3, 1])

    def info(name: str, aval: Any) -> Any:
        axes = LAYOUTS[layout] if len(aval.shape) == 4 else range(len(aval.shape))
        sizes = [aval.shape[axis] for axis in axes]
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
        named = [size if isinstance(size, int) else str(size) for size in sizes]
        return helper.make_tensor_value_info(name, dtype, named)

    (output,) = trace.out_avals
    model = graph.model(info("images", images), info(program.output, output), result)
    facts = program.description | {"layout": layout}
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in facts.items()}
    helper.set_model_props(model, texts)
    onnx.checker.check_model(model, full_check=True)
    return model


def count_nodes(model: ModelProto) -> dict[str, int]:
    """Returns the number of nodes of each type, the most frequent first."""
    return dict(collections.Counter(node.op_type for node in model.graph.node).most_common())


def load(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Loads a file in onnxruntime on CPU, as a function of uint8 `[n, h, w, c]`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    layout = session.get_modelmeta().custom_metadata_map["layout"]

    def run(images: np.ndarray) -> np.ndarray:
        channels_last = layout == "nhwc"
        feed = images if channels_last else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        (result,) = session.run(None, {"images": feed})
        channels_first = result.ndim == 4 and not channels_last
        return result.transpose(0, 2, 3, 1) if channels_first else result

    return run
