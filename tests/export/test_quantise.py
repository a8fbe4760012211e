"""ONNX in float16 and int8: what the files hold, what they compute, and when they are refused."""

import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import tiny
from deeplab_jax.cli.main import app
from deeplab_jax.config.schema import to_json
from deeplab_jax.export.export import export
from deeplab_jax.export.program import Dimensions, Program
from deeplab_jax.models.architecture import architecture
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model
from random_modules import random_saved_model

onnx = pytest.importorskip("onnx", reason="install the `onnx` extra")
pytest.importorskip("onnxruntime", reason="install the `onnx` extra")

from deeplab_jax.export import onnx as onnx_export  # noqa: E402
from deeplab_jax.export import quantise  # noqa: E402
from deeplab_jax.export.quantise import Quantisation  # noqa: E402

SIZES = ["--batch", "1", "--height", "33", "--width", "41"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of six images of 48 x 40 pixels: waves of several lengths."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(6):
        Image.fromarray(picture(40, 48, seed)).save(folder / f"{seed}.png")
    return folder


def picture(height, width, seed=0):
    rows, columns, channels = np.ogrid[:height, :width, :3]
    phase = (seed + 1) * rows / 9 + (channels + 1) * columns / (5 + seed)
    return np.rint(127.5 + 127.5 * np.sin(phase + channels)).astype(np.uint8)


def arrays(graph):
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}


def named_convolutions(path):
    graph = onnx.load(path).graph
    return graph, {node.name: node for node in graph.node if node.op_type == "Conv"}


def small_model(change=lambda params: None, **options):
    """A model of random weights with 3 classes."""
    arch = architecture("paper_resnet18", num_classes=3, width=0.125, **options)
    return random_saved_model(arch, seed=2, change=change)


class Lowered:
    """A float32 file, `before`, one of lower precision, `after`, and their differences."""

    def __init__(self, folder, content, precision):
        self.before, self.after = folder / "float.onnx", folder / "low.onnx"
        self.before.write_bytes(content)
        self.after.write_bytes(content)
        images = [picture(40, 48, seed)[None] for seed in range(4)]
        self.change = quantise.quantise(self.after, precision, images[:2], images[2:])

    def run(self, images):
        return [onnx_export.load(path)(images) for path in (self.before, self.after)]


@pytest.fixture(scope="module")
def content():
    """A file without fixed sizes that computes logits."""
    graph = onnx_export.to_onnx(Program(small_model(), "logits", Dimensions()))
    return graph.SerializeToString()


@pytest.fixture(scope="module")
def lowered(content, tmp_path_factory):
    """A function that lowers the file's precision, once to each."""
    return functools.cache(
        lambda precision: Lowered(tmp_path_factory.mktemp(precision), content, precision)
    )


def test_int8_kernels_are_the_floats_rounded_per_channel(lowered):
    """Each by its own scale, max |kernel| / 127; the logits stay in float32."""
    low = lowered("int8")
    before, floats = named_convolutions(low.before)
    kernels = {name: arrays(before)[node.input[1]] for name, node in floats.items()}
    graph, nodes = named_convolutions(low.after)
    values = arrays(graph)
    makers = {node.output[0]: node for node in graph.node}
    assert nodes.keys() == kernels.keys()
    for name, node in nodes.items():
        if name == "classifier.logits":
            np.testing.assert_array_equal(values[node.input[1]], kernels[name])
            continue
        assert makers[node.input[0]].op_type == "DequantizeLinear"
        whole, scale, zero = (values[each] for each in makers[node.input[1]].input)
        assert (whole.dtype, zero.any()) == (np.int8, False)
        largest = np.abs(kernels[name]).max(axis=(1, 2, 3))
        np.testing.assert_allclose(scale, largest / 127, rtol=1e-5)
        error = np.abs(whole * scale[:, None, None, None] - kernels[name])
        assert (error <= 0.501 * scale[:, None, None, None]).all()
    types = onnx_export.count_nodes(onnx.load(low.after))
    assert types["QuantizeLinear"] > 26
    sizes = (low.before.stat().st_size, low.after.stat().st_size)
    assert low.change.num_bytes == sizes
    assert sizes[1] < sizes[0] / 2
    assert min(low.change.seconds) > 0


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_changed_pixels_are_counted_on_the_other_images(lowered, precision):
    low = lowered(precision)
    assert (low.change.num_images, low.change.held_out) == (2, True)
    images = np.stack([picture(40, 48, 2), picture(40, 48, 3)])
    ids = [logits.argmax(axis=-1) for logits in low.run(images)]
    assert len(np.unique(ids[0])) > 1
    assert low.change.changed == pytest.approx(np.mean(ids[0] != ids[1]), abs=1e-12)
    assert low.change.changed < (0.002 if precision == "float16" else 0.1)


