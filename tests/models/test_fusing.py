"""Batch norm fused into the preceding convolution gives the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.fusion import fuse_batch_norm
from deeplab_jax.models.ops.convolution import XLA
from random_modules import random_variables

VARIANTS = {
    "basic": ("paper_resnet18", {"width": 0.125}),
    "bottleneck, torchvision's head": ("torchvision_resnet50", {"width": 0.125}),
    "pre-activation, deep stem": ("paper_resnet18", {"residual": "pre", "stem": "deep"}),
    "plus": ("paper_resnet18", {"decoder": "plus"}),
    "mobilenet, SAME padding": ("tf_mobilenet_v2", {}),
    "mobilenet": ("torchvision_mobilenet_v3_large", {"width": 0.25}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_logits_are_the_same(x64, variant):
    name, options = VARIANTS[variant]
    chosen = architecture(name, num_classes=3, dtype="float64", **{"width": 0.125} | options)
    model = FunctionalModel(chosen)
    variables = random_variables(model)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 37, 45, 3)))

    @jax.jit
    def both(variables, images):
        return model.apply(variables, images), model.fused.apply(model.fuse(variables), images)

    (plain, kept), (fused, _) = both(variables, images)
    for head in plain:
        scale = jnp.abs(plain[head]).max()
        np.testing.assert_allclose(fused[head], plain[head], atol=1e-12 * float(scale))
    # Other running statistics give other logits, so the comparison above is not trivial.
    moved = variables._replace(batch_stats={n: v * 2 for n, v in kept.items()})
    assert not np.allclose(both(moved, images)[1][0]["out"], fused["out"], atol=1e-6)


@pytest.mark.parametrize("affine", [False, True])
def test_a_convolution_with_a_bias_and_any_batch_norm_of_flax_are_fused(affine):
    class Block(nnx.Module):
        def __init__(self, rngs):
            key = rngs.params()
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs, bias_init=nnx.initializers.normal())
            self.norm = nnx.BatchNorm(4, use_scale=affine, use_bias=affine, rngs=rngs)
            self.norm.mean.set_value(jax.random.normal(key, 4))
            self.norm.var.set_value(jax.random.uniform(key, 4, minval=0.5, maxval=2))

        def conv_norms(self):
            return [("conv", "norm")]

        def __call__(self, x):
            return self.norm(self.conv(x))

    block, images = Block(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    block.eval()
    expected = block(images)
    for _ in range(2):  # the second time nothing is left to fuse
        fuse_batch_norm(block)
        assert not isinstance(block.norm, nnx.BatchNorm)
        np.testing.assert_allclose(block(images), expected, atol=1e-5)


def test_fusing_leaves_no_normalisation_in_the_program():
    model = FunctionalModel(architecture("paper_resnet18", num_classes=3, width=0.125))
    images = jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.float32)

    def multiplications_of_maps(model):
        jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x)[0])
        equations = jaxpr(model.abstract, images).eqns
        shapes = [e.outvars[0].aval.shape for e in equations if e.primitive.name == "mul"]
        return sum(len(shape) == 4 and shape[0] == 2 for shape in shapes)

    assert multiplications_of_maps(model) > 20
    assert multiplications_of_maps(model.fused) == 0
    assert model.fused.abstract == jax.eval_shape(model.fuse, model.abstract)


def test_fusing_keeps_the_kind_of_arrays():
    """NumPy arrays stay on the host, and JAX arrays on their device."""
    model = FunctionalModel(architecture("paper_resnet18", num_classes=3, width=0.125))
    variables = random_variables(model)
    on_host = model.fuse(jax.device_get(variables))
    for expected, found in zip(
        jax.tree.leaves(model.fuse(variables)), jax.tree.leaves(on_host), strict=True
    ):
        assert type(found) is np.ndarray
        assert found.dtype == expected.dtype == np.float32
        assert isinstance(expected, jax.Array)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert model.fused.fuse(on_host) is on_host


def test_a_fused_model_is_not_trained():
    """In training, batch norm needs statistics of the convolution's output."""
    model = FunctionalModel(architecture("paper_resnet18", num_classes=3, width=0.125, dropout=0))
    fused = model.fuse(random_variables(model))
    with pytest.raises(ValueError, match="is for inference: train the original"):
        model.fused.apply(fused, jnp.zeros((2, 33, 33, 3)), train=True)


@pytest.mark.parametrize("decoder", ["bilinear", "transposed"])
def test_logits_before_they_are_upsampled(decoder):
    chosen = architecture(
        "torchvision_resnet18", num_classes=3, width=0.125, output_stride=16, decoder=decoder
    )
    model = FunctionalModel(chosen)
    variables = random_variables(model)
    images = jnp.ones((1, 33, 49, 3))
    outputs, _ = jax.jit(lambda v, x: model.apply(v, x, upsample=False))(variables, images)
    assert outputs["aux"].shape == (1, 3, 4, 3)
    assert outputs["out"].shape == ((1, 3, 4, 3) if decoder == "bilinear" else (1, 33, 49, 3))


@pytest.mark.parametrize("fused", [False, True])
def test_another_output_stride_keeps_the_implementation_and_the_fused_norms(fused):
    model = FunctionalModel(architecture("paper_resnet18", num_classes=3, width=0.125))
    model = (model.fused if fused else model).using(XLA).at_output_stride(8)
    assert model.architecture.output_stride == 8
    assert model.is_fused == fused
    assert (model.fused is model) == fused
    program = jax.make_jaxpr(lambda v, x: model.apply(v, x)[0])(
        model.abstract, jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    )
    assert "platform_index" not in str(program)
    assert ("rsqrt" in str(program)) != fused
