"""Layers against torch, NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from deeplab_jax.models.decoders import TransposedDecoder
from deeplab_jax.models.fusion import fuse_batch_norm
from deeplab_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvBN,
    ShapeRngs,
    batch_norm,
    param_dtype,
    scaled_channels,
)
from deeplab_jax.models.ops.masking import padding_mask
from deeplab_jax.models.ops.pooling import average_pool, max_pool
from deeplab_jax.models.ops.resize import resize_bilinear
from random_modules import random_module
from torch_layers import conv_norm_relu, from_torch, to_torch


def norm_with_values(channels, *, momentum=0.9, epsilon=1e-5, dtype="float64", seed=0):
    """Returns a batch norm with random variables."""
    rng = np.random.default_rng(seed)
    norm = BatchNorm(channels, momentum=momentum, epsilon=epsilon, param_dtype=dtype)
    norm.scale[...] = jnp.asarray(rng.uniform(0.5, 2, channels), norm.scale.dtype)
    norm.bias[...] = jnp.asarray(rng.normal(size=channels), norm.bias.dtype)
    norm.mean[...] = jnp.asarray(rng.normal(size=channels), norm.mean.dtype)
    norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, channels), norm.var.dtype)
    return norm


def torch_norm(norm):
    theirs = torch.nn.BatchNorm2d(norm.scale.shape[0], eps=norm.epsilon, momentum=0.1).double()
    with torch.no_grad():
        theirs.weight[:] = torch.tensor(np.asarray(norm.scale[...]))
        theirs.bias[:] = torch.tensor(np.asarray(norm.bias[...]))
        theirs.running_mean[:] = torch.tensor(np.asarray(norm.mean[...]))
        theirs.running_var[:] = torch.tensor(np.asarray(norm.var[...]))
    return theirs


def apply_norm(norm, x):
    """Returns a function of the parameters that normalizes a training batch, and the parameters."""
    graph, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

    def run(params, x):
        module = nnx.merge(graph, params, stats, copy=True)
        return module(x, use_running_average=False), nnx.state(module, nnx.BatchStat)

    return run, params


class TestBatchNorm:
    @pytest.mark.parametrize("train", [True, False])
    def test_equals_torch(self, x64, train):
        x = np.random.default_rng(1).normal(3, 2, size=(3, 4, 5, 6))
        ours = norm_with_values(6, epsilon=1e-3)
        theirs = torch_norm(ours).train(train)
        old_var = np.asarray(ours.var[...])
        y = ours(jnp.asarray(x), use_running_average=not train)
        np.testing.assert_allclose(y, from_torch(theirs(to_torch(x))), atol=1e-12)
        np.testing.assert_allclose(ours.mean[...], theirs.running_mean, atol=1e-12)
        # torch adds the unbiased variance, n / (n - 1) times ours, with n = 60 values.
        ours_added, theirs_added = ours.var[...] - 0.9 * old_var, theirs.running_var - 0.9 * old_var
        ratio = 60 / 59 if train else 1
        np.testing.assert_allclose(ours_added * ratio, theirs_added, atol=1e-12)

    def test_gradients_equal_torch(self, x64):
        rng = np.random.default_rng(2)
        x, cotangent = rng.normal(1, 2, size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 5))
        norm = norm_with_values(5)
        theirs = torch_norm(norm).train()
        run, params = apply_norm(norm, x)
        grads, x_grad = jax.vjp(lambda p, x: run(p, x)[0], params, jnp.asarray(x))[1](
            jnp.asarray(cotangent)
        )
        torch_x = to_torch(x).requires_grad_()
        theirs(torch_x).backward(to_torch(cotangent))
        np.testing.assert_allclose(x_grad, from_torch(torch_x.grad), atol=1e-12)
        np.testing.assert_allclose(grads["scale"].get_value(), theirs.weight.grad, atol=1e-12)
        np.testing.assert_allclose(grads["bias"].get_value(), theirs.bias.grad, atol=1e-12)

    @pytest.mark.parametrize("momentum", [0.9, 0.9997])
    def test_running_statistics_follow_the_recurrence(self, momentum):
        norm = BatchNorm(4, momentum=momentum, epsilon=1e-3)
        mean, var = np.zeros(4), np.ones(4)
        for seed in range(3):
            x = np.random.default_rng(seed).normal(seed, 1 + seed, size=(2, 5, 5, 4))
            norm(jnp.asarray(x, jnp.float32), use_running_average=False)
            mean = momentum * mean + (1 - momentum) * x.mean((0, 1, 2))
            var = momentum * var + (1 - momentum) * x.var((0, 1, 2))
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)

    def test_statistics_are_float32_under_bfloat16(self):
        norm = BatchNorm(3, momentum=0.9, epsilon=1e-5, param_dtype=param_dtype(jnp.bfloat16))
        x = np.random.default_rng(1).normal(1, 2, size=(4, 9, 9, 3)).astype(jnp.bfloat16)
        y = norm(jnp.asarray(x), use_running_average=False)
        assert y.dtype == jnp.bfloat16
        exact = x.astype(np.float64)
        assert norm.mean.dtype == norm.var.dtype == norm.scale.dtype == jnp.float32
        np.testing.assert_allclose(norm.mean[...], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * exact.var((0, 1, 2)), rtol=1e-5)
        rounded = np.asarray(norm.mean[...]).astype(jnp.bfloat16).astype(np.float32)
        assert not np.array_equal(rounded, norm.mean[...])  # bfloat16 cannot represent them

    def test_one_value_per_channel_gives_the_bias_and_no_nan(self):
        norm = norm_with_values(5, dtype="float32")
        x = jnp.asarray(np.random.default_rng(1).normal(7, 9, size=(1, 1, 1, 5)), jnp.float32)
        run, params = apply_norm(norm, x)
        y, stats = jax.jit(run)(params, x)
        np.testing.assert_allclose(y[0, 0, 0], norm.bias[...], atol=1e-6)
        np.testing.assert_allclose(
            stats["var"].get_value(), 0.9 * norm.var[...], rtol=1e-4, atol=1e-5
        )
        grads, x_grad = jax.jit(jax.grad(lambda p, x: run(p, x)[0].sum(), argnums=(0, 1)))(
            params, x
        )
        np.testing.assert_allclose(x_grad, 0, atol=1e-6)
        np.testing.assert_allclose(grads["bias"].get_value(), 1)
        np.testing.assert_allclose(grads["scale"].get_value(), 0, atol=1e-6)

    @pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
    def test_statistics_of_a_sharded_batch_are_global(self):
        x = np.random.default_rng(1).normal(size=(4, 3, 3, 2)) + np.arange(4)[:, None, None, None]
        x = x.astype(np.float32)
        run, params = apply_norm(BatchNorm(2, momentum=0.5, epsilon=1e-5), x)
        mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
        divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        y, stats = jax.jit(run)(params, divided)
        np.testing.assert_allclose(stats["mean"].get_value(), x.mean((0, 1, 2)) / 2, rtol=1e-5)
        np.testing.assert_allclose(stats["var"].get_value(), 0.5 + x.var((0, 1, 2)) / 2, rtol=1e-5)
        expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
        np.testing.assert_allclose(y, expected, atol=1e-5)


class TestConv:
    def test_equals_torch_with_bias(self, x64):
        conv = Conv(
            6, 8, 3, strides=2, kernel_dilation=2, use_bias=True, dtype="float64", rngs=nnx.Rngs(0)
        )
        conv.bias[...] = jnp.arange(8.0)
        x = np.random.default_rng(0).normal(size=(2, 7, 9, 6))
        kernel = torch.tensor(np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1))
        theirs = torch.nn.functional.conv2d(
            to_torch(x), kernel, torch.arange(8.0).double(), stride=2, padding=2, dilation=2
        )
        np.testing.assert_allclose(conv(jnp.asarray(x)), from_torch(theirs), atol=1e-12)

    def test_starts_from_he_fan_out(self):
        conv = Conv(64, 128, 3, rngs=nnx.Rngs(0))
        kernel = np.asarray(conv.kernel[...])
        assert kernel.mean() == pytest.approx(0, abs=1e-3)
        assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.01)

    def test_computes_in_its_dtype_from_float32_parameters(self):
        conv = Conv(4, 4, 3, use_bias=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        assert conv.kernel.dtype == conv.bias.dtype == jnp.float32
        assert conv(jnp.ones((1, 5, 5, 4))).dtype == jnp.bfloat16


class TestMaxPool:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_padding_is_finite_and_never_wins(self, dtype):
        x = jnp.full((1, 3, 3, 1), jnp.finfo(dtype).min, dtype)
        assert (max_pool(x) == jnp.finfo(dtype).min).all()


class TestResize:
    @pytest.mark.parametrize(
        ("source", "target"),
        [
            ((1, 1), (5, 7)),
            ((3, 5), (17, 33)),
            ((5, 3), (65, 64)),
            ((9, 13), (4, 7)),
            ((33, 2), (33, 9)),
            ((6, 7), (1, 1)),
            ((4, 5), (1, 3)),
        ],
    )
    @pytest.mark.parametrize("align_corners", [False, True])
    def test_equals_torch_with_its_gradient(self, x64, source, target, align_corners):
        rng = np.random.default_rng(0)
        x, cotangent = rng.normal(size=(2, *source, 3)), rng.normal(size=(2, *target, 3))

        @jax.jit
        def ours(x):
            y, pull = jax.vjp(lambda x: resize_bilinear(x, *target, align_corners=align_corners), x)
            return y, pull(jnp.asarray(cotangent))[0]

        torch_x = to_torch(x).requires_grad_()
        theirs = torch.nn.functional.interpolate(
            torch_x, size=target, mode="bilinear", align_corners=align_corners
        )
        theirs.backward(to_torch(cotangent))
        y, gradient = ours(x)
        np.testing.assert_allclose(y, from_torch(theirs), atol=1e-12)
        np.testing.assert_allclose(gradient, from_torch(torch_x.grad), atol=1e-11)

    def test_same_size_is_unchanged(self):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 6, 2)), jnp.float32)
        np.testing.assert_array_equal(resize_bilinear(x, 4, 6), x)
        np.testing.assert_array_equal(resize_bilinear(x, 4, 6, align_corners=True), x)

    def test_corners_are_aligned_exactly(self):
        """Each 16th pixel of 513 is one of 33 logits, with no rounding: TensorFlow's sizes."""
        x = np.random.default_rng(0).normal(size=(1, 33, 3, 2)).astype(np.float32)
        y = resize_bilinear(jnp.asarray(x), 513, 33, align_corners=True)
        np.testing.assert_array_equal(y[:, ::16, ::16], x)

    @pytest.mark.parametrize("align_corners", [False, True])
    def test_each_image_of_a_padded_batch_has_its_own_size(self, x64, align_corners):
        rng = np.random.default_rng(0)
        before, after = [(9, 7), (1, 4), (5, 1)], [(33, 30), (4, 1), (1, 32)]
        x = rng.normal(size=(3, 9, 7, 2))
        sizes = (jnp.asarray(one) for one in (before, after))
        options = dict(zip(("in_sizes", "out_sizes"), sizes, strict=True))
        y = resize_bilinear(jnp.asarray(x), 33, 32, **options, align_corners=align_corners)
        for row, ((h, w), (height, width)) in enumerate(zip(before, after, strict=True)):
            expected = torch.nn.functional.interpolate(
                to_torch(x[row : row + 1, :h, :w]),
                size=(height, width),
                mode="bilinear",
                align_corners=align_corners,
            )
            np.testing.assert_allclose(
                y[row : row + 1, :height, :width], from_torch(expected), atol=1e-12
            )


