"""ONNX files in float16, or in int8 with ranges from images, compared with the float32 file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
import time
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

from deeplab_jax import data
from deeplab_jax.config import io as config_io
from deeplab_jax.data.dataset import read_example
from deeplab_jax.data.io.images import SUFFIXES, read_image
from deeplab_jax.export import onnx as runtime
from deeplab_jax.export.compare import pictures
from deeplab_jax.export.program import Dimensions, Program
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.files import find_files, is_own_picture

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

PRECISIONS = ("float16", "int8")
# Values above half of float16's largest stay in float32: other images may give larger ones.
LARGEST = 65504 / 2
SIDE = 1025  # pixels; of larger images the middle is used, which bounds the memory

Images = list[UInt8[np.ndarray, "n h w c"]]


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """A lower precision of an ONNX file, and what it may cost."""

    precision: str  # a name in `PRECISIONS`
    # Folder of images, or a split of the data of the checkpoint's run. float16 does without:
    # generated pictures show where its range is too small.
    images: str = ""
    # Number of images from which the ranges of the feature maps are measured. As many others, if
    # there are any, are compared.
    num_calibration: int = 32
    max_changed: float = 0.02  # largest share of pixels that may change class, 0..1


class Change(NamedTuple):
    """How a file of lower precision differs from the float32 file."""

    changed: float  # share of pixels with another class, or with a result that is not finite
    num_images: int  # that were compared
    held_out: bool  # whether they are others than those that the ranges come from
    num_bytes: tuple[int, int]  # of both files, float32 first
    seconds: tuple[float, float]  # median per image in onnxruntime on this machine's CPU


def check(wanted: Quantisation, path: pathlib.Path) -> None:
    """Raises UserError if the precision, its settings or the format of the file is wrong."""
    if wanted.precision not in PRECISIONS:
        known = ("float32", *PRECISIONS)
        raise UserError(
            f"precision must be one of {', '.join(known)}, got {wanted.precision!r}"
            + did_you_mean(wanted.precision, known)
        )
    if path.suffix != ".onnx":
        raise UserError(
            f"{wanted.precision} needs an ONNX file, got {path}: a StableHLO file computes in the "
            "model's float32. Give OUT.onnx, or leave out the precision"
        )
    if wanted.precision == "int8" and not wanted.images:
        raise UserError(
            "int8 needs calibration images: a folder of images like those that the model will see, "
            "or a split of the run's data, such as train"
        )
    if wanted.num_calibration < 1 or not 0 <= wanted.max_changed <= 1:
        raise UserError(f"num_calibration must be 1 or more, and max_changed 0 to 1, got {wanted}")


def read_images(
    wanted: Quantisation, checkpoint: str | os.PathLike[str], program: Program
) -> tuple[Images, Images]:
    """Reads images to measure ranges and, if there are enough, other ones to compare.

    They are drawn from the folder or split, always the same ones. Where the program has a fixed
    size, they are resized to it; for a fixed batch, each is repeated.

    Raises:
      UserError: there are no images, one cannot be read, or there is no such split.
    """
    channels, source = program.model.architecture.in_channels, wanted.images
    if not source:
        return [images for _, images in pictures(program)], []
    if os.path.isdir(source):
        found = find_files(pathlib.Path(source))
        files = [f for f in found if f.suffix.lower() in SUFFIXES and not is_own_picture(f)]
        total, read = len(files), lambda i: read_image(files[i], channels, upright=True)
    else:
        run = config_io.from_run(checkpoint)
        if run is None:
            raise UserError(
                f"there is no folder {source}, and {checkpoint} belongs to no run that has a split "
                "of this name: give a folder of calibration images"
            )
        try:
            dataset = data.load(run.data, source)
        except UserError as error:
            raise UserError(f"there is no folder {source}, and as a split: {error}") from None
        total, read = len(dataset.source), lambda i: read_example(dataset, i)["image"]
    if not total:
        raise UserError(f"{source} contains no images to calibrate with")
    chosen = np.random.default_rng(0).permutation(total)[: 2 * wanted.num_calibration]
    images = [_fit(read(int(i)), program.dimensions) for i in chosen]
    return images[: wanted.num_calibration], images[wanted.num_calibration :]


def _fit(image: UInt8[np.ndarray, "h w c"], dimensions: Dimensions) -> UInt8[np.ndarray, "n h w c"]:
    batch, height, width = dimensions
    top, left = (max(0, side - SIDE) // 2 for side in image.shape[:2])
    image = image[top:, left:][:SIDE, :SIDE]
    size = (width or image.shape[1], height or image.shape[0])
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.repeat(resized.reshape(1, size[1], size[0], -1), batch or 1, axis=0)


def quantise(path: pathlib.Path, precision: str, calibration: Images, others: Images) -> Change:
    """Replaces a float32 file by one of lower precision, and compares them.

    Ranges come from the images `calibration`. The files are compared on `others`, or on
    `calibration` if there are none.
    """
    import onnx
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    runs, sizes = [runtime.load(path)], [path.stat().st_size]
    model = onnx.load(path)
    # Else onnxruntime advises a fusion of batch norms, which the file has already.
    add_pre_process_metadata(model)
    is_nhwc = {one.key: one.value for one in model.metadata_props}["layout"] == "nhwc"
    feeds = (
        {"images": x if is_nhwc else np.ascontiguousarray(x.transpose(0, 3, 1, 2))}
        for x in calibration
    )
    reader: Any = types.SimpleNamespace(get_next=lambda: next(feeds, None))
    (_to_int8 if precision == "int8" else _to_float16)(model, path, reader)
    runs.append(runtime.load(path))
    sizes.append(path.stat().st_size)
    compared = others or calibration
    num_changed, num_pixels, seconds = 0, 0, np.empty((2, len(compared)))
    for run in runs:
        run(compared[0])  # the first run allocates memory
    for index, images in enumerate(compared):
        results = []
        for which, run in enumerate(runs):
            start = time.perf_counter()
            results.append(run(images))
            seconds[which, index] = (time.perf_counter() - start) / len(images)
        expected, result = results
        wrong = np.zeros((), bool)
        if expected.ndim == 4:
            wrong = ~np.isfinite(result).all(axis=-1)
            expected, result = expected.argmax(axis=-1), result.argmax(axis=-1)
        num_changed += int((wrong | (expected != result)).sum())
        num_pixels += expected.size
    medians = np.median(seconds, axis=1)
    return Change(
        num_changed / num_pixels,
        len(compared),
        bool(others),
        (sizes[0], sizes[1]),
        (float(medians[0]), float(medians[1])),
    )


def _to_int8(model: ModelProto, path: pathlib.Path, reader: Any) -> None:
    """Writes the model with 8-bit kernels, per channel, and 8-bit feature maps.

    The logits and what follows stay in float32: probabilities would have steps of 1/255, and of
    equal logits the first class would win.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    nodes = _size_all_axes(model)
    last = max(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    quantize_static(
        model,
        path,
        reader,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[node.name for node in nodes[last:]],
    )


def _size_all_axes(model: ModelProto) -> list[NodeProto]:
    """Gives each Resize the sizes of all axes, and returns the nodes.

    Around 8-bit convolutions, onnxruntime 1.32 changes the axes of maps. It takes the two sizes of
    a Resize with `axes` for those of all four, and then cannot load the file.
    """
    from onnx import helper

    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Resize":
            first, sizes = f"{node.name}/first", f"{node.name}/sizes"
            nodes.append(helper.make_node("Shape", [node.input[0]], [first], first, start=0, end=2))
            nodes.append(helper.make_node("Concat", [first, node.input[3]], [sizes], sizes, axis=0))
            node.input[3] = sizes
            node.attribute.remove(next(one for one in node.attribute if one.name == "axes"))
        nodes.append(node)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    return nodes


def _to_float16(model: ModelProto, path: pathlib.Path, reader: Any) -> None:
    """Writes the model in float16; the result, and nodes whose values overflow, stay in float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization.calibrate import create_calibrator

    with tempfile.TemporaryDirectory() as folder:
        augmented = os.path.join(folder, "augmented.onnx")
        calibrator: Any = create_calibrator(path, augmented_model_path=augmented)
        calibrator.collect_data(reader)
        ranges = {name: one.range_value for name, one in calibrator.compute_data().items()}
    graph = model.graph
    initial = [one for one in graph.initializer if one.data_type == TensorProto.FLOAT]
    weights = {one.name: numpy_helper.to_array(one) for one in initial}
    ranges |= weights
    # Not `> LARGEST`, which is False for NaN.
    large = {name for name, values in ranges.items() if not np.abs(values).max() <= LARGEST}
    large.add(graph.output[0].name)
    # The nodes in float32. A runtime may sum the values of a mean in float16.
    kept = [
        node.op_type == "GlobalAveragePool" or bool(large & {*node.input, *node.output})
        for node in graph.node
    ]
    pairs = list(zip(graph.node, kept, strict=True))
    # Float32 values; of the weights, those that a node in float32 reads.
    wide = weights.keys() & {name for node, keep in pairs if keep for name in node.input}
    for one in initial:
        if one.name not in wide:
            half = weights[one.name].astype(np.float16)
            one.CopyFrom(numpy_helper.from_array(half, one.name))
    nodes: dict[str, NodeProto] = {}  # by output
    for node, keep in pairs:
        dtype = TensorProto.FLOAT if keep else TensorProto.FLOAT16
        for index, name in enumerate(node.input):
            if name in ranges and (name in wide) != keep:
                node.input[index] = cast = f"{name}/{TensorProto.DataType.Name(dtype)}"
                nodes[cast] = helper.make_node("Cast", [name], [cast], cast, to=dtype)
        if node.op_type == "Cast" and node.output[0] in ranges:
            node.attribute[0].i = dtype
        wide |= set(node.output) if keep else set()
        nodes[node.output[0]] = node
    graph.ClearField("node")
    graph.node.extend(nodes.values())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
