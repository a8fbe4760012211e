"""ASPP's branches, and heads against torch; `tests/weights` compares those of torchvision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.heads import ASPP
from deeplab_jax.models.layers import ConvBN
from random_modules import abstract_module, random_module


@pytest.mark.parametrize("image_pooling", [True, False])
def test_without_image_pooling_a_pixel_sees_as_far_as_the_largest_rate(image_pooling):
    aspp = random_module(
        lambda: ASPP(4, 8, atrous_rates=(1, 3), image_pooling=image_pooling, rngs=nnx.Rngs(0))
    )
    assert len(aspp.branches) == 3 + image_pooling
    assert aspp.project.conv.kernel.shape[2] == len(aspp.branches) * 8
    features = np.random.default_rng(0).normal(size=(1, 9, 9, 4)).astype(np.float32)
    changed = features.copy()
    changed[0, 8, 8] += 1
    before, after = (np.asarray(aspp(jnp.asarray(x))) for x in (features, changed))
    moved = np.abs(after - before)[0].max(-1) > 0
    assert moved[8, 8]
    assert moved[5, 5]
    assert moved[0, 0] == image_pooling


def to_torch(x):
    return torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2)


def torch_conv(x, conv):
    kernel = torch.tensor(np.asarray(conv.kernel[...])).permute(3, 2, 0, 1)
    bias = None if conv.bias is None else torch.tensor(np.asarray(conv.bias[...]))
    rate = conv.kernel_dilation[0]
    padding = rate * (kernel.shape[2] // 2)
    groups = x.shape[1] // kernel.shape[1]
    return torch.nn.functional.conv2d(x, kernel, bias, 1, padding, rate, groups)


def conv_norm_relu(x, layer):
    if layer.depthwise is not None:
        x = torch_conv(x, layer.depthwise)
    values = (layer.bn.mean, layer.bn.var, layer.bn.scale, layer.bn.bias)
    y = torch_conv(x, layer.conv)
    values = [torch.tensor(np.asarray(value[...])) for value in values]
    return torch.nn.functional.batch_norm(y, *values, eps=layer.bn.epsilon).relu()


def resized(x, size):
    return torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=True)


def torch_aspp(x, aspp):
    *convs, pooling = aspp.branches
    branches = [conv_norm_relu(x, conv) for conv in convs]
    pooled = conv_norm_relu(x.mean((2, 3), keepdim=True), pooling.project)
    branches.append(pooled.expand(-1, -1, *x.shape[2:]))
    return conv_norm_relu(torch.cat(branches, 1), aspp.project)


def parts_of(name, **options):
    """A narrow float64 model, its features, the logits of its heads, and its outputs."""
    ours = architecture(name, num_classes=5, width=0.125, dtype="float64", **options)
    model = random_module(lambda: build_model(ours, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).normal(size=(1, 41, 30, 3))

    def parts(x):
        features = model.backbone(x)
        return features, model.classifier(features), model(x)

    return model, *jax.jit(parts)(images)


def assert_equal(ours, theirs):
    np.testing.assert_allclose(to_torch(ours), theirs, atol=1e-10 * theirs.abs().max().item())


@pytest.mark.parametrize("decoder_convs", [1, 3])
def test_separable_head_and_decoder_equal_torch(x64, decoder_convs):
    """The order of segmentation_models' DeepLabV3Plus, with corners aligned in each resize."""
    options = {"decoder_convs": decoder_convs, "atrous_rates": (1, 2), "head_channels": 96}
    model, features, logits, outputs = parts_of("smpplus_resnet18", **options)
    head = model.classifier
    x = conv_norm_relu(torch_aspp(to_torch(features["layer4"]), head.aspp), head.head_conv)
    assert x.shape[1] == 12  # 96 times the width
    low_level = conv_norm_relu(to_torch(features["layer1"]), head.decoder.low_level)
    x = torch.cat([resized(x, low_level.shape[2:]), low_level], 1)
    for number in range(1, decoder_convs + 1):
        x = conv_norm_relu(x, getattr(head.decoder, f"conv{number}"))
    assert not hasattr(head.decoder, f"conv{decoder_convs + 1}")
    assert x.shape[1] == 12
    x = torch_conv(x, head.logits)
    assert_equal(logits, x)
    assert_equal(outputs["out"], resized(x, (41, 30)))
    separable = {
        ".".join(map(str, path))
        for path, layer in nnx.iter_modules(head)
        if isinstance(layer, ConvBN) and layer.depthwise is not None
    }
    convs = [f"decoder.conv{number}" for number in range(1, decoder_convs + 1)]
    assert separable == {"aspp.branches.1", "aspp.branches.2", "head_conv", *convs}


def test_wide_projection_equals_torch(x64):
    """mmsegmentation's head: 3x3 after the branches, and no more convolutions before the logits."""
    model, features, logits, outputs = parts_of("mmseg_resnet18", atrous_rates=(1, 2))
    head = model.classifier
    assert head.aspp.project.conv.kernel.shape == (3, 3, 4 * 16, 16)  # 128 times the width
    x = torch_conv(torch_aspp(to_torch(features["layer4"]), head.aspp), head.logits)
    assert_equal(logits, x)
    assert outputs["aux"].shape == outputs["out"].shape == (1, 41, 30, 5)


def test_a_pyramid_without_rates_is_a_convolution_and_pooling(x64):
    """TensorFlow's head for MobileNets."""
    options = {"atrous_rates": (), "align_corners": True}
    model, features, logits, outputs = parts_of("paper_resnet18", **options)
    assert len(model.classifier.aspp.branches) == 2
    x = torch_aspp(to_torch(features["layer4"]), model.classifier.aspp)
    x = torch_conv(x, model.classifier.logits)
    assert_equal(logits, x)
    assert_equal(outputs["out"], resized(x, (41, 30)))
    cascade = architecture("smp_resnet18", num_classes=5, width=0.125, cascade=0)
    assert abstract_module(lambda: build_model(cascade, rngs=nnx.Rngs(0))).classifier.aspp is None