def torch_average(x, strides):
    """timm's pool of the shortcut, `timm.models.resnet.downsample_avg`."""
    if strides == 1:
        x = torch.nn.functional.pad(x, (0, 1, 0, 1))
    return torch.nn.functional.avg_pool2d(x, 2, strides, 0, ceil_mode=True, count_include_pad=False)


class TestAveragePool:
    @pytest.mark.parametrize("strides", [1, 2])
    @pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 6), (9, 11)])
    def test_equals_torch_with_its_gradient(self, x64, strides, size):
        x = np.random.default_rng(0).normal(size=(2, *size, 3))
        torch_x = to_torch(x).requires_grad_()
        theirs = torch_average(torch_x, strides)
        cotangent = np.random.default_rng(1).normal(size=from_torch(theirs).shape)
        theirs.backward(to_torch(cotangent))
        y, pull = jax.vjp(lambda x: average_pool(x, strides), jnp.asarray(x))
        np.testing.assert_allclose(y, from_torch(theirs), atol=1e-15)
        np.testing.assert_allclose(
            pull(jnp.asarray(cotangent))[0], from_torch(torch_x.grad), atol=1e-15
        )

    @pytest.mark.parametrize("strides", [1, 2])
    def test_padding_does_not_count(self, x64, strides):
        sizes = [(9, 10), (4, 5), (1, 2)]
        x = np.full((3, 9, 10, 2), np.nan)
        for row, (height, width) in enumerate(sizes):
            x[row, :height, :width] = np.random.default_rng(row).normal(size=(height, width, 2))
        with padding_mask(jnp.asarray(sizes), x.shape):
            y = average_pool(jnp.asarray(x), strides)
        for row, (height, width) in enumerate(sizes):
            theirs = from_torch(torch_average(to_torch(x[row : row + 1, :height, :width]), strides))
            ours = y[row : row + 1, : theirs.shape[1], : theirs.shape[2]]
            np.testing.assert_allclose(ours, theirs, atol=1e-15)

    @pytest.mark.parametrize("strides", [1, 2])
    def test_keeps_bfloat16(self, strides):
        y = average_pool(jnp.ones((1, 3, 4, 2), jnp.bfloat16), strides)
        assert y.dtype == jnp.bfloat16
        assert float(y[0, 0, 0, 0]) == 1