def test_float16_keeps_images_and_results_as_they_are(lowered):
    """The arrays of all convolutions are float16, and the file takes other sizes."""
    low = lowered("float16")
    graph, nodes = named_convolutions(low.after)
    values = arrays(graph)
    dtypes = {values[name].dtype for node in nodes.values() for name in node.input[1:]}
    assert dtypes == {np.dtype(np.float16)}
    expected, result = low.run(np.stack([picture(50, 33, 7), picture(50, 33, 8)]))
    assert (result.dtype, result.shape) == (np.float32, expected.shape)
    error = np.abs(result - expected).max() / np.abs(expected).max()
    assert 1e-6 < error < 1e-2
    assert low.change.num_bytes[1] < 0.6 * low.change.num_bytes[0]


def test_values_beyond_float16_stay_in_float32(tmp_path):
    """The features of the last layer are a million times larger, its kernel as much smaller."""

    def enlarge(params):
        for name in params:
            if name.startswith("classifier.aspp.project.bn"):
                params[name] *= 1e6
        params["classifier.logits.kernel"] *= 1e-6

    graph = onnx_export.to_onnx(Program(small_model(enlarge), "logits", Dimensions()))
    low = Lowered(tmp_path, graph.SerializeToString(), "float16")
    expected, result = low.run(picture(40, 48, 5)[None])
    assert np.abs(result - expected).max() < 1e-2 * np.abs(expected).max()
    graph, nodes = named_convolutions(low.after)
    values = arrays(graph)
    wide = {name for name, node in nodes.items() if values[node.input[1]].dtype == np.float32}
    assert wide == {"classifier.aspp.project.conv", "classifier.logits"}
    onnx.checker.check_model(onnx.load(low.after), full_check=True)


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_int8_of_a_decoder_with_a_resize_inside(tmp_path, layout):
    """onnxruntime does not load it if the Resize has `axes`."""
    program = Program(small_model(decoder="plus"), "probabilities", Dimensions())
    low = Lowered(tmp_path, onnx_export.to_onnx(program, layout).SerializeToString(), "int8")
    images = np.stack([picture(40, 48, 2), picture(40, 48, 3)])
    expected, result = low.run(images)
    assert result.shape == expected.shape == (2, 40, 48, 3)
    np.testing.assert_allclose(result.sum(axis=-1), 1, atol=1e-5)
    assert 0 < np.abs(result - expected).mean() < 0.05
    changed = np.mean(result.argmax(-1) != expected.argmax(-1))
    assert low.change.changed == pytest.approx(changed, abs=1e-12)


def test_results_that_are_not_finite_count_as_changed(content, tmp_path, monkeypatch):
    def break_bias(model, path, reader):
        (bias,) = (one for one in model.graph.initializer if one.name == "classifier.logits.bias")
        values = np.array([np.nan, 0, 0], np.float32)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(model, path)

    monkeypatch.setattr(quantise, "_to_float16", break_bias)
    assert Lowered(tmp_path, content, "float16").change.changed == 1


