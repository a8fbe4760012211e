"""Atrous convolution against a float64 loop and torch's gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deeplab_jax.models.ops import atrous_conv as atrous
from deeplab_jax.models.ops.atrous_conv import METHODS, atrous_conv, valid_fraction

# height, width, kernel size, stride, rate
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 1, 3, 1, 1),
    (1, 1, 3, 2, 4),
    (1, 7, 3, 1, 2),
    (5, 4, 1, 2, 1),
    (5, 4, 3, 1, 1),
    (5, 4, 3, 1, 3),
    (5, 4, 3, 1, 5),  # a tap of each axis, then all but the centre, falls off the map
    (5, 4, 3, 1, 40),
    (6, 9, 3, 2, 1),
    (6, 9, 3, 2, 2),
    (7, 9, 3, 2, 3),
    (7, 9, 3, 3, 2),
    (8, 5, 5, 1, 2),
    (8, 5, 5, 2, 3),
    (9, 10, 7, 2, 1),
]


def loop_reference(x, kernel, stride=1, rate=1):
    """Computes the convolution in a loop over output pixels and taps."""
    n, h, w, _ = x.shape
    k, _, group_channels, out_channels = kernel.shape
    groups = x.shape[3] // group_channels
    group_out = out_channels // groups
    out = np.zeros((n, -(-h // stride), -(-w // stride), out_channels))
    taps = range(-(k // 2), k // 2 + 1)
    for i, j, di, dj in itertools.product(range(out.shape[1]), range(out.shape[2]), taps, taps):
        row, column = i * stride + di * rate, j * stride + dj * rate
        if not (0 <= row < h and 0 <= column < w):
            continue
        for group in range(groups):
            of = slice(group * group_out, (group + 1) * group_out)
            values = x[:, row, column, group * group_channels : (group + 1) * group_channels]
            out[:, i, j, of] += values @ kernel[di + k // 2, dj + k // 2, :, of]
    return out


def random_case(h, w, k, *, in_channels=3, group_channels=None, out_channels=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, h, w, in_channels))
    return x, rng.normal(size=(k, k, group_channels or in_channels, out_channels))


# Compiling one program per case is several times faster than one per operation.
jitted_conv = jax.jit(atrous_conv, static_argnames=("strides", "kernel_dilation", "method"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("h", "w", "k", "stride", "rate"), SHAPES)
def test_equals_the_loop(x64, method, h, w, k, stride, rate):
    x, kernel = random_case(h, w, k)
    ours = jitted_conv(
        jnp.asarray(x), jnp.asarray(kernel), strides=stride, kernel_dilation=rate, method=method
    )
    expected = loop_reference(x, kernel, stride, rate)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("stride", "rate"), [(1, 1), (2, 1), (1, 3)])
def test_groups_equal_the_loop(x64, stride, rate):
    x, kernel = random_case(7, 5, 3, in_channels=6, group_channels=2, out_channels=9)
    ours = jitted_conv(jnp.asarray(x), jnp.asarray(kernel), strides=stride, kernel_dilation=rate)
    np.testing.assert_allclose(ours, loop_reference(x, kernel, stride, rate), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("h", "w", "k", "stride", "rate"),
    [(7, 9, 3, 1, 2), (7, 9, 3, 2, 3), (5, 4, 3, 1, 5), (6, 5, 1, 2, 1), (1, 1, 3, 1, 4)],
)
def test_gradients_equal_torch(x64, method, h, w, k, stride, rate):
    x, kernel = random_case(h, w, k)
    cotangent = np.random.default_rng(1).normal(size=(2, -(-h // stride), -(-w // stride), 4))

    @jax.jit
    def gradients(x, kernel):
        def conv(x, kernel):
            return atrous_conv(x, kernel, strides=stride, kernel_dilation=rate, method=method)

        return jax.vjp(conv, x, kernel)[1](jnp.asarray(cotangent))

    ours = gradients(x, kernel)

    torch_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    torch_kernel = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    theirs = torch.nn.functional.conv2d(
        torch_x, torch_kernel, stride=stride, padding=rate * (k - 1) // 2, dilation=rate
    )
    theirs.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(ours[0], torch_x.grad.numpy().transpose(0, 2, 3, 1), atol=1e-11)
    np.testing.assert_allclose(ours[1], torch_kernel.grad.numpy().transpose(2, 3, 1, 0), atol=1e-11)


@pytest.mark.parametrize("chosen", [atrous._on_cpu, atrous._on_cuda])
@pytest.mark.parametrize(("h", "w", "rate"), [(7, 9, 2), (5, 9, 7), (19, 17, 3), (19, 17, 8)])
def test_platform_methods_have_the_gradients_of_the_native_one(x64, chosen, h, w, rate):
    x, kernel = (jnp.asarray(a) for a in random_case(h, w, 3))

    def gradients(conv):
        value, gradient = jax.vjp(conv, x, kernel)
        return value, *gradient(jnp.cos(value))

    def native(x, kernel):
        return atrous_conv(x, kernel, kernel_dilation=rate, method="native")

    def on_platform(x, kernel):
        return chosen(x, kernel, kernel_dilation=rate)

    expected = jax.jit(gradients, static_argnums=0)(native)
    ours = jax.jit(gradients, static_argnums=0)(on_platform)
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-11)
    # Without a gradient another method may be used.
    np.testing.assert_allclose(jax.jit(on_platform)(x, kernel), expected[0], atol=1e-12)


def test_one_method_everywhere():
    assert "convolution" in lowered("cpu", 1, 64, 33, 1, method="phases")
    assert "convolution" not in lowered("cpu", 1, 64, 33, 1)
    message = "one of native, valid_taps, valid_blocks, phases, got 'fast'"
    with pytest.raises(ValueError, match=message):
        lowered("cpu", 1, 64, 33, 1, method="fast")


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_rounded_once(method):
    """Sums are accumulated in float32, so that only the result is rounded."""
    x, kernel = (a.astype(jnp.bfloat16) for a in random_case(9, 9, 3, in_channels=256))
    ours = atrous_conv(jnp.asarray(x), jnp.asarray(kernel), kernel_dilation=3, method=method)
    assert ours.dtype == jnp.bfloat16
    expected = loop_reference(x.astype(np.float64), kernel.astype(np.float64), rate=3)
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_a_pointwise_product_has_the_gradients_of_the_native_convolution(x64):
    x, kernel = (jnp.asarray(a) for a in random_case(5, 7, 1))

    def gradients(conv):
        value, gradient = jax.vjp(conv, x, kernel)
        return value, *gradient(jnp.cos(value))

    def native(x, kernel):
        return atrous_conv(x, kernel, method="native")

    ours, expected = gradients(atrous._pointwise_on_cuda), gradients(native)
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-11)


def lowered(platform, k, in_channels, size, rate, gradient=False, method=None):
    """Returns the StableHLO of the convolution for a platform, which need not be available."""

    def conv(x, kernel):
        return atrous_conv(x, kernel, kernel_dilation=rate, method=method)

    function = jax.grad(lambda *a: conv(*a).sum(), argnums=(0, 1)) if gradient else conv
    shapes = (
        jax.ShapeDtypeStruct((1, size, size, in_channels), jnp.float32),
        jax.ShapeDtypeStruct((k, k, in_channels, 32), jnp.float32),
    )
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("platform", "k", "in_channels", "size", "rate", "products"),
    [
        ("cpu", 1, 64, 33, 1, True),
        ("cpu", 3, 512, 33, 2, False),  # 92 % of the taps are valid
        ("cpu", 3, 2048, 33, 6, True),  # 77 %
        ("cpu", 3, 2048, 33, 12, True),  # 57 %
        ("cpu", 3, 64, 33, 18, True),
        ("cpu", 3, 32, 33, 18, False),  # 40 %, but of too few channels
        ("tpu", 1, 64, 33, 1, False),
        ("tpu", 3, 2048, 33, 18, False),
        ("cuda", 1, 64, 33, 1, True),
        ("cuda", 3, 2048, 33, 18, False),
    ],
)
def test_the_method_is_chosen_when_lowering(
    platform, k, in_channels, size, rate, products, gradient
):
    text = lowered(platform, k, in_channels, size, rate, gradient)
    assert ("stablehlo.dot_general" in text) == products
    assert ("stablehlo.convolution" in text) != products


def test_on_cpu_forward_and_gradients_have_limits_of_their_own():
    assert "stablehlo.convolution" in lowered("cpu", 3, 512, 33, 4)  # 84 %
    assert "stablehlo.convolution" not in lowered("cpu", 3, 512, 33, 4, gradient=True)


def test_blocks_read_each_pixel_once(x64):
    """Apart from the centre tap's product with the map, the slices add up to its pixels."""

    def sizes(size, rate):
        conv = functools.partial(atrous_conv, kernel_dilation=rate, method="valid_blocks")
        shapes = (jnp.zeros((1, size, size, 1)), jnp.zeros((3, 3, 1, 1)))
        equations = jax.make_jaxpr(conv)(*shapes).eqns
        return [
            e.outvars[0].aval.size
            for e in equations
            if e.primitive.name == "slice" and e.invars[0].aval.shape == (1, size, size, 1)
        ]

    assert sum(sizes(33, 12)) == sum(sizes(33, 20)) == 33**2