class TestSeparableConvolution:
    def test_equals_torchs_layers(self, x64):
        """Depthwise at the rate, then 1x1, then norm and relu, as in segmentation_models."""
        layer = random_module(
            lambda: ConvBN(
                *(6, 5, 3),
                activation=jax.nn.relu,
                kernel_dilation=3,
                separable=True,
                norm=batch_norm("float64", 0.9, 1e-5),
                dtype="float64",
                rngs=nnx.Rngs(0),
            )
        )
        assert layer.depthwise.kernel.shape == (3, 3, 1, 6)
        assert layer.conv.kernel.shape == (1, 1, 6, 5)
        x = np.random.default_rng(0).normal(size=(2, 9, 8, 6))
        expected = from_torch(conv_norm_relu(to_torch(x), layer))
        np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-12)
        fuse_batch_norm(layer)
        np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-12)

    def test_strides_and_dtype_are_the_depthwise_convolutions(self):
        layer = nnx.eval_shape(
            lambda: ConvBN(4, 8, 3, strides=2, separable=True, dtype="bfloat16", rngs=ShapeRngs(0))
        )
        assert (layer.depthwise.strides, layer.conv.strides) == ((2, 2), (1, 1))
        assert layer.depthwise.dtype == layer.conv.dtype == jnp.bfloat16


