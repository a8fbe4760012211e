"""MobileNetV2 against torchvision and transformers, stage by stage, and its rates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import tiny
import torch_reference
from deeplab_jax.analysis.conv_trace import convolutions
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.backbones.mobilenet import MobileNetV2
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.layers import ShapeRngs
from random_modules import abstract_module
from torch_layers import from_torch, to_torch

NUM_BLOCKS = 17
LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
S2, R1, R2, R4 = (2, 1), (1, 1), (1, 2), (1, 4)
# (stride, rate) of the depthwise convolution of each block, written by hand.
PUBLISHED = [R1, S2, R1, S2, R1, R1, S2, *[R1] * 6, S2, R1, R1, R1]
DEPTHWISE = {
    ("torchvision", 32): PUBLISHED,
    ("torchvision", 16): [*PUBLISHED[:13], R1, R2, R2, R2],
    ("torchvision", 8): [*PUBLISHED[:6], R1, *[R2] * 7, R4, R4, R4],
    ("paper", 32): PUBLISHED,
    ("paper", 16): [*PUBLISHED[:13], R2, R2, R2, R2],
    ("paper", 8): [*PUBLISHED[:6], *[R2] * 7, *[R4] * 4],
}


def backbone_of(arrays, **options):
    """(graph, state) of our backbone with arrays by our names, all of which must be used."""
    ours = architecture(options.pop("name"), num_classes=2, dtype="float64", **options)
    graph, state = nnx.split(abstract_module(lambda: MobileNetV2(ours, rngs=ShapeRngs(0))))
    filled = {}
    for path, variable in nnx.to_flat_state(state):
        array = arrays.pop(".".join(map(str, path)))
        assert array.shape == variable.shape, path
        filled[path] = type(variable)(jnp.asarray(array, variable.dtype))
    assert not arrays
    return graph, nnx.from_flat_state(filled)


def renamed(state_dict, layers):
    """Arrays by our names, of the layers in a table of their convolution, norm and our layer."""
    arrays = {}
    for conv, norm, ours in layers:
        arrays[f"{ours}.conv.kernel"] = state_dict[f"{conv}.weight"].numpy().transpose(2, 3, 1, 0)
        for theirs, leaf in LEAVES.items():
            arrays[f"{ours}.bn.{leaf}"] = state_dict[f"{norm}.{theirs}"].numpy()
    return arrays


def assert_equal(features, expected, tolerance=1e-9):
    for name, theirs in expected.items():
        theirs = from_torch(theirs)
        assert features[name].shape == theirs.shape, name
        difference = np.abs(np.asarray(features[name]) - theirs).max()
        assert difference <= tolerance * np.abs(theirs).max(), name


def random_images(*shape):
    return np.random.default_rng(0).normal(size=(*shape, 3))


@functools.partial(jax.jit, static_argnames="graph")
def run(graph, state, images):
    return nnx.merge(graph, state)(images)


# torchvision


class SameConv2d(torch.nn.Conv2d):
    """A 3x3 convolution of stride 2 with TensorFlow's padding: at even sides (0, 1)."""

    def forward(self, x):
        (top, left), padding = (side % 2 for side in x.shape[2:]), torch.nn.functional.pad
        return torch.nn.functional.conv2d(
            padding(x, (left, 1, top, 1)), self.weight, None, 2, groups=self.groups
        )


def torchvision_layers():
    yield "0.0", "0.1", "stem"
    for number in range(1, NUM_BLOCKS + 1):
        parts = ["expand", "depthwise"] if number > 1 else ["depthwise"]
        for index, part in enumerate(parts):
            yield f"{number}.conv.{index}.0", f"{number}.conv.{index}.1", f"block{number}.{part}"
        last = len(parts)
        yield f"{number}.conv.{last}", f"{number}.conv.{last + 1}", f"block{number}.project"


def torchvision_features(width, dilation_rule="torchvision", output_stride=32, same=False):
    """torchvision's features 0 to 17, with our rates written into their convolutions."""
    theirs = torch_reference.torchvision.models.mobilenet_v2(weights=None, width_mult=width)
    features = torch_reference.randomize(theirs, 3).double().features[:-1]
    for number, (stride, rate) in enumerate(DEPTHWISE[dilation_rule, output_stride], start=1):
        conv = features[number].conv[0 if number == 1 else 1][0]
        conv.stride, conv.dilation, conv.padding = (stride,) * 2, (rate,) * 2, (rate,) * 2
    for module in features.modules():
        if same and isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2):
            module.__class__ = SameConv2d
    return features


CASES = [
    (1.0, "torchvision", 32, False, (2, 33, 48)),
    (0.35, "torchvision", 8, True, (1, 64, 65)),
    (0.75, "torchvision", 16, True, (2, 33, 48)),
    (0.35, "paper", 8, False, (1, 37, 50)),
]


@pytest.mark.parametrize(("width", "dilation_rule", "output_stride", "same", "size"), CASES)
def test_equals_torchvision_stage_by_stage(x64, width, dilation_rule, output_stride, same, size):
    theirs = torchvision_features(width, dilation_rule, output_stride, same)
    backbone = backbone_of(
        renamed(theirs.state_dict(), torchvision_layers()),
        name="torchvision_mobilenet_v2",
        width=width,
        output_stride=output_stride,
        dilation_rule=dilation_rule,
        padding="same" if same else "symmetric",
    )
    images = random_images(*size)
    features = run(*backbone, jnp.asarray(images))
    x, expected = to_torch(images), {}
    with torch.no_grad():
        for index, module in enumerate(theirs):
            if index == 3:
                expected["block3.expanded"] = module.conv[:2](x)
            x = expected[f"block{index}" if index else "stem"] = module(x)
    assert set(features) == set(expected)
    assert_equal(features, expected)


