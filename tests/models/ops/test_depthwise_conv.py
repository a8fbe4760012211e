"""Depthwise convolution against torch, and the method for each platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deeplab_jax.models.layers import Conv
from deeplab_jax.models.ops.depthwise_conv import METHODS, depthwise_conv


def torch_depthwise(x, kernel, stride, rate):
    """Returns the output, as a tensor with a gradient, and the inputs as tensors."""
    x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    kernel = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    padding = rate * (kernel.shape[2] // 2)
    options = {"stride": stride, "dilation": rate, "padding": padding, "groups": len(kernel)}
    return torch.nn.functional.conv2d(x, kernel, **options), x, kernel


# Strides that do and do not divide the size; a rate beyond the map; one pixel.
@pytest.mark.parametrize(
    ("height", "width", "kernel_size", "stride", "rate"),
    [
        (7, 10, 3, 1, 1),
        (8, 7, 3, 2, 1),
        (9, 6, 5, 2, 1),
        (9, 6, 5, 1, 2),
        (10, 11, 5, 2, 3),
        (4, 6, 5, 1, 7),
        (1, 1, 3, 2, 1),
        (3, 5, 1, 2, 1),
    ],
)
@pytest.mark.parametrize("method", [*METHODS, None])
def test_equals_torch_with_gradients(x64, method, height, width, kernel_size, stride, rate):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 6))
    kernel = rng.normal(size=(kernel_size, kernel_size, 1, 6))
    expected, *inputs = torch_depthwise(x, kernel, stride, rate)
    weights = rng.normal(size=expected.detach().numpy().transpose(0, 2, 3, 1).shape)
    (expected * torch.tensor(weights.transpose(0, 3, 1, 2))).sum().backward()

    def loss(x, kernel):
        y = depthwise_conv(x, kernel, strides=stride, kernel_dilation=rate, method=method)
        return (y * weights).sum(), y

    (of_x, of_kernel), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)
    assert y.dtype == jnp.float64
    theirs = expected.detach(), inputs[0].grad, inputs[1].grad
    axes = (0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0)
    for ours, other, order in zip((y, of_x, of_kernel), theirs, axes, strict=True):
        np.testing.assert_allclose(ours, other.numpy().transpose(order), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_rounded_once(method):
    """25 products of ones: a sum kept in bfloat16 would stall long before 25 * 129 = 3225."""
    x, kernel = jnp.full((1, 9, 9, 2), 129, jnp.bfloat16), jnp.ones((5, 5, 1, 2), jnp.bfloat16)
    y = depthwise_conv(x, kernel, method=method)
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 4, 4, 0]) == float(jnp.bfloat16(3225))


def test_each_platform_gets_its_own():
    x, kernel = jnp.ones((1, 9, 9, 4)), jnp.ones((3, 3, 1, 4))
    traced = jax.jit(lambda x, kernel: depthwise_conv(x, kernel, kernel_dilation=2)).trace(
        x, kernel
    )
    for platform, convolutions in {"cpu": 0, "cuda": 1, "tpu": 1}.items():
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.convolution") == convolutions, platform


def test_module():
    conv = Conv(4, 4, 3, strides=2, kernel_dilation=2, feature_group_count=4, rngs=nnx.Rngs(0))
    assert conv.kernel.shape == (3, 3, 1, 4)
    x = np.random.default_rng(0).normal(size=(1, 8, 9, 4)).astype(np.float32)
    expected, *_ = torch_depthwise(x, np.asarray(conv.kernel[...]), 2, 2)
    y = jax.jit(lambda x: conv(x))(x)
    np.testing.assert_allclose(y, expected.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 1, 8), (3, 3, 4, 4), (3, 3, 2, 4)])
def test_refuses_other_groups(shape):
    with pytest.raises(ValueError, match=r"kernel must be \[k, k, 1, 4\], got \[3, 3, "):
        depthwise_conv(jnp.ones((1, 5, 5, 4)), jnp.ones(shape))
