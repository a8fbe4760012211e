"""Heads and DeepLabv3+'s decoder against torch; `tests/weights` compares those of torchvision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.contracts import Feature
from deeplab_jax.models.decoders import PlusDecoder
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.heads import ASPP, aspp_head
from deeplab_jax.models.layers import ConvBN, ShapeRngs
from random_modules import random_module
from torch_layers import conv2d, conv_norm_relu, from_torch, resize, to_torch


@pytest.mark.parametrize("image_pooling", [True, False])
def test_without_image_pooling_a_pixel_sees_as_far_as_the_largest_rate(image_pooling):
    aspp = random_module(
        lambda: ASPP(4, 8, atrous_rates=(1, 3), image_pooling=image_pooling, rngs=ShapeRngs(0))
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


def torch_head(head, features, align_corners):
    """ASPP of arXiv 1706.05587, section 3.3, and the decoder of arXiv 1802.02611, section 3.1."""
    x = to_torch(features["layer4"])
    if head.aspp is not None:
        *convs, pooling = head.aspp.branches
        pooled = conv_norm_relu(x.mean((2, 3), keepdim=True), pooling.project)
        branches = [conv_norm_relu(x, conv) for conv in convs]
        x = torch.cat([*branches, pooled.expand(-1, -1, *x.shape[2:])], 1)
        x = conv_norm_relu(x, head.aspp.project)
    if head.head_conv is not None:
        x = conv_norm_relu(x, head.head_conv)
    if head.decoder is not None:
        low_level = conv_norm_relu(to_torch(features["layer1"]), head.decoder.low_level)
        x = torch.cat([resize(x, low_level.shape[2:], align_corners), low_level], 1)
        for number in range(1, head.decoder.num_convs + 1):
            x = conv_norm_relu(x, getattr(head.decoder, f"conv{number}"))
    return conv2d(x, head.logits)


def separable_layers(head):
    return {
        ".".join(map(str, path))
        for path, layer in nnx.iter_modules(head)
        if isinstance(layer, ConvBN) and layer.depthwise is not None
    }


# Name, overrides, number of ASPP's branches, 3x3 convolutions of the decoder, separable layers.
HEADS = {
    "paper": ("paper_resnet18", {}, 5, 0, []),
    "cascade": ("smp_resnet18", {"cascade": 0, "head_conv": False}, 0, 0, []),
    "plus": ("paper_resnet18", {"decoder": "plus"}, 5, 2, []),
    "torchvision": ("torchvision_resnet18", {"atrous_rates": (2, 4, 9)}, 5, 0, []),
    # mmsegmentation's head: 3x3 after the branches, and no more convolutions before the logits.
    "wide projection": ("mmseg_resnet18", {"atrous_rates": (1, 2)}, 4, 0, []),
    # TensorFlow's head for MobileNets.
    "no rates": ("paper_resnet18", {"atrous_rates": (), "align_corners": True}, 2, 0, []),
    # The order of segmentation_models' DeepLabV3Plus, with corners aligned in each resize.
    **{
        f"separable, {convs} convolutions": (
            "smpplus_resnet18",
            {"decoder_convs": convs, "atrous_rates": (1, 2), "head_channels": 96},
            4,
            convs,
            [*(f"decoder.conv{number}" for number in range(1, convs + 1)), "head_conv"],
        )
        for convs in (1, 3)
    },
}


@pytest.mark.parametrize("kind", HEADS)
def test_logits_equal_torch(x64, kind):
    name, options, num_branches, num_convs, separable = HEADS[kind]
    ours = architecture(name, num_classes=5, width=0.125, dtype="float64", **options)
    model = random_module(lambda: build_model(ours, rngs=ShapeRngs(0)))
    images = np.random.default_rng(0).normal(size=(1, 41, 30, 3))

    def parts(x):
        features = model.backbone(x)
        return features, model.classifier(features), model(x)

    features, logits, outputs = jax.jit(parts)(images)
    head = model.classifier
    expected = {"out": torch_head(head, features, ours.align_corners)}
    np.testing.assert_allclose(logits, from_torch(expected["out"]), atol=1e-10)
    if ours.aux_head:
        x = conv_norm_relu(to_torch(features["layer3"]), model.aux_classifier.head_conv)
        expected["aux"] = conv2d(x, model.aux_classifier.logits)
    assert set(outputs) == set(expected)
    for output, x in expected.items():
        theirs = from_torch(resize(x, (41, 30), ours.align_corners))
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(outputs[output], theirs, atol=1e-10)

    assert (0 if head.aspp is None else len(head.aspp.branches)) == num_branches
    assert (0 if head.decoder is None else head.decoder.num_convs) == num_convs
    assert not hasattr(head.decoder, f"conv{num_convs + 1}")
    in_aspp = {"aspp.branches.1", "aspp.branches.2"} if separable else set()
    assert separable_layers(head) == in_aspp | set(separable)
    if kind == "wide projection":
        assert head.aspp.project.conv.kernel.shape == (3, 3, 4 * 16, 16)  # 128 times the width
    if separable:
        assert head.logits.kernel.shape[2] == 12  # 96 times the width


class BackboneAttributes:
    """The attributes of a backbone that a head reads."""

    out_feature, low_level_feature, aux_feature = "last", "low", ""

    def __init__(self, channels, low_level_channels):
        self.features = {"low": Feature(low_level_channels, 4), "last": Feature(channels, 16)}

    def __call__(self, images):
        raise NotImplementedError


def kernel_shapes(in_channels, low_level_channels, name="paper_resnet50", **options):
    """Returns the kernel shapes of a head without its ASPP."""
    ours = architecture(name, num_classes=21, decoder="plus", **options)
    backbone = BackboneAttributes(in_channels, low_level_channels)
    head = nnx.eval_shape(lambda: aspp_head(backbone, ours, rngs=ShapeRngs(0)))
    flat = nnx.to_flat_state(nnx.state(head, nnx.Param))
    kernels = {".".join(map(str, path[:-1])): v.shape for path, v in flat if path[-1] == "kernel"}
    return {name: shape for name, shape in kernels.items() if not name.startswith("aspp.")}


def test_channels_of_the_decoder_are_the_papers():
    """arXiv 1802.02611: 48 low-level channels (table 1), two 3x3 to 256 channels (table 2)."""
    expected = {
        "decoder.low_level.conv": (1, 1, 100, 48),
        "decoder.conv1.conv": (3, 3, 256 + 48, 256),
        "decoder.conv2.conv": (3, 3, 256, 256),
        "logits": (1, 1, 256, 21),
    }
    assert kernel_shapes(300, 100) == expected
    # It replaces torchvision's 3x3, unless both are requested.
    assert kernel_shapes(300, 100, "torchvision_resnet50") == expected
    both = kernel_shapes(300, 100, "torchvision_resnet50", head_conv=True)
    assert both == {"head_conv.conv": (3, 3, 256, 256)} | expected
    # After a cascade it reads the last block's features. A width scales all but the classes.
    assert kernel_shapes(75, 25, cascade=1, width=0.25) == {
        "decoder.low_level.conv": (1, 1, 25, 12),
        "decoder.conv1.conv": (3, 3, 75 + 12, 64),
        "decoder.conv2.conv": (3, 3, 64, 64),
        "logits": (1, 1, 64, 21),
    }


def test_the_decoder_is_trained():
    """Its running statistics change, and each of its parameters has a gradient."""
    plus = random_module(lambda: PlusDecoder(12, 10, 13, reduced_features=8, rngs=ShapeRngs(0)))
    plus.train()
    graph, params, stats = nnx.split(plus, nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)
    features, low_level = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 2, 12), (2, 9, 5, 10))
    )

    @jax.jit
    def train(params):
        def loss(params):
            module = nnx.merge(graph, params, stats, copy=True)
            x = module(features, low_level)
            return jnp.square(x - 1).mean(), nnx.state(module, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    gradients, moved = train(params)
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(gradients))
    pairs = list(zip(jax.tree.leaves(moved), jax.tree.leaves(stats), strict=True))
    assert len(pairs) == 6
    assert not any(np.array_equal(after, before) for after, before in pairs)


def test_dropout_acts_before_the_logits():
    ours = architecture("paper_resnet50", num_classes=2, cascade=0, dropout=0.5)
    head = aspp_head(BackboneAttributes(4, 4), ours, rngs=nnx.Rngs(0))
    features = {"last": jnp.ones((1, 2, 2, 4))}
    dropped = np.asarray(head(features, rngs=jax.random.key(0)))
    head.eval()
    kept = np.asarray(head(features))
    kernel = np.asarray(head.logits.kernel[...])[0, 0]
    masks = 2.0 * np.array(list(np.ndindex(2, 2, 2, 2)))  # kept values are doubled
    np.testing.assert_allclose(kept, np.broadcast_to(kernel.sum(0), kept.shape), rtol=1e-6)
    distance = np.abs(dropped.reshape(4, 1, 2) - masks @ kernel).max(2)
    assert (distance.min(1) < 1e-6).all()
    assert not np.allclose(dropped, kept)
