"""Convolutions read from the traced model: against torch, gradients, and the model's modules."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from deeplab_jax.analysis.conv_trace import Convolution, convolutions
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.models.layers import Conv, ShapeRngs
from deeplab_jax.models.ops.convolution import XLA
from deeplab_jax.models.ops.pooling import average_pool
from deeplab_jax.models.ops.resize import resize_bilinear
from torch_reference import torchvision

VARIANTS = {
    "paper": ("paper_resnet18", {}),
    "pre": (
        "torchvision_resnet18",
        {"residual": "pre", "stem": "deep", "decoder": "transposed", "output_stride": 16},
    ),
    "mobilenet": ("torchvision_mobilenet_v3_large", {}),
    "same": ("tf_mobilenet_v2", {"aux_head": True, "atrous_rates": (6, 12, 18)}),
}


@functools.cache
def model_of(variant):
    name, options = VARIANTS[variant]
    return FunctionalModel(architecture(name, num_classes=3, width=0.125, **options))


# --- Counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "height", "width"), [("resnet50", 97, 161), ("mobilenet_v3_large", 129, 65)]
)
def test_arithmetic_is_what_torch_counts(backbone, height, width):
    """FLOPs of each module of torchvision's model, on PyTorch's meta device."""
    build = getattr(torchvision.models.segmentation, f"deeplabv3_{backbone}")
    with torch.device("meta"):
        theirs = build(weights=None, weights_backbone=None, aux_loss=True).eval()
        with FlopCounterMode(display=False) as counter:
            theirs(torch.empty(1, 3, height, width))
    counts = counter.get_flop_counts()
    found = convolutions(
        FunctionalModel(architecture(f"torchvision_{backbone}", num_classes=21)), height, width
    )
    ours = [2 * conv.macs for conv in found]
    assert sum(ours) == counter.get_total_flops()
    per_module = [
        sum(flops.values()) for name, flops in counts.items() if name.endswith("aux_classifier")
    ]
    aux = [2 * c.macs for c in found if c.name.startswith("aux_classifier")]
    assert per_module == [sum(aux)]


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 3),
    rate=st.integers(1, 45),
)
def test_valid_fraction_equals_a_convolution_of_ones_with_ones(
    height, width, kernel_size, stride, rate
):
    ones = torch.ones(1, 1, height, width, dtype=torch.float64)
    kernel = torch.ones(1, 1, kernel_size, kernel_size, dtype=torch.float64)
    padding = rate * (kernel_size - 1) // 2
    counts = torch.nn.functional.conv2d(ones, kernel, None, stride, padding, rate)[0, 0]
    conv = Convolution(
        *("some", kernel_size, stride, rate, 1, (height, width, 4), (*counts.shape, 6)),
        *(1, 1, False, 0),
    )
    assert conv.valid_fraction == pytest.approx(float(counts.mean()) / kernel_size**2, abs=1e-12)
    assert conv.valid_macs == int(counts.sum()) * 4 * 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_convolution_is_found_once_with_its_parameters(variant):
    model = model_of(variant)
    found = convolutions(model, 65, 33)
    module = nnx.eval_shape(lambda: build_model(model.architecture, rngs=ShapeRngs(0)))
    theirs = {
        ".".join(map(str, path)): (
            conv.kernel.shape[0],
            *conv.strides,
            *conv.kernel_dilation,
        )
        for path, conv in nnx.iter_modules(module)
        if isinstance(conv, Conv)
    }
    ours = {c.name: (c.kernel_size, *(c.stride, c.stride), *(c.rate, c.rate)) for c in found}
    assert ours == theirs
    assert len(found) == len(theirs)
    total = sum(leaf.size for leaf in model.abstract.params.values())
    decoder = model.abstract.params.get("decoder.kernel", np.empty(0)).size
    assert sum(conv.params for conv in found) == total - decoder


def test_parameters_of_a_norm_go_with_the_convolution_before_it():
    found = {conv.name: conv.params for conv in convolutions(model_of("paper"), 33)}
    assert found["backbone.stem.0.conv"] == 7 * 7 * 3 * 8 + 2 * 8
    assert found["backbone.layer2.0.downsample.conv"] == 8 * 16 + 2 * 16
    assert found["classifier.logits"] == 32 * 3 + 3


def test_order_is_that_of_execution():
    names = [conv.name for conv in convolutions(model_of("paper"), 33)]
    block = [f"backbone.layer2.0.{name}" for name in ("conv1", "conv2", "downsample.conv")]
    assert names[5:8] == block
    assert names[-2:] == ["classifier.aspp.project.conv", "classifier.logits"]


def test_bfloat16_gives_the_same_as_float32():
    half = FunctionalModel(
        architecture("paper_resnet18", num_classes=3, width=0.125, dtype="bfloat16")
    )
    assert convolutions(half, 65) == convolutions(model_of("paper"), 65)


# --- What a convolution sees -------------------------------------------------------------------


def without_pooling(model):
    """Variables with which each local path has a positive gradient, and pooling has none.

    Kernels are positive means, so that activations stay positive and pass each relu.
    """
    params, has_relu6 = {}, model.architecture.backbone == "mobilenet_v2"
    for name, leaf in model.abstract.params.items():
        module, _, kind = name.rpartition(".")
        value = np.zeros(leaf.shape, np.float32)
        if kind == "kernel":
            value += 1 / np.prod(leaf.shape[:3])
        if kind == "scale" and not module.startswith("classifier.aspp.branches.4"):
            value += 1
        if kind == "scale" and has_relu6 and module.endswith("project.bn"):
            value /= 10  # sums of many blocks would exceed 6
        if module.endswith("fc2"):  # squeeze-excite: its hard sigmoid is at its end, 1
            value = np.full(leaf.shape, 3.5 if kind == "bias" else 0, np.float32)
        params[name] = value
    stats = {
        name: np.full(leaf.shape, name.endswith("var"), np.float32)
        for name, leaf in model.abstract.batch_stats.items()
    }
    return Variables(params, stats)


def spans(model, size, axis):
    """First and last pixel that the middle logits of each head depend on, and the next ones.

    Along an axis of images one pixel thin. Maxima take the first pixel of a falling ramp and the
    last of a rising one.
    """
    variables = without_pooling(model)
    shape = [1, 1, 1, 3]
    shape[axis] = size
    ramp = np.linspace(1, 2, size, dtype=np.float32).reshape([s if s > 3 else 1 for s in shape])
    ramps = [np.broadcast_to(r, shape) for r in (ramp, np.flip(ramp, axis))]

    def heads(image):
        outputs, _ = model.apply(variables, image, upsample=False)
        return {name: logits.sum(3).ravel() for name, logits in outputs.items()}

    gradient = jax.jit(lambda image, weights: jax.vjp(heads, image)[1](weights)[0])
    lengths = {name: line.size for name, line in jax.eval_shape(heads, ramps[0]).items()}

    def span(name, place):
        weights = {other: np.zeros(length, np.float32) for other, length in lengths.items()}
        weights[name][place] = 1
        touched = sum(np.abs(gradient(ramp, weights)).sum(3).ravel() for ramp in ramps) > 0
        return int(touched.argmax()), size - 1 - int(touched[::-1].argmax())

    return {
        name: [span(name, length // 2), span(name, length // 2 + 1)]
        for name, length in lengths.items()
    }


@pytest.mark.parametrize(
    ("variant", "axis"), [("paper", 1), ("pre", 2), ("mobilenet", 1), ("same", 2)]
)
def test_field_of_view_and_stride_are_those_of_the_gradient(variant, axis):
    bilinear = dataclasses.replace(model_of(variant).architecture, decoder="bilinear")
    model = FunctionalModel(bilinear)
    last = {conv.name.split(".")[0]: conv for conv in convolutions(model)}
    seen = spans(model.using(XLA), last["classifier"].field_of_view + 200, axis)
    assert set(seen) == ({"out"} if variant == "paper" else {"out", "aux"})
    for name, ((first, end), (next_first, next_end)) in seen.items():
        conv = last["classifier" if name == "out" else "aux_classifier"]
        assert end - first + 1 == conv.field_of_view, name
        assert next_first - first == next_end - end == conv.output_stride, name


def test_layers_after_pooling_see_the_whole_image():
    found = {conv.name: conv for conv in convolutions(model_of("paper"), 65)}
    pooled = found.pop("classifier.aspp.branches.4.project.conv")
    assert (pooled.output_stride, pooled.field_of_view, pooled.sees_image) == (None, None, True)
    assert {n for n, c in found.items() if c.sees_image} == {
        "classifier.aspp.project.conv",
        "classifier.logits",
    }
    assert all(conv.field_of_view for conv in found.values())


@pytest.mark.parametrize("size", [(65, 97), (1, 1), (2, 31)])
def test_map_sizes_follow_from_output_strides(size):
    for conv in convolutions(model_of("pre"), *size):
        stride = conv.output_stride
        if stride is not None:
            assert conv.out_shape[:2] == tuple(-(-side // stride) for side in size)
        assert 0 < conv.valid_fraction <= 1


def stub(apply):
    """A model of one kernel, `some`, whose logits `apply(kernel, image)` are."""
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 2), jnp.float32)
    model = types.SimpleNamespace(
        architecture=types.SimpleNamespace(in_channels=3),
        abstract=Variables({"some.kernel": kernel}, {}),
        apply=lambda variables, x, upsample: (apply(variables.params["some.kernel"], x), {}),
    )
    model.using = lambda implementation: model
    return model


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def moved(x, rows):
    """The map shifted down by some rows."""
    return jnp.pad(x, ((0, 0), (rows, 0), (0, 0), (0, 0)))[:, : x.shape[1]]


@pytest.mark.parametrize(
    ("apply", "field_of_view", "output_stride"),
    [
        (lambda w, x: conv(x, w), 3, 1),
        (lambda w, x: conv(x + moved(x, 2), w), 5, 1),
        (lambda w, x: conv(moved(x, 2), w), 3, 1),
        (lambda w, x: conv(x[:, 1::3], w), 7, 3),
        (lambda w, x: conv(jnp.maximum(x[:, :6:2], x[:, 3::2]), w), 8, 2),
        (lambda w, x: conv(jnp.concatenate([x[..., :1], moved(x[..., 1:], 4)], 3), w), 7, 1),
        # Rows 0, 4, 8 at thirds: row 2 reads 0 and 4, row 3 too, so from 3 before to 3 behind.
        (lambda w, x: conv(resize_bilinear(x[:, ::4, ::4], 9, 9), w), 9, 1),
        # With aligned corners rows 1 to 7 read rows 0 and 8; with half-pixel centres only 2 to 6.
        (lambda w, x: conv(resize_bilinear(x[:, ::8, ::8], 9, 9, align_corners=True), w), 17, 1),
        (lambda w, x: conv(resize_bilinear(x[:, ::8, ::8], 9, 9), w), 15, 1),
        (lambda w, x: conv(average_pool(x, 2), w), 6, 2),
        (lambda w, x: conv(average_pool(x, 1), w), 4, 1),
    ],
)
def test_shifted_and_strided_maps(apply, field_of_view, output_stride):
    (found,) = convolutions(stub(apply), 9)
    assert (found.name, found.params) == ("some", 54)
    assert (found.field_of_view, found.output_stride) == (field_of_view, output_stride)


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(0, 65), (65, 0), (-1, 5)])
def test_refuses_an_image_without_pixels(size):
    with pytest.raises(ValueError, match="height and width must be 1 or more, got"):
        convolutions(model_of("paper"), *size)


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (
            lambda w, x: conv(x[:, ::-1], w),
            "field of view of some is not known: its input is the result of 'rev'",
        ),
        (lambda w, x: conv(x.transpose(0, 2, 1, 3), w), "some is not known: .* 'transpose'"),
        (
            lambda w, x: conv(jnp.ones_like(x), w),
            "some is not known: its input does not depend on the image",
        ),
        (lambda w, x: conv(x, jnp.abs(w)), "the kernel of .* is not an array of the model"),
        (
            lambda w, x: conv(x + x[:, ::-1], w),
            "field of view of some is not known: its input is the result of 'rev'",
        ),
        (
            lambda w, x: conv(resize_bilinear(x, 7, 7), w),
            "not known: .* 'resize_bilinear_unpadded'",
        ),
        (
            lambda w, x: conv(resize_bilinear(x, 7, 7, align_corners=True), w),
            "not known: .* 'resize_aligned_unpadded'",
        ),
    ],
)
def test_unsupported_operations_are_errors_not_wrong_numbers(apply, message):
    with pytest.raises(ValueError, match=message):
        convolutions(stub(apply), 9)


def test_maps_of_different_strides_cannot_be_joined():
    def apply(w, x):
        small = jax.lax.slice(x, (0, 0, 0, 0), x.shape, (1, 9, 9, 1))
        return conv(x[:, :1, :1] + small, w)

    with pytest.raises(ValueError, match="combines maps of output strides 1 and 9"):
        convolutions(stub(apply), 9)
