"""TFLite files: a trained one, small ones made here, other networks, and damaged ones."""

import re
import struct
import time
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from file_damage import mutated, read_damaged, settings

import deeplab_jax
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import torch_file
from deeplab_jax.weights.tflite_file import parse
from deeplab_jax.weights.torch_format.pickle_reader import Unreadable
from tflite_builder import RELU, VALID, DeepLab, TFLiteFile, classifier

REAL = "deeplabv3_mnv2_pascal_quant.tflite"


@pytest.fixture
def real(shared_data):
    path = shared_data.parent / "weights" / REAL
    if not path.is_file():
        pytest.skip(f"{REAL} is not at {path.parent}")
    return path


def test_trained_network(real):
    file = torch_file.read_file(real)
    assert file.config == {
        "output_stride": 16,
        "mean": (128 / 255,) * 3,
        "std": (128 / 255,) * 3,
    }
    # 17 blocks of 3 convolutions but for the first, the first convolution, and 4 of the head.
    assert len(file.arrays) == 2 * (17 * 3 - 1 + 1 + 4)
    assert file.arrays["MobilenetV2/Conv/weights"].shape == (3, 3, 3, 32)
    assert file.arrays["MobilenetV2/expanded_conv_16/project/weights"].shape == (1, 1, 960, 320)
    assert file.arrays["concat_projection/weights"].shape == (1, 1, 512, 256)
    assert file.arrays["logits/semantic/biases"].shape == (21,)
    depthwise = file.arrays["MobilenetV2/expanded_conv_1/depthwise/depthwise_weights"]
    assert depthwise.shape == (3, 3, 96, 1)
    for name, array in file.arrays.items():
        assert array.dtype == np.float32, name
        assert not array.flags.writeable, name
        assert np.isfinite(array).all(), name


def test_trained_network_against_its_interpreter(real):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(str(real))
    interpreter.allocate_tensors()
    arrays = dict(torch_file.read(real))
    details = interpreter.get_tensor_details()
    by_index = {each["index"]: each for each in details}

    def dequantised(index):
        parameters = by_index[index]["quantization_parameters"]
        scale, zero = parameters["scales"][0], parameters["zero_points"][0]
        values = interpreter.get_tensor(index).astype(np.int64) - int(zero)
        return (np.float64(scale) * values).astype(np.float32)

    checked = 0
    for operator in interpreter._get_ops_details():
        if "CONV_2D" not in operator["op_name"]:
            continue
        _, weights, biases = operator["inputs"]
        # Only the last part of the name belongs to this layer in every case.
        scope = by_index[weights]["name"].split(";")[-1].partition("/weights_quant")[0]
        leaf = "depthwise_weights" if scope.endswith("depthwise") else "weights"
        expected = np.transpose(dequantised(weights), (1, 2, 3, 0))
        np.testing.assert_array_equal(arrays[f"{scope}/{leaf}"], expected)
        np.testing.assert_array_equal(arrays[f"{scope}/biases"], dequantised(biases))
        checked += 2
    assert checked == len(arrays)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "float16"},
        {"kind": "int8"},
        {"output_stride": 8},
        {"output_stride": 8, "batched": True, "size": 66},
        {"output_stride": 32},
    ],
    ids=str,
)
def test_small_networks(tmp_path, options):
    network = DeepLab(**options)
    path = tmp_path / "small.weights"  # the content says what it is
    path.write_bytes(network.content())
    file = torch_file.read_file(path)
    assert file.arrays.keys() == network.arrays.keys()
    for name, array in network.arrays.items():
        np.testing.assert_array_equal(file.arrays[name], array, err_msg=name)
    stride = options.get("output_stride", 16)
    mean = 128 / 255 if options.get("kind") == "int8" else 0.5
    assert file.config == {"output_stride": stride, "mean": (mean,) * 3, "std": (mean,) * 3}