@pytest.mark.parametrize(
    ("size", "k", "stride", "rate"), [(33, 3, 1, 18), (7, 5, 2, 3), (4, 3, 1, 9)]
)
def test_valid_fraction_counts_taps(size, k, stride, rate):
    ones = jnp.ones((1, size, 1, 1))
    kernel = jnp.zeros((k, k, 1, 1)).at[:, k // 2].set(1)  # only rows count
    options = {"strides": stride, "kernel_dilation": rate}
    taps = atrous_conv(ones, kernel, method="native", **options)[:, :, 0]
    assert valid_fraction([size], k, **options) == pytest.approx(float(taps.mean()) / k)


def test_the_rule_of_choice_reads_both_axes():
    wide, tall = (1, 8, 200, 256), (1, 200, 8, 256)
    for shape in (wide, tall):  # one axis has only its centre's taps left
        assert atrous._taps_win_on_cpu(shape, (3, 3, 256, 8), 8)


@pytest.mark.parametrize(
    ("kernel_shape", "options", "message"),
    [
        ((2, 2, 3, 4), {}, r"one odd side .* got \[2, 2, 3, 4\]"),
        ((3, 1, 3, 4), {}, r"one odd side .* got \[3, 1, 3, 4\]"),
        ((3, 3, 2, 4), {}, "input channels that divide those of x, 3; got"),
        ((3, 3, 3, 4), {"kernel_dilation": 0}, "must be 1 or more, got 1 and 0"),
        ((3, 3, 3, 4), {"strides": 0}, "must be 1 or more, got 0 and 1"),
    ],
)
def test_refuses(kernel_shape, options, message):
    with pytest.raises(ValueError, match=message):
        atrous_conv(jnp.ones((1, 5, 5, 3)), jnp.ones(kernel_shape), **options)
