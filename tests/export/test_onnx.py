"""ONNX export: the graph matches the model, and onnxruntime gives the model's results."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from deeplab_jax.cli.main import app
from deeplab_jax.export import onnx as onnx_export
from deeplab_jax.export.program import Dimensions, Program
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.layers import Conv, ShapeRngs
from deeplab_jax.models.ops.atrous_conv import atrous_conv
from deeplab_jax.utils.errors import UserError
from random_modules import random_saved_model

onnx = pytest.importorskip("onnx", reason="install the `onnx` extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="install the `onnx` extra")

from deeplab_jax.export import onnx_graph, onnx_lowering  # noqa: E402

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Exported:
    """A random model of an architecture, its graph, and both as functions of uint8 images."""

    def __init__(self, name, output="logits", layout="nhwc", sizes=Dimensions(), **options):  # noqa: B008
        arch = architecture(name, num_classes=5, width=0.125, **options)
        self.mean, self.std = (numbers[: arch.in_channels] for numbers in (MEAN, STD))
        saved = random_saved_model(arch, mean=self.mean, std=self.std)
        self.model = FunctionalModel(arch)
        self.graph = onnx_export.to_onnx(Program(saved, output, sizes), layout)
        session = onnxruntime.InferenceSession(self.graph.SerializeToString())
        self.run = lambda images: session.run(None, {"images": images})[0]
        self._apply = jax.jit(lambda pixels: self.model.apply(saved.variables, pixels)[0]["out"])

    def logits(self, images):
        pixels = ((images / 255 - np.array(self.mean)) / np.array(self.std)).astype(np.float32)
        return np.asarray(self._apply(pixels))

    def nodes(self, op_type):
        return [node for node in self.graph.graph.node if node.op_type == op_type]


def picture(*shape, channels=3):
    rng = np.random.default_rng(sum(shape))
    return rng.integers(0, 256, (*shape, channels), dtype=np.uint8)


def attributes(node):
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def assert_near(result, logits):
    assert (result.shape, result.dtype) == (logits.shape, np.float32)
    assert np.abs(result - logits).max() <= 1e-5 * np.abs(logits).max()


@pytest.fixture(scope="module")
def basic():
    return Exported("paper_resnet18")


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 41), (5, 40, 33)], ids=str)
def test_one_graph_gives_the_models_logits_at_each_batch_and_size(basic, shape):
    images = picture(*shape)
    assert_near(basic.run(images), basic.logits(images))


ARCHITECTURES = {
    "bottlenecks, auxiliary head": ("torchvision_resnet50", {}),
    "depthwise": ("torchvision_mobilenet_v3_large", {}),
    "SAME padding": ("tf_mobilenet_v2", {}),
    "pre-activation, deep stem, grey": (
        "paper_resnet18",
        {"residual": "pre", "stem": "deep", "in_channels": 1},
    ),
    "separable, pooled shortcuts of both strides, aligned corners": (
        "smpplus_resnet18",
        {"shortcut": "avg_pool", "stem": "deep128"},
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request):
    name, options = ARCHITECTURES[request.param]
    return Exported(name, layout="nchw", **options)


def test_architectures(exported):
    same = exported.model.architecture.padding == "same"  # depends on each side's parity
    for size in ((34, 47), (65, 48))[: 1 + same]:
        images = picture(2, *size, channels=exported.model.architecture.in_channels)
        logits = exported.logits(images)
        result = exported.run(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        assert_near(result.transpose(0, 2, 3, 1), logits)


def test_convolutions_are_the_models(exported):
    """Each has its module's name and rate. Batch norm and the auxiliary head are not exported."""
    arch = exported.model.architecture
    module = nnx.eval_shape(lambda: build_model(arch, rngs=ShapeRngs(0)))
    expected = {
        ".".join(map(str, path)): (
            [conv.kernel.shape[0]] * 2,
            [*conv.strides],
            [*conv.kernel_dilation],
        )
        for path, conv in nnx.iter_modules(module)
        if isinstance(conv, Conv) and path[0] != "aux_classifier"
    }
    written = {}
    for node in exported.nodes("Conv"):
        values = attributes(node)
        written[node.name] = (values["kernel_shape"], values["strides"], values["dilations"])
    assert written == expected
    assert {rate for _, _, (rate, _) in written.values()} > {1}
    types = onnx_export.count_nodes(exported.graph)
    assert not types.keys() & {"BatchNormalization", "Transpose", "Pad", "Slice", "Einsum"}
    arrays = {array.name: array for array in exported.graph.graph.initializer}
    kernels = [arrays[node.input[1]] for node in exported.nodes("Conv")]
    depthwise = [kernel for kernel in kernels if kernel.dims[1] == 1 and kernel.dims[2] > 1]
    assert (len(depthwise) > 10) is arch.backbone.startswith("mobilenet")
    assert (len(depthwise) == 5) is arch.separable_aspp  # three rates, head and decoder
    assert types.get("AveragePool", 0) == (3 if arch.shortcut == "avg_pool" else 0)
    assert ("HardSwish" in types) is (arch.backbone == "mobilenet_v3_large")
    assert types.get("Clip", 0) == (34 if arch.backbone == "mobilenet_v2" else 0)
    same = [node for node in exported.nodes("Conv") if "auto_pad" in attributes(node)]
    assert len(same) == (4 if arch.padding == "same" else 0)


def test_same_padding_of_a_fixed_size_is_written_as_numbers():
    ours = Exported("tf_mobilenet_v2", sizes=Dimensions(None, 34, 47))
    images = picture(2, 34, 47)
    assert_near(ours.run(images), ours.logits(images))
    (stem,) = (node for node in ours.nodes("Conv") if node.name == "backbone.stem.conv")
    assert attributes(stem)["pads"] == [0, 1, 1, 1]


