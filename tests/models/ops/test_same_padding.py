"""SAME padding against PyTorch with explicit zeros, for all implementations and kinds of sizes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import export, lax

from deeplab_jax.config import MeshConfig
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.models.layers import Conv, ShapeRngs
from deeplab_jax.models.ops.convolution import fastest_conv, onednn_conv, xla_conv
from deeplab_jax.models.ops.masking import padding_mask

IMPLEMENTATIONS = (fastest_conv, xla_conv, onednn_conv)
SIZES = [(1, 2), (2, 1), (7, 8), (8, 8), (9, 7), (6, 5)]
CHANNELS = 4


@functools.cache
def make_conv(kernel_size=3, groups=1, implementation=fastest_conv, strides=2):
    conv = Conv(
        *(CHANNELS, CHANNELS, kernel_size, strides),
        padding="same",
        feature_group_count=groups,
        conv_general_dilated=implementation,
        dtype=jnp.float64,
        rngs=ShapeRngs(0),
    )
    kernel = np.random.default_rng(kernel_size).normal(size=conv.kernel.shape)
    conv.kernel[...] = jnp.asarray(kernel)
    return conv


def in_torch(x, kernel, strides=2):
    """Pads as TensorFlow's documentation says, and convolves; of tensors with JAX's axes."""
    side, (height, width) = kernel.shape[0], x.shape[1:3]

    def pads(size):
        total = max((-(-size // strides) - 1) * strides + side - size, 0)
        return total // 2, total - total // 2

    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (*pads(width), *pads(height)))
    groups = x.shape[3] // kernel.shape[2]
    y = torch.nn.functional.conv2d(padded, kernel.permute(3, 2, 0, 1), None, strides, groups=groups)
    return y.permute(0, 2, 3, 1)


def expected_of(conv, x):
    tensors = (torch.tensor(np.asarray(each)) for each in (x, conv.kernel[...]))
    return in_torch(*tensors, conv.strides[0]).numpy()


def random_map(height, width, rows=2):
    return np.random.default_rng(height).normal(size=(rows, height, width, CHANNELS))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("kernel_size", "groups"), [(3, 1), (3, CHANNELS), (5, CHANNELS)])
def test_equals_explicit_padding(x64, implementation, kernel_size, groups):
    conv = make_conv(kernel_size, groups, implementation)
    for size in SIZES:
        x = random_map(*size)
        y = conv(jnp.asarray(x))
        assert y.shape[1:3] == tuple(-(-side // 2) for side in size)
        np.testing.assert_allclose(y, expected_of(conv, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_stride_1_is_symmetric(x64, kernel_size):
    conv, x = make_conv(kernel_size, strides=1), random_map(5, 6)
    assert conv.padding == ((kernel_size // 2,) * 2,) * 2
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected_of(conv, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, CHANNELS])
def test_gradients_equal_torch(x64, groups):
    conv = make_conv(groups=groups)
    graph, state = nnx.split(conv)
    for size in ((7, 8), (6, 6)):
        x = random_map(*size)
        weights = np.random.default_rng(1).normal(size=expected_of(conv, x).shape)
        ours = jax.grad(
            lambda x, state, weights=weights: (nnx.merge(graph, state)(x) * weights).sum(),
            argnums=(0, 1),
        )(jnp.asarray(x), state)
        leaves = [torch.tensor(np.asarray(a), requires_grad=True) for a in (x, conv.kernel[...])]
        (in_torch(*leaves) * torch.tensor(weights)).sum().backward()
        for gradient, leaf in zip(jax.tree.leaves(ours), leaves, strict=True):
            np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, CHANNELS])
def test_each_image_under_a_padding_mask_has_the_padding_of_its_own_size(
    x64, implementation, groups
):
    """Two convolutions, so that the second reads maps of both parities, too."""
    conv, alone = make_conv(3, groups, implementation), make_conv(3, groups)
    sizes = list(itertools.product((5, 6, 7, 8, 1), (7, 10, 12)))
    images = [random_map(*size, rows=1)[0] for size in sizes]
    for padded_size in ((8, 12), (9, 13)):
        padded = np.full((len(sizes), *padded_size, CHANNELS), np.nan)
        for row, image in zip(padded, images, strict=True):
            row[: image.shape[0], : image.shape[1]] = image

        @jax.jit
        def run(padded):
            with padding_mask(jnp.asarray(sizes), padded.shape):
                return conv(conv(padded))

        for y, image in zip(run(padded), images, strict=True):
            expected = expected_of(alone, expected_of(alone, image[None]))[0]
            ours = y[: expected.shape[0], : expected.shape[1]]
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_a_1x1_kernel_needs_no_padding(x64):
    conv = nnx.Conv(CHANNELS, CHANNELS, (1, 1), 2, use_bias=False, rngs=nnx.Rngs(0))
    x = random_map(6, 7)
    expected = x[:, ::2, ::2] @ np.asarray(conv.kernel[0, 0])
    for implementation in IMPLEMENTATIONS:
        conv.conv_general_dilated = implementation
        for sizes in (None, jnp.asarray([(6, 7), (6, 7)])):
            with padding_mask(sizes, x.shape):
                np.testing.assert_allclose(conv(jnp.asarray(x)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, CHANNELS])
def test_one_program_for_all_sizes(x64, implementation, groups):
    conv = make_conv(3, groups, implementation)
    shape = export.symbolic_shape(f"n, h, w, {CHANNELS}")
    images = jax.ShapeDtypeStruct(shape, jnp.float64)
    exported = export.export(jax.jit(lambda x: conv(conv(x))), platforms=("cpu", "cuda"))(images)
    for size in SIZES:
        x = random_map(*size)
        expected = expected_of(conv, expected_of(conv, x))
        np.testing.assert_allclose(exported.call(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("height", [16, 24, 12])  # over 4 devices, even and odd shares
@pytest.mark.parametrize("masked", [False, True])
def test_spatial_partitioning(x64, height, masked):
    conv = make_conv(3, CHANNELS, xla_conv)
    mesh = mesh_lib.make_mesh(MeshConfig(data=1, space=4), jax.devices()[:4])
    x = random_map(height, 10)
    sizes = jnp.asarray([(height - 3, 10), (height, 7)]) if masked else None

    def run(x):
        with padding_mask(sizes, x.shape):
            return conv(conv(x))

    sharded = jax.jit(run, in_shardings=mesh_lib.image_sharding(mesh))
    program = sharded.lower(jnp.asarray(x)).compile()
    assert "collective-permute" in program.as_text()  # neighbours exchange rows
    y = sharded(jnp.asarray(x))
    np.testing.assert_allclose(y, jax.jit(run)(jnp.asarray(x)), rtol=0, atol=1e-12)


def test_depthwise_convolutions_on_cpu_are_not_xlas():
    """XLA's own are many times slower there."""
    x = jax.ShapeDtypeStruct((1, 8, 9, CHANNELS), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 1, CHANNELS), jnp.float32)
    options = {
        "dimension_numbers": lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
        "feature_group_count": CHANNELS,
    }

    def program(implementation, sizes=None):
        def run(x, kernel):
            with padding_mask(sizes, x.shape):
                return implementation(x, kernel, (2, 2), "SAME", **options)

        return jax.jit(run).lower(x, kernel).as_text()

    for sizes in (None, jnp.asarray([(7, 9)])):
        for implementation in (fastest_conv, onednn_conv):
            assert "stablehlo.convolution" not in program(implementation, sizes)
        assert "stablehlo.convolution" in program(xla_conv, sizes)