@pytest.mark.parametrize(
    "options",
    [{}, {"output_stride": 8}, {"kind": "float16"}, {"batched": True, "size": 66}],
)
def test_logits_are_those_of_tensorflows_interpreter(options, tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    network = DeepLab(**options)
    (tmp_path / "a.tflite").write_bytes(network.content())
    original = interpreter.Interpreter(
        str(tmp_path / "a.tflite"), experimental_preserve_all_tensors=True
    )
    original.allocate_tensors()
    image = original.get_input_details()[0]
    images = np.random.default_rng(0).uniform(-1, 1, image["shape"]).astype(np.float32)
    original.set_tensor(image["index"], images)
    original.invoke()
    _, inputs, *_ = network.operators[-1]  # ARG_MAX
    expected = original.get_tensor(inputs[0])
    logits = deeplab_jax.load(tmp_path / "a.tflite").logits(images)
    assert np.abs(logits - expected).max() <= 3e-5 * np.abs(expected).max()


def test_merged_tensors():
    """Equal arrays of two layers may be one tensor whose name lists both."""
    scopes = [f"MobilenetV2/expanded_conv_{block}/project" for block in (1, 2)]
    network = DeepLab(changes={scopes[0]: {"name": f"{scopes[1]}/weights;{scopes[0]}"}})
    by_scope = {}
    for name, inputs, *_ in network.operators:
        for scope in scopes:
            if "CONV" in name and f";{scope}/weights" in network.tensors[inputs[1]].name:
                by_scope[scope] = inputs
    by_scope[scopes[1]][1] = by_scope[scopes[0]][1]
    arrays = parse(memoryview(network.content())).arrays
    expected = network.arrays[f"{scopes[0]}/weights"]
    for scope in scopes:
        np.testing.assert_array_equal(arrays[f"{scope}/weights"], expected)


def changed(scope, **change):
    return DeepLab(changes={f"MobilenetV2/{scope}": change}).content()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            classifier,
            "FULLY_CONNECTED where logits.*operators are 2 CONV_2D, 2 operator 117, 1 F",
        ),
        (lambda: DeepLab(branches=3).content(), "concatenates 5 branches instead of 2"),
        (lambda: DeepLab(corners=0).content(), "logits are resized without aligned corners"),
        (lambda: DeepLab(aspp_first=True).content(), "CONV_2D where image pooling was expected"),
        (
            lambda: changed("expanded_conv_3/expand", name="MobilenetV2/expanded_conv_4/expand"),
            "weights named .*expanded_conv_4/expand/weights where .*expanded_conv_3/expand was",
        ),
        (
            lambda: changed("expanded_conv_3/expand", activation=RELU),
            "has activation 1 instead of 3",
        ),
        (lambda: changed("Conv", padding=VALID), "Conv is not padded as SAME"),
        (lambda: changed("expanded_conv_3/expand", strides=2), "expand has strides 2 and dilation"),
        (
            lambda: changed("expanded_conv_16/depthwise", dilation=4),
            "16/depthwise has strides 1 and dilation 4",
        ),
        (
            lambda: changed("expanded_conv_9/depthwise", dilation=2),
            "9/depthwise has strides 1 and dil",
        ),
    ],
)
def test_other_networks(tmp_path, content, message):
    path = tmp_path / "other.tflite"
    path.write_bytes(content())
    with pytest.raises(
        UserError, match=rf"{re.escape(str(path))} is a TFLite file, but .*{message}"
    ):
        torch_file.read_file(path)


def test_residuals_are_where_mobilenet_has_them():
    network = DeepLab()
    index = next(i for i, each in enumerate(network.operators) if each[0] == "ADD")
    name, (output, _), *rest = network.operators[index]
    network.operators[index] = (name, [output, output], *rest)
    with pytest.raises(Unreadable, match="does not add its input where MobileNetV2 does"):
        parse(memoryview(network.content()))


SMALL = DeepLab(size=33).content()


@settings
@hypothesis.given(content=mutated(SMALL))
def test_damaged_files_are_refused_or_read(tmp_path, content):
    path = tmp_path / "damaged.tflite"
    path.write_bytes(content)
    read_damaged(path)


# The file's first parts and its last hold the tables, where damage does most.
@settings
@hypothesis.given(
    places=st.lists(st.integers(0, 4000), min_size=1, max_size=3), number=st.integers(0, 2**32 - 1)
)
def test_damaged_tables(tmp_path, places, number):
    content = bytearray(SMALL)
    for place in places:
        struct.pack_into("<I", content, 8 + place * 4 % (len(content) - 12), number)
    path = tmp_path / "damaged.tflite"
    path.write_bytes(content)
    read_damaged(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "truncated.tflite"
    for length in range(1, len(SMALL), 997):
        path.write_bytes(SMALL[:length])
        assert read_damaged(path) is None, length


def offset_to_tensors(content):
    """The place of the first graph's offset to its list of tensors."""

    def offset(position, field):
        vtable = position - struct.unpack_from("<i", content, position)[0]
        return position + struct.unpack_from("<H", content, vtable + 4 + 2 * field)[0]

    def target(place):
        return place + struct.unpack_from("<I", content, place)[0]

    graphs = target(offset(target(0), 2)) + 4
    return offset(target(graphs), 0)


def test_a_list_of_many_tensors_is_refused_before_they_are_read():
    """Each takes 4 bytes of a file, and much more memory and time to read."""
    content = bytearray(SMALL) + bytes(-len(SMALL) % 4)
    place, count = offset_to_tensors(content), 100_001
    struct.pack_into("<I", content, place, len(content) - place)
    content += struct.pack("<I", count) + bytes(4 * count)
    with pytest.raises(Unreadable, match="has 100001 tensors or operators"):
        parse(memoryview(content))


def test_overlapping_parts_take_bounded_time_and_memory():
    """All tensors of a file refer to one long name; all of its operators to one list."""
    file = TFLiteFile()
    x = file.tensor((1, 8, 8, 3), name="x" * 100_000)
    for _ in range(2000):
        file.operator("RELU6", [x], (1, 8, 8, 3))
    content = bytearray(file.content())
    tensors = offset_to_tensors(content)
    tensors += struct.unpack_from("<I", content, tensors)[0]
    count, first = struct.unpack_from("<II", content, tensors)
    for each in range(count):  # offsets are relative to their own places
        struct.pack_into("<I", content, tensors + 4 + 4 * each, first - 4 * each)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(Unreadable, match="is a damaged"):
        parse(memoryview(content))
    assert time.monotonic() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 20 * len(content)
    tracemalloc.stop()


def test_huge_counts(tmp_path):
    path = tmp_path / "huge.tflite"
    refused = 0
    for place in range(8, len(SMALL) - 4, 4):
        if struct.unpack_from("<I", SMALL, place)[0] in (3, 4, 16, 31):  # shapes, counts, names
            content = bytearray(SMALL)
            struct.pack_into("<I", content, place, 0x7FFFFFFF)
            path.write_bytes(content)
            refused += read_damaged(path) is None
            if refused == 200:
                break
    assert refused == 200