def test_only_the_ends_have_transposes(basic):
    types = onnx_export.count_nodes(basic.graph)
    assert types.pop("Transpose") == 2
    assert types == {
        "Conv": 27, "Relu": 23, "Add": 8, "Div": 2, "Shape": 2, "Concat": 2, "Cast": 1, "Sub": 1,
        "MaxPool": 1, "GlobalAveragePool": 1, "Expand": 1, "Resize": 1,
    }  # fmt: skip
    first, *_, last = basic.graph.graph.node
    assert (first.op_type, last.op_type) == ("Transpose", "Transpose")


def test_nodes_are_named_after_modules(basic):
    names = [node.name for node in basic.graph.graph.node]
    assert len(set(names)) == len(names)
    assert "backbone.layer4.1.conv2" in names
    assert "backbone.layer4.1.conv2/Relu" in names
    assert "classifier.logits/Resize" in names
    (image,), (output,) = basic.graph.graph.input, basic.graph.graph.output
    assert (image.name, output.name) == ("images", "logits")

    def sides(info):
        return [side.dim_param or side.dim_value for side in info.type.tensor_type.shape.dim]

    assert sides(image) == ["batch", "height", "width", 3]
    assert sides(output) == ["batch", "height", "width", 5]


def test_metadata_describes_ids(basic):
    texts = {one.key: one.value for one in basic.graph.metadata_props}
    assert json.loads(texts["classes"]) == list("abcde")
    assert json.loads(texts["palette"])[1] == [128, 0, 0]
    assert (json.loads(texts["mean"]), json.loads(texts["std"])) == (list(MEAN), list(STD))
    assert (texts["architecture"], texts["layout"]) == ("paper_resnet18", "nhwc")


def test_ids_of_a_fixed_size(basic):
    images = picture(2, 33, 41)
    ids = Exported("paper_resnet18", "ids", sizes=Dimensions(height=33, width=41))
    assert onnx_export.count_nodes(ids.graph)["Transpose"] == 1
    assert (len(ids.nodes("Shape")), len(ids.nodes("Concat"))) == (0, 1)
    result = ids.run(images)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, basic.logits(images).argmax(-1))
    assert len(np.unique(result)) > 1
    with pytest.raises(Exception, match="invalid dimensions"):
        ids.run(images[:, :, :-1])


def test_probabilities_with_channels_first(basic):
    images = picture(2, 33, 41)
    ours = Exported("paper_resnet18", "probabilities", "nchw")
    assert not ours.nodes("Transpose")
    result = ours.run(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(result, jax.nn.softmax(basic.logits(images)), atol=2e-5)


def test_a_bias_is_not_put_into_a_convolution_that_others_read():
    def twice(variables, x):
        y = atrous_conv(x, variables["a.kernel"], kernel_dilation=2, method="native")
        return y * (y + variables["a.bias"][None, None, None])

    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=4)
    variables = {"a.bias": bias.astype(np.float32), "a.kernel": kernel.astype(np.float32)}
    x = rng.normal(size=(1, 5, 6, 2)).astype(np.float32)
    trace = jax.make_jaxpr(twice)(variables, x)
    graph = onnx_graph.Graph()
    inputs = [onnx_graph.Constant(value, name) for name, value in variables.items()]
    inputs.append(onnx_graph.Tensor("x", x.shape, ""))
    result = onnx_lowering.lower(graph, trace.jaxpr, trace.consts, inputs)
    infos = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", (1, 2, 5, 6)), ("y", (1, 4, 5, 6)))
    )
    model = graph.model(*infos, result)
    assert onnx_export.count_nodes(model) == {"Conv": 1, "Add": 1, "Mul": 1}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, {"x": x.transpose(0, 3, 1, 2).copy()})
    assert_near(y.transpose(0, 2, 3, 1), np.asarray(jax.jit(twice)(variables, x)))


def test_a_bias_is_not_put_into_the_images():
    graph, images = onnx_graph.Graph(), onnx_graph.Tensor("images", (1, 5, 6, 3), "")
    bias = onnx_graph.Constant(np.ones((1, 1, 1, 3), np.float32), "a.bias")
    assert not graph.add_bias(images, bias)
    graph.add("Conv", ["images", "kernel"], (1, 5, 6, 3), "a")
    assert not graph.add_bias(images, bias)


def test_an_unsupported_operation_is_reported_with_its_module():
    location = r"in or after classifier\.logits, at .*decoders\.py.*TransposedDecoder.*stablehlo"
    with pytest.raises(UserError, match=rf"no rule for '\w+', {location}"):
        Exported("paper_resnet18", decoder="transposed", sizes=Dimensions(1, 32, 32))


def test_from_torchvisions_file_in_two_commands(tmp_path):
    """The result equals that of torchvision's model for the same pixels."""
    torch_reference = pytest.importorskip("torch_reference")
    torch = torch_reference.torch
    reference = torch_reference.segmentation_model("deeplabv3_mobilenet_v3_large", aux=True)
    torch.save(reference.state_dict(), tmp_path / "model.pth")

    def command(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    command("convert", tmp_path / "model.pth", tmp_path / "model", "--quiet")
    path = tmp_path / "model.onnx"
    sizes = ["--batch", "1", "--height", "49", "--width", "65"]
    said = command("export", tmp_path / "model", path, *sizes, "--output", "logits")
    assert "1 Resize" in said
    assert "1x49x65" in said
    images = picture(1, 49, 65)
    pixels = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
        expected = reference(inputs)["out"].numpy().transpose(0, 2, 3, 1)
    (result,) = onnxruntime.InferenceSession(path).run(None, {"images": images})
    assert_near(result, expected)