class TestTransposedDecoder:
    @pytest.mark.parametrize("stride", [8, 16, 32])
    def test_starts_as_bilinear_at_each_output_stride(self, stride):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2)), jnp.float32)
        decode = TransposedDecoder(2, stride)
        assert decode.kernel.shape == (64, 64, 2)
        ours = decode(x, jnp.zeros((2, 3 * stride, 4 * stride, 3)))
        expected = resize_bilinear(x, 3 * stride, 4 * stride)
        np.testing.assert_allclose(ours, expected, atol=1e-5)

    @pytest.mark.parametrize(("height", "width"), [(1, 32), (17, 24), (32, 31)])
    def test_is_the_middle_of_a_transposed_convolution(self, x64, height, width):
        rng = np.random.default_rng(0)
        decode = TransposedDecoder(3, 16, dtype="float64")
        decode.kernel[...] = jnp.asarray(rng.normal(size=(64, 64, 3)))
        h, w = -(-height // 16), -(-width // 16)
        x = rng.normal(size=(2, h, w, 3))
        kernel = np.asarray(decode.kernel[...]).reshape(32, 2, 32, 2, 3).mean((1, 3))
        padded = torch.nn.functional.pad(to_torch(x), (1, 1, 1, 1), mode="replicate")
        theirs = torch.nn.functional.conv_transpose2d(
            padded, torch.tensor(kernel.transpose(2, 0, 1)[:, None]), stride=16, groups=3
        )
        # 8 outputs before the first map pixel's centre cell, and 16 of the padded pixel before.
        top, left = 24 + (16 * h - height) // 2, 24 + (16 * w - width) // 2
        theirs = from_torch(theirs)[:, top : top + height, left : left + width]
        ours = decode(jnp.asarray(x), jnp.zeros((2, height, width, 3)))
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(64, 1.0, 64), (64, 0.25, 16), (64, 0.1, 8), (256, 1.5, 384)],
)
def test_scaled_channels(channels, width, expected):
    assert scaled_channels(channels, width) == expected


@pytest.mark.parametrize("side", [1, 8, 9])
@pytest.mark.parametrize(
    ("kernel_size", "options"),
    [(3, {"kernel_dilation": 4}), (7, {"strides": 2}), (2, {"strides": 2}), (2, {})],
)
def test_symmetric_padding_gives_ceil_of_the_size(kernel_size, options, side):
    conv = Conv(2, 2, kernel_size, **options, rngs=nnx.Rngs(0))
    strides = options.get("strides", 1)
    found = conv(jnp.zeros((1, side, side + 3, 2))).shape[1:3]
    assert found == (-(-side // strides), -(-(side + 3) // strides))


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding"),
    [(3, 2, "VALID"), (3, 2, "SAME"), (4, 2, "same"), (3, 3, "same")],
)
def test_padding_that_would_shift_features_is_refused(kernel_size, strides, padding):
    with pytest.raises(ValueError, match="shifts features against the image"):
        Conv(2, 2, kernel_size, strides, padding=padding, rngs=nnx.Rngs(0))


def test_jit_sees_that_an_implementation_was_swapped():
    """It is an attribute, and so part of the graph definition, which is part of jit's cache key."""
    traced = []

    def own(*args, **kwargs):
        traced.append("own")
        return lax.conv_general_dilated(*args, **kwargs)

    conv = Conv(3, 4, 3, rngs=nnx.Rngs(0))
    apply = nnx.jit(lambda conv, x: conv(x))
    x = jnp.ones((1, 5, 6, 3))
    first = apply(conv, x)
    conv.conv_general_dilated = own
    np.testing.assert_allclose(apply(conv, x), first, atol=1e-6)
    assert traced == ["own"]