# transformers


def transformers_layers():
    def layer(theirs, ours):
        return f"{theirs}.convolution", f"{theirs}.normalization", ours

    yield layer("conv_stem.first_conv", "stem")
    yield layer("conv_stem.conv_3x3", "block1.depthwise")
    yield layer("conv_stem.reduce_1x1", "block1.project")
    for number in range(2, NUM_BLOCKS + 1):
        for theirs, ours in (
            ("expand_1x1", "expand"),
            ("conv_3x3", "depthwise"),
            ("reduce_1x1", "project"),
        ):
            yield layer(f"layer.{number - 2}.{theirs}", f"block{number}.{ours}")


def transformers_model(width, output_stride):
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(depth_multiplier=width, output_stride=output_stride)
    assert (config.tf_padding, config.layer_norm_eps) == (True, 1e-3)
    theirs = transformers.MobileNetV2Model(config, add_pooling_layer=False)
    return torch_reference.randomize(theirs, 3).double()


def as_transformers(theirs, width, output_stride):
    layers = renamed(theirs.state_dict(), transformers_layers())
    return backbone_of(layers, name="tf_mobilenet_v2", width=width, output_stride=output_stride)


@pytest.mark.parametrize("size", [(2, 33, 48), (1, 64, 65)])
@pytest.mark.parametrize(("width", "output_stride"), [(1.0, 8), (0.35, 16), (0.35, 32), (1.4, 16)])
def test_equals_transformers_stage_by_stage(x64, width, output_stride, size):
    theirs = transformers_model(width, output_stride)
    images = random_images(*size)
    features = run(*as_transformers(theirs, width, output_stride), jnp.asarray(images))
    with torch.no_grad():
        hidden = theirs(to_torch(images), output_hidden_states=True).hidden_states
        stem = theirs.conv_stem.first_conv(to_torch(images))
        expected = {"stem": stem, "block1": theirs.conv_stem(to_torch(images))}
        expanded = theirs.layer[1].expand_1x1(hidden[0])
        expected["block3.expanded"] = theirs.layer[1].conv_3x3(expanded)
    expected |= {f"block{number}": each for number, each in enumerate(hidden, start=2)}
    assert set(features) == set(expected)
    assert_equal(features, expected)


def test_gradients_equal_transformers(x64):
    theirs = transformers_model(0.35, 16)
    graph, state = as_transformers(theirs, 0.35, 16)
    images = random_images(1, 33, 48)
    x = to_torch(images).requires_grad_()
    out = theirs(x, output_hidden_states=True).hidden_states[-1]
    weights = np.random.default_rng(1).normal(size=out.shape)
    (out * torch.tensor(weights)).sum().backward()
    params, stats = nnx.split_state(state, nnx.Param, ...)

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            features = nnx.merge(graph, params, stats)(x)
            return (features["block17"] * weights.transpose(0, 2, 3, 1)).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    of_params, of_x = gradients(params, jnp.asarray(images))
    assert_equal({"x": of_x}, {"x": x.grad})
    arrays = {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in theirs.named_parameters()
    } | dict(theirs.named_buffers())
    expected = renamed(arrays, transformers_layers())
    for path, variable in nnx.to_flat_state(of_params):
        name = ".".join(map(str, path))
        other = expected[name]
        assert np.abs(variable[...] - other).max() <= 1e-9 * np.abs(other).max(), name


# Strides and channels


@pytest.mark.parametrize(("dilation_rule", "output_stride"), DEPTHWISE)
def test_effective_rates(dilation_rule, output_stride):
    ours = architecture(
        "tf_mobilenet_v2",
        num_classes=2,
        dilation_rule=dilation_rule,
        output_stride=output_stride,
    )
    convs = {conv.name: conv for conv in convolutions(FunctionalModel(ours))}
    depthwise = [convs[f"backbone.block{i}.depthwise.conv"] for i in range(1, NUM_BLOCKS + 1)]
    assert [(c.stride, c.rate) for c in depthwise] == DEPTHWISE[dilation_rule, output_stride]
    assert {c.kernel_size for c in depthwise} == {3}
    assert depthwise[-1].output_stride == output_stride


def test_features():
    ours = architecture("tf_mobilenet_v2", num_classes=2)
    backbone = nnx.eval_shape(lambda: MobileNetV2(ours, rngs=ShapeRngs(0)))
    assert backbone.features[backbone.out_feature] == (320, 16)
    assert backbone.features[backbone.low_level_feature] == (144, 4)  # layer_4/depthwise_output
    assert backbone.features[backbone.aux_feature] == (32, 8)
    params = nnx.state(backbone, nnx.Param)
    # torchvision's 3 504 872 without its last convolution with norm, and its linear layer.
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 3_504_872 - (320 * 1280 + 2 * 1280) - (1280 * 1000 + 1000)


# Training


def test_trains():
    config = tiny.get_config()
    config.model = dataclasses.replace(config.model, architecture="tf_mobilenet_v2")
    config.train.remat = True
    state, history = tiny.Run(config).train(2)
    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    assert history[0]["loss"] != history[1]["loss"]
    assert int(state.step) == 2