def test_a_file_that_loses_too_much_is_removed(saved, photos, tmp_path):
    (tmp_path / "a.onnx").write_text("of an earlier time")
    options = ["--precision", "int8", "--calibration-images", photos, "--num-calibration", "3"]
    words = ["export", saved, tmp_path / "a.onnx", *options, "--max-changed", "0", *SIZES]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert isinstance(done.exception, UserError)
    message = r"a\.onnx was not written: in int8, \d+\.\d\d% of .* 3 images .* raise max_changed"
    with pytest.raises(UserError, match=message):
        raise done.exception
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_text() == "of an earlier time"


def test_the_command_prints_what_changed(saved, photos, tmp_path):
    words = ["export", saved, tmp_path / "a.onnx", *SIZES]
    options = ["--precision", "int8", "--calibration-images", photos, "--max-changed", "1"]
    done = CliRunner().invoke(app, [*map(str, words + options)], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert "of the pixels of 6 images, those of the calibration, change class" in done.output
    assert "(limit 100.00%)" in done.output


def test_images_of_a_run_fitted_to_a_fixed_size(saved, tmp_path):
    folder = tmp_path / "checkpoints" / "1"
    read = saved_model.read(saved)
    saved_model.write_model(folder, read.variables, read.info)
    (tmp_path / "config.json").write_text(to_json(tiny.get_config()))
    program = Program(read, "ids", Dimensions(2, 20, None))
    ours, others = quantise.read_images(Quantisation("int8", "val", 3), folder, program)
    assert [each.shape for each in ours + others] == [(2, 20, 32, 3)] * 5  # val has 5 images
    assert (len(ours), len(others)) == (3, 2)
    assert len({each.tobytes() for each in ours + others}) == 5
    with pytest.raises(UserError, match=r"no folder vla, and as a split: .*did you mean 'val'"):
        quantise.read_images(Quantisation("int8", "vla", 3), folder, program)


def test_the_middle_of_a_large_image_is_used(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "SIDE", 10)
    image = picture(16, 31)
    Image.fromarray(image).save(tmp_path / "a.png")
    program = Program(saved_model.read(saved), "ids", Dimensions())
    (found,), _ = quantise.read_images(Quantisation("int8", str(tmp_path)), saved, program)
    np.testing.assert_array_equal(found, image[None, 3:13, 10:20])


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("a.onnx", Quantisation("int16", "x"), "one of float32, float16, int8, got 'int16'"),
        ("a.stablehlo", Quantisation("int8", "x"), "int8 needs an ONNX file, got .*float32"),
        ("a.onnx", Quantisation("int8"), "int8 needs calibration images: a folder"),
        ("a.onnx", Quantisation("float16", max_changed=2), "max_changed 0 to 1, got .*=2"),
        ("a.onnx", Quantisation("float16", num_calibration=0), "num_calibration must be 1"),
        ("a.onnx", Quantisation("int8", "train"), "there is no folder train, and .* no run"),
        ("a.onnx", Quantisation("int8", "EMPTY"), "contains no images to calibrate with"),
        ("a.onnx", Quantisation("int8", "BROKEN"), r"a\.png: is a text file"),
    ],
)
def test_mistakes_are_reported(saved, tmp_path, name, wanted, message):
    for folder in ("EMPTY", "BROKEN"):
        (tmp_path / folder).mkdir()
    (tmp_path / "BROKEN" / "a.png").write_text("no image")
    if wanted.images.isupper():
        wanted = dataclasses.replace(wanted, images=str(tmp_path / wanted.images))
    with pytest.raises(UserError, match=f"(?s){message}"):
        export(saved, tmp_path / name, quantisation=wanted)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "option", [("--calibration-images", "."), ("--num-calibration", 3), ("--max-changed", 0.5)]
)
def test_options_of_a_lower_precision_are_refused_in_float32(saved, tmp_path, option):
    words = ["export", saved, tmp_path / "a.onnx", *option]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert f"{option[0]}" in str(done.exception)
    assert "for --precision int8 or float16" in str(done.exception)
