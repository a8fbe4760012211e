"""Implementations of convolutions and residual sums: equal results, and where each is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.layers import Conv, ShapeRngs
from deeplab_jax.models.ops.convolution import (
    FASTEST,
    ONEDNN,
    XLA,
    add_relu,
    use_implementation,
)

IMPLEMENTATIONS = {"fastest": FASTEST, "XLA": XLA, "oneDNN": ONEDNN}
# Arguments of `nnx.Conv`: some have implementations of their own, XLA computes the others.
CONVOLUTIONS = {
    "1x1": {"kernel_size": (1, 1)},
    "strided": {"kernel_size": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))},
    "atrous": {"kernel_size": (3, 3), "kernel_dilation": (4, 4), "padding": ((4, 4), (4, 4))},
    "grouped": {"kernel_size": (3, 3), "feature_group_count": 2, "padding": "SAME"},
    "depthwise": {"kernel_size": (5, 5), "feature_group_count": 4, "padding": ((2, 2), (2, 2))},
    "unpadded": {"kernel_size": (3, 3), "padding": "VALID"},
    "even kernel": {"kernel_size": (2, 2), "padding": ((0, 1), (0, 1))},
    "oblong": {"kernel_size": (1, 3), "strides": (1, 2)},
    "dilated input": {"kernel_size": (3, 3), "input_dilation": (2, 2), "padding": ((1, 2), (1, 2))},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_each_is_xlas_convolution(x64, kind, implementation):
    options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)} | CONVOLUTIONS[kind]
    conv = nnx.Conv(4, 8 if kind != "depthwise" else 4, **options)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 7, 4)))
    expected = conv(x)
    use_implementation(conv, IMPLEMENTATIONS[implementation])
    np.testing.assert_allclose(jax.jit(lambda x: conv(x))(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_gets_one_implementation_except_where_one_was_chosen(implementation):
    chosen = architecture("torchvision_resnet18", num_classes=3, width=0.125)
    model = nnx.eval_shape(lambda: build_model(chosen, rngs=ShapeRngs(0)))

    def own(*args, **kwargs):
        return lax.conv_general_dilated(*args, **kwargs)

    model.backbone.stem[0].conv.conv_general_dilated = own
    model.classifier.logits.conv_general_dilated = lax.conv_general_dilated
    use_implementation(model, IMPLEMENTATIONS[implementation])
    convolve, total = IMPLEMENTATIONS[implementation]
    parts = dict(nnx.iter_modules(model))
    functions = {
        ".".join(map(str, path)): part.conv_general_dilated
        for path, part in parts.items()
        if isinstance(part, nnx.Conv)
    }
    assert functions.pop("backbone.stem.0.conv") is own
    assert set(functions.values()) == {convolve}
    assert "classifier.logits" in functions
    sums = [part.add_relu for part in parts.values() if hasattr(part, "add_relu")]
    assert sums == [total] * 8


def test_a_model_is_made_with_the_fastest():
    conv = Conv(4, 4, rngs=nnx.Rngs(0))
    assert conv.conv_general_dilated is FASTEST.conv_general_dilated
    chosen = architecture("paper_resnet18", num_classes=3, width=0.125)
    model = nnx.eval_shape(lambda: build_model(chosen, rngs=ShapeRngs(0)))
    block = model.backbone.layer1[0]
    assert (block.conv1.conv_general_dilated, block.add_relu) == FASTEST


# Residual sums


@pytest.mark.parametrize(
    ("platform", "gradient", "implementation", "once"),
    [
        ("cpu", False, FASTEST, True),
        ("cpu", True, FASTEST, False),
        ("cpu", False, XLA, False),  # read by exporters and the partitioner
        ("cpu", False, ONEDNN, False),
        ("cuda", False, FASTEST, False),
    ],
)
def test_the_sum_of_a_block_is_computed_once_on_cpu(platform, gradient, implementation, once):
    def total(shortcut, y, parameter):
        return implementation.add_relu(shortcut, y, parameter).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 3, 3, 2), (1, 3, 3, 2), ())]
    function = jax.grad(total, argnums=(0, 1)) if gradient else total
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.compare GE" in text) == once  # whether the condition is read


@pytest.mark.parametrize("parameter", [1.0, -1.0, float("nan")])
def test_the_sum_of_a_block_and_its_gradients(parameter):
    """The value of the condition has no effect."""
    rng = np.random.default_rng(0)
    shortcut, y, cotangent = jnp.asarray(rng.normal(size=(3, 1, 3, 3, 2)), jnp.float32)
    parameter, expected = jnp.float32(parameter), np.maximum(shortcut + y, 0)
    np.testing.assert_array_equal(add_relu(shortcut, y, parameter), expected)
    value, gradient = jax.vjp(lambda x, y: add_relu(x, y, parameter), shortcut, y)
    np.testing.assert_array_equal(value, expected)
    for each in gradient(cotangent):
        np.testing.assert_array_equal(each, np.where(shortcut + y > 0, cotangent, 0))


def test_inference_on_a_sharded_batch_has_no_communication():
    """Each device has all that a block needs for its residual sum."""
    mesh = jax.make_mesh((4,), ("data",))
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    model = FunctionalModel(architecture("paper_resnet18", num_classes=3, width=0.125)).fused
    images = jax.ShapeDtypeStruct((4, 33, 33, 3), jnp.float32)
    run = jax.jit(
        lambda v, x: model.apply(v, x)[0]["out"], in_shardings=(whole, rows), out_shardings=rows
    )
    text = run.lower(model.abstract, images).compile().as_text()
    assert "conditional" in text
    for collective in ("all-reduce", "all-gather", "collective-permute", "all-to-all"):
        assert f" {collective}" not in text
