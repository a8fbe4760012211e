"""DeepLabv3+'s decoder against torch, separately and in the model."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.contracts import Feature
from deeplab_jax.models.decoders import PlusDecoder
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.heads import aspp_head
from random_modules import random_module


def to_torch(x):
    return torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2)


def conv_norm_relu(x, module):
    """relu(norm(conv(x))) by running statistics."""
    conv, norm = module.conv, module.bn
    kernel = torch.tensor(np.asarray(conv.kernel[...])).permute(3, 2, 0, 1)
    y = torch.nn.functional.conv2d(x, kernel, padding=kernel.shape[2] // 2)
    values = (
        torch.tensor(np.asarray(v[...])) for v in (norm.mean, norm.var, norm.scale, norm.bias)
    )
    return torch.nn.functional.batch_norm(y, *values, eps=norm.epsilon).relu()


def decoder(features, low_level, plus):
    """arXiv 1802.02611, figure 2 and section 3.1."""
    upsampled = torch.nn.functional.interpolate(
        features, size=low_level.shape[2:], mode="bilinear", align_corners=False
    )
    x = torch.cat([upsampled, conv_norm_relu(low_level, plus.low_level)], 1)
    return conv_norm_relu(conv_norm_relu(x, plus.conv1), plus.conv2)


def test_logits_are_torchs_of_the_models_features(x64):
    ours = architecture(
        "paper_resnet18", num_classes=5, width=0.125, decoder="plus", dtype="float64"
    )
    model = random_module(lambda: build_model(ours, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).normal(size=(1, 41, 30, 3))

    def parts(x):
        features = model.backbone(x)
        return features, model.classifier.aspp(features[model.backbone.out_feature]), model(x)

    features, aspp, outputs = jax.jit(parts)(images)
    assert features["layer1"].shape[1:3] == (11, 8)
    x = decoder(to_torch(aspp), to_torch(features["layer1"]), model.classifier.decoder)
    logits = model.classifier.logits
    kernel, bias = (torch.tensor(np.asarray(v[...])) for v in (logits.kernel, logits.bias))
    x = torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias)
    x = torch.nn.functional.interpolate(x, size=(41, 30), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(to_torch(outputs["out"]), x, atol=1e-10 * x.abs().max().item())
    assert set(outputs) == {"out"}


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
    head = nnx.eval_shape(lambda: aspp_head(backbone, ours, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(head, nnx.Param))
    kernels = {".".join(map(str, path[:-1])): v.shape for path, v in flat if path[-1] == "kernel"}
    return {name: shape for name, shape in kernels.items() if not name.startswith("aspp.")}


def test_channels_are_the_papers():
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
    plus = random_module(lambda: PlusDecoder(12, 10, width=0.05, rngs=nnx.Rngs(0)))
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
