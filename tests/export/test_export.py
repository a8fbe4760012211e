"""`deeplab-jax export`: it keeps no file that differs from the model, and reports mistakes."""

import errno
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from deeplab_jax.cli.main import app
from deeplab_jax.export import compare, stablehlo
from deeplab_jax.export.export import export
from deeplab_jax.export.program import OUTPUTS
from deeplab_jax.models.layers import Conv
from deeplab_jax.models.ops.convolution import FASTEST, XLA, use_implementation
from deeplab_jax.models.ops.pooling import average_pool, max_pool, mean_over_image
from deeplab_jax.models.ops.resize import resize_bilinear
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model

SIZES = {"batch": 1, "height": 33, "width": 41}


def command(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_comparisons_are_printed_and_classes_are_written(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "SYMBOLIC_SHAPES", ((1, 33, 41), (2, 33, 41)))
    done = command("export", saved, tmp_path / "a.stablehlo", "--output", "logits")
    assert done.exit_code == 0, done.output
    assert "limit 1e-05" in done.output
    rows = [line.split() for line in done.output.splitlines() if "x33x41" in line]
    assert [row[:2] for row in rows] == [
        [images, size] for size in ("1x33x41", "2x33x41") for images in ("noise", "smooth")
    ]
    assert all(float(row[2]) <= 1e-5 and row[3] == "100.0000%" for row in rows)
    described = json.loads((tmp_path / "a.stablehlo.json").read_text())
    assert described["classes"] == ["background", "red fox", "bluebird"]
    assert described["palette"][1] == [200, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.stablehlo", "a.stablehlo.json"]


@pytest.mark.parametrize(
    ("output", "wrong"),
    [
        ("logits", lambda logits: logits * (1 + 2e-5)),
        ("logits", lambda logits: logits * np.float32(np.nan)),
        ("probabilities", lambda probabilities: probabilities[::-1]),
        ("ids", lambda ids: ids[:, ::-1]),
    ],
    ids=["scaled", "not a number", "upside down", "mirrored"],
)
def test_a_program_that_differs_is_not_kept(saved, tmp_path, monkeypatch, output, wrong):
    (tmp_path / "a.stablehlo").write_text("of an earlier time")
    programs = []

    def keep(program, platforms):
        programs.append(program)
        return b"a program"

    def load_wrong(path):
        assert path.name.startswith(".a.stablehlo.")
        assert path.read_bytes() == b"a program"
        (program,) = programs
        logits = jax.jit(program.reference)

        def run(images):
            result = np.asarray(OUTPUTS[output](logits(program.saved.variables, images)))
            return wrong(result[0])[None].astype(result.dtype)

        return run

    monkeypatch.setattr(stablehlo, "serialize", keep)
    monkeypatch.setattr(stablehlo, "load", load_wrong)
    with pytest.raises(UserError, match=rf"(?s)not written: its {output} differ.*1x33x41, noise: "):
        export(saved, tmp_path / "a.stablehlo", output=output, **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.stablehlo"]
    assert (tmp_path / "a.stablehlo").read_text() == "of an earlier time"


def test_a_full_disk_leaves_nothing(saved, tmp_path, monkeypatch):
    def write_bytes(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
    with pytest.raises(UserError, match=r"a\.stablehlo cannot be written: No space left on device"):
        export(saved, tmp_path / "a.stablehlo", **SIZES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("destination", "options", "message"),
    [
        ("a.pb", {}, r"a\.pb must end in \.stablehlo or \.onnx.*'\.pb'"),
        ("a", {}, "must end in"),
        ("a.stablehlo", {"height": 0}, "height must be 1 to 32767, .*got 0"),
        ("a.stablehlo", {"width": 40000}, "width must be 1 to 32767"),
        ("a.stablehlo", {"batch": -1}, "batch must be"),
        ("a.stablehlo", {"output": "labels"}, "output must be one of ids, probabilities, logits"),
        ("a.stablehlo", {"platforms": ("gpu",)}, "platforms must be some of cpu, cuda, tpu"),
        ("a.onnx", {"layout": "chw"}, "layout must be one of nhwc, nchw"),
        ("file/a.onnx", {}, "file cannot be written to: File exists"),
        ("folder.onnx", {}, "is a folder"),
    ],
)
def test_mistakes_are_reported(saved, tmp_path, destination, options, message):
    if destination.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="install the `onnx` extra")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"(?s){message}"):
        export(saved, tmp_path / destination, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_sizes_on_the_command_line(saved, tmp_path):
    done = command("export", saved, tmp_path / "a.stablehlo", "--height", "many")
    assert isinstance(done.exception, UserError)
    assert "--height must be a whole number or symbolic, got 'many'" in str(done.exception)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_extra_is_named(saved, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"needs.* {missing}.*pip install 'deeplab-jax\[onnx\]'"):
        export(saved, tmp_path / "a.onnx")


def test_a_checkpoint_of_another_version_is_reported(saved, tmp_path):
    read = saved_model.read(saved)
    saved_model.write_model(tmp_path / "new", read.variables, read.info | {"format": 99})
    with pytest.raises(
        UserError, match=r"has checkpoint format 99, and this version .* reads format 2"
    ):
        export(tmp_path / "new", tmp_path / "a.stablehlo")


# Differences, by hand

LOGITS = np.array([[[[4.0, 1.0, 0.0], [0.0, 1.0, -8.0]]]], np.float32)


def test_difference_of_logits_is_relative_to_the_largest():
    result = LOGITS + np.array([0.0, 0.0, 0.4], np.float32)
    assert compare.difference("logits", LOGITS, result) == (pytest.approx(0.05), 1.0)
    result = LOGITS + np.array([2.0, 0.0, 0.0], np.float32)
    assert compare.difference("logits", LOGITS, result) == (pytest.approx(0.25), 0.5)


def test_difference_of_ids_is_how_much_the_model_prefers_another():
    same = np.array([[[0, 1]]], np.uint8)
    assert compare.difference("ids", LOGITS, same) == (0.0, 1.0)
    other = np.array([[[1, 1]]], np.uint8)
    assert compare.difference("ids", LOGITS, other) == (pytest.approx(3 / 8), 0.5)


def test_difference_of_probabilities():
    probabilities = np.array(jax.nn.softmax(LOGITS))
    assert compare.difference("probabilities", LOGITS, probabilities)[0] < 1e-7
    probabilities[0, 0, 0, 0] -= 0.08
    result = compare.difference("probabilities", LOGITS, probabilities)
    assert result == (pytest.approx(0.01), 1.0)


def test_another_shape_or_type_is_an_error():
    for output, result in (("logits", LOGITS[:, :, :1]), ("ids", np.zeros((1, 1, 2), np.int32))):
        with pytest.raises(ValueError, match=f"{output} must be"):
            compare.difference(output, LOGITS, result)


# Requirements on the models


@pytest.mark.parametrize("align_corners", [False, True])
def test_symbolic_sizes_resize_like_fixed_ones(align_corners):
    height, width = jax.export.symbolic_shape("h, w")
    resize_to = functools.partial(resize_bilinear, align_corners=align_corners)
    resize = jax.jit(lambda x, like: resize_to(x, 2 * x.shape[1] + 1, like.shape[1]))
    shapes = ((1, height, 3, 2), (5, width))
    exported = jax.export.export(resize)(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 3, 2)), jnp.float32)
    for columns in (1, 11):
        np.testing.assert_allclose(
            exported.call(x, np.zeros((5, columns), np.float32)),
            resize_to(x, 15, columns),
            atol=1e-6,
        )


def test_depthwise_convolution_is_one_operation_with_xla():
    conv = Conv(4, 4, 3, feature_group_count=4, rngs=nnx.Rngs(0))
    texts = []
    for implementation in (FASTEST, XLA):
        use_implementation(conv, implementation)
        texts.append(str(jax.make_jaxpr(lambda x: conv(x))(jnp.zeros((1, 9, 9, 4)))))
    assert ["cond" in text for text in texts] == [True, False]
    assert "conv_general_dilated" in texts[1]


def test_operations_are_named():
    x = jnp.zeros((1, 9, 9, 4))
    named = {
        "max_pool_3x3": max_pool,
        "global_mean": lambda x: mean_over_image(x, jnp.float32),
        "resize_bilinear_unpadded": lambda x: resize_bilinear(x, 17, 17),
        "resize_aligned_unpadded": lambda x: resize_bilinear(x, 17, 17, align_corners=True),
        "average_pool_2x2": lambda x: average_pool(x, 2),
        "average_pool_2x2_dense": lambda x: average_pool(x, 1),
        "softmax": OUTPUTS["probabilities"],
    }
    for name, function in named.items():
        (equation,) = jax.make_jaxpr(function)(x).eqns
        assert equation.params["name"] == name
