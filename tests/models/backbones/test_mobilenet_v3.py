"""MobileNetV3-Large against torchvision, stage by stage, and its rates against tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import torch_reference
from deeplab_jax.analysis.conv_trace import convolutions
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.backbones.mobilenet import (
    InvertedResidual,
    MobileNetV3,
    SqueezeExcite,
    divisible_channels,
)
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.models.layers import ShapeRngs, batch_norm
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families import from_model, to_model
from random_modules import abstract_module
from torch_layers import from_torch, to_torch

NAME = "torchvision_mobilenet_v3_large"
NUM_BLOCKS = 15
# Our names of torchvision's children "0" to "16".
STAGES = ["stem", *(f"block{i}" for i in range(1, NUM_BLOCKS + 1)), "last"]


def small(**overrides):
    return architecture(NAME, num_classes=2, **{"width": 0.125, **overrides})


def make_block(spec, ours):
    norm = batch_norm(ours.dtype, *ours.backbone_bn)
    return InvertedResidual(spec, ours, norm=norm, rngs=ShapeRngs(0))


def abstract(make):
    return nnx.split(abstract_module(make), nnx.Param, nnx.BatchStat)


def assert_close(ours, theirs, tolerance, name=""):
    """Checks the largest difference, relative to the largest value."""
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape, name
    scale = np.abs(theirs).max()
    assert scale > 0, name
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * scale, name


# torchvision's


def variables_of(reference, ours, *, backbone_only=False):
    """Returns our variables with torchvision's arrays, all of which must be used."""
    arrays = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    (params, stats), report = to_model(arrays, FunctionalModel(ours), backbone_only=backbone_only)
    assert not report.missing
    assert all(name.endswith("num_batches_tracked") for name, _ in report.dropped)
    return Variables(params, stats)


def filled(make, variables, prefix=""):
    """(graph, parameters, running statistics) of a part of the model, whose names begin so.

    Each of these variables must be used, and have the very shape.
    """
    graph, params, stats = abstract(make)
    arrays = {
        name.removeprefix(prefix): array
        for part in variables
        for name, array in part.items()
        if name.startswith(prefix)
    }

    def fill(state):
        values = {}
        for path, variable in nnx.to_flat_state(state):
            array = arrays.pop(".".join(map(str, path)))
            assert array.shape == variable.shape, path
            values[path] = type(variable)(jnp.array(array, variable.dtype))  # a copy
        return nnx.from_flat_state(values)

    params, stats = fill(params), fill(stats)
    assert not arrays
    return graph, params, stats


def named_as_theirs(prefix, params, stats=None):
    """Returns arrays of a part of our model with torchvision's names and axes."""
    ours = {
        prefix + ".".join(map(str, path)): variable[...]
        for state in (params, stats)
        for path, variable in (nnx.to_flat_state(state) if state else ())
    }
    arrays = from_model(Variables(ours, {}), architecture(NAME, num_classes=21))
    return {n: a for n, a in arrays.items() if not n.endswith("num_batches_tracked")}


@functools.cache
def torchvision_model():
    return torch_reference.segmentation_model("deeplabv3_mobilenet_v3_large", aux=True).double()


@functools.cache
def converted_model(dtype):
    """(graph, parameters, running statistics) of our model with the arrays of torchvision's."""
    ours = architecture(NAME, num_classes=21, dtype=dtype)
    variables = variables_of(torchvision_model(), ours)
    return filled(lambda: build_model(ours, rngs=ShapeRngs(0)), variables)


def stage_by_stage(backbone, x):
    """Returns the features of torchvision's modules by our names."""
    numbers, modules = zip(*backbone.named_children(), strict=True)
    assert numbers == tuple(map(str, range(NUM_BLOCKS + 2)))
    stages = {}
    for name, module in zip(STAGES, modules, strict=True):
        x = stages[name] = module(x)
    return stages


@functools.partial(jax.jit, static_argnames="graph")
def run(graph, params, stats, images):
    model = nnx.merge(graph, params, stats)
    return model.backbone(images), model(images)


# Odd and even sizes; the last features of the smallest are one pixel.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "size"),
    [
        ("float64", 1e-9, (2, 75, 64)),
        ("float64", 1e-9, (1, 9, 14)),
        ("float32", 1e-4, (1, 129, 97)),
    ],
)
def test_equals_torchvision_stage_by_stage(x64, dtype, tolerance, size):
    theirs = torchvision_model()
    images = np.random.default_rng(0).normal(size=(*size, 3))
    features, outputs = run(*converted_model(dtype), jnp.asarray(images, dtype))
    with torch.no_grad():
        expected = stage_by_stage(theirs.backbone, to_torch(images))
        logits = theirs(to_torch(images))
        expected["block3.expanded"] = theirs.backbone["3"].block[:-1](expected["block2"])
    assert set(features) == set(expected)
    for name, stage in expected.items():
        assert_close(features[name], from_torch(stage), tolerance, f"stage {name}")
    for head in ("out", "aux"):
        assert outputs[head].shape == (*size, 21)
        assert outputs[head].dtype == dtype
        assert_close(outputs[head], from_torch(logits[head]), tolerance, head)


# At width 0.05 most channels are 8: there are no expansions, and no shortcut may be added.
@pytest.mark.parametrize(("width", "dilated"), [(0.05, True), (0.35, False)])
def test_other_widths_and_the_published_strides_equal_torchvision(x64, width, dilated):
    module = torch_reference.torchvision.models.mobilenetv3
    conf, last = module._mobilenet_v3_conf("mobilenet_v3_large", width_mult=width, dilated=dilated)
    theirs = torch_reference.randomize(module.MobileNetV3(conf, last, num_classes=2), 3).double()
    ours = small(width=width, output_stride=16 if dilated else 32, dtype="float64")
    variables = variables_of(theirs.features, ours, backbone_only=True)
    graph, params, stats = filled(
        lambda: MobileNetV3(ours, rngs=ShapeRngs(0)), variables, "backbone."
    )
    images = np.random.default_rng(0).normal(size=(1, 67, 50, 3))
    features = jax.jit(lambda p, s, x: nnx.merge(graph, p, s)(x))(params, stats, images)
    with torch.no_grad():
        expected = stage_by_stage(theirs.features, to_torch(images))
    for name, stage in expected.items():
        assert_close(features[name], from_torch(stage), 1e-9, f"stage {name}")


def test_training_normalizes_by_the_batch_and_moves_running_statistics_as_torchvision(x64):
    """torch's running variance is unbiased, ours is not."""
    theirs = torch_reference.segmentation_model("deeplabv3_mobilenet_v3_large").double().backbone
    before = {name: tensor.clone().numpy() for name, tensor in theirs.state_dict().items()}
    ours = architecture(NAME, num_classes=21, dtype="float64")
    variables = variables_of(theirs, ours, backbone_only=True)
    graph, params, stats = filled(
        lambda: MobileNetV3(ours, rngs=ShapeRngs(0)), variables, "backbone."
    )
    images = np.random.default_rng(0).normal(size=(2, 65, 50, 3))

    @jax.jit
    def train(params, stats, images):
        module = nnx.merge(graph, params, stats)
        module.train()
        return module(images), nnx.state(module, nnx.BatchStat)

    features, moved = train(params, stats, images)
    counts = {}
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, x, name=name: counts.update({name: x[0].numel() // x[0].shape[1]})
            )
    with torch.no_grad():
        expected = stage_by_stage(theirs.train(), to_torch(images))
    for name, stage in expected.items():
        assert_close(features[name], from_torch(stage), 1e-9, f"stage {name}")

    after = theirs.state_dict()
    flat = {
        name: array
        for name, array in named_as_theirs("backbone.", params, moved).items()
        if "running_" in name
    }
    assert len(flat) == 2 * len(counts) == 2 * 46
    for name, count in counts.items():
        mean, var = (after[f"{name}.running_{kind}"].numpy() for kind in ("mean", "var"))
        assert_close(flat[f"backbone.{name}.running_mean"], mean, 1e-9, name)
        old = before[f"{name}.running_var"]
        biased = 0.99 * old + (var - 0.99 * old) * (count - 1) / count
        assert_close(flat[f"backbone.{name}.running_var"], biased, 1e-9, name)


@pytest.mark.parametrize("index", [0, 3, 4, 12])  # no expansion; stride; shortcut; hard-swish, rate
def test_a_block_and_its_gradients_equal_torchvision(x64, index):
    theirs = torchvision_model().backbone[str(index + 1)]
    ours = architecture(NAME, num_classes=21, dtype="float64")
    spec = MobileNetV3.block_specs(ours)[index]
    variables, prefix = variables_of(torchvision_model(), ours), f"backbone.block{index + 1}."
    graph, params, stats = filled(lambda: make_block(spec, ours), variables, prefix)
    x = np.random.default_rng(0).normal(0, 3, size=(2, 7, 10, spec.in_features))
    graph_in = to_torch(x).requires_grad_()
    expected = theirs(graph_in)
    weights = np.random.default_rng(1).normal(size=from_torch(expected).shape)
    theirs.zero_grad()
    (expected * to_torch(weights)).sum().backward()

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            y = nnx.merge(graph, params, stats)(x)[1]
            return (y * weights).sum(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (of_params, of_x), y = gradients(params, x)
    assert_close(y, from_torch(expected), 1e-12)
    # torch's gradient of the hard sigmoid is the float32 1/6, in float64 off by 3e-8.
    tolerance = 3e-8 if spec.row.squeeze_excite else 1e-11
    assert_close(of_x, from_torch(graph_in.grad), tolerance)
    of_theirs = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    for name, gradient in named_as_theirs(prefix, of_params).items():
        other = of_theirs.pop(name.removeprefix(f"backbone.{index + 1}."))
        assert_close(gradient, other, tolerance, name)
    assert not of_theirs


def test_squeeze_excite_equals_torchvision(x64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch_reference.torchvision.ops.SqueezeExcitation(
            24, 8, scale_activation=torch.nn.Hardsigmoid
        ).double()
    arrays = {
        f"{fc}.{ours}": np.transpose(getattr(getattr(theirs, fc), other).detach().numpy(), axes)
        for fc in ("fc1", "fc2")
        for ours, other, axes in (("kernel", "weight", (2, 3, 1, 0)), ("bias", "bias", (0,)))
    }
    module = nnx.merge(
        *filled(lambda: SqueezeExcite(24, 8, dtype="float64", rngs=ShapeRngs(0)), (arrays,))
    )
    x = np.random.default_rng(0).normal(1, 2, size=(3, 5, 4, 24))
    x[1] *= 30  # saturates the hard sigmoid on both sides
    with torch.no_grad():
        expected = from_torch(theirs(to_torch(x)))
    ratio = expected / x
    assert 0 < np.mean(ratio == 0) < 0.5  # some channels are closed
    assert np.mean(ratio > 1 - 1e-12) > 0  # some are open
    np.testing.assert_allclose(jax.jit(module)(x), expected, rtol=0, atol=1e-12)


# Strides and rates

S2, R1, R2, R4 = (2, 1), (1, 1), (1, 2), (1, 4)
# (stride, rate) of the depthwise convolution of each block, written by hand.
DEPTHWISE = {
    32: [R1, S2, R1, S2, R1, R1, S2, R1, R1, R1, R1, R1, S2, R1, R1],
    16: [R1, S2, R1, S2, R1, R1, S2, R1, R1, R1, R1, R1, R2, R2, R2],
    8: [R1, S2, R1, S2, R1, R1, R2, R2, R2, R2, R2, R2, R4, R4, R4],
}
KERNEL_SIZES = [3, 3, 3, 5, 5, 5, 3, 3, 3, 3, 3, 3, 5, 5, 5]


@pytest.mark.parametrize("output_stride", DEPTHWISE)
def test_effective_rates(output_stride):
    ours = architecture(NAME, num_classes=2, output_stride=output_stride)
    convs = {conv.name: conv for conv in convolutions(FunctionalModel(ours))}
    names = [f"backbone.block{i}.depthwise.conv" for i in range(1, NUM_BLOCKS + 1)]
    depthwise = [convs.pop(name) for name in names]
    assert [(conv.stride, conv.rate) for conv in depthwise] == DEPTHWISE[output_stride]
    assert [conv.kernel_size for conv in depthwise] == KERNEL_SIZES
    stem = convs.pop("backbone.stem.conv")
    assert (stem.kernel_size, stem.stride, stem.rate) == (3, 2, 1)
    others = [conv for name, conv in convs.items() if name.startswith("backbone")]
    assert {(conv.kernel_size, conv.stride, conv.rate) for conv in others} == {(1, 1, 1)}
    heads = {c.name: c.rate for c in convs.values() if c.rate > 1}
    scale = 16 / output_stride  # torchvision's rates belong to its output stride, 16
    assert heads == {f"classifier.aspp.branches.{i}.conv": scale * 12 * i for i in (1, 2, 3)}


# Parameters, names, settings


@pytest.mark.parametrize(("aux_head", "count"), [(True, 11_029_328), (False, 11_025_477)])
def test_parameter_count_is_torchvisions(aux_head, count):
    ours = architecture(NAME, num_classes=21, aux_head=aux_head)
    _, params, _ = abstract(lambda: build_model(ours, rngs=ShapeRngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def norms(ours):
    model = nnx.eval_shape(lambda: build_model(ours, rngs=ShapeRngs(0)))
    return {
        (path[0], module.momentum, module.epsilon)
        for path, module in nnx.iter_modules(model)
        if hasattr(module, "epsilon")
    }


def test_batch_norm_of_backbone_and_heads():
    heads = ("classifier", "aux_classifier")
    own = {("backbone", 0.99, 1e-3), *((head, 0.9, 1e-5) for head in heads)}
    assert norms(small()) == own
    assert norms(small(backbone_bn_momentum=0.5)) == {*own, ("backbone", 0.5, 1e-3)} - {
        ("backbone", 0.99, 1e-3)
    }
    # A value for the network applies to the backbone too.
    assert norms(small(bn_momentum=0.7, bn_epsilon=0.1)) == {
        (part, 0.7, 0.1) for part in ("backbone", *heads)
    }


def test_a_resnet_may_have_its_own_batch_norm_too():
    ours = architecture("paper_resnet18", num_classes=2, width=1 / 8, backbone_bn_momentum=0.5)
    assert norms(ours) == {("backbone", 0.5, 1e-5), ("classifier", 0.9997, 1e-5)}
    with pytest.raises(UserError, match=r"backbone_bn_momentum must be in \[0, 1\], got 2"):
        architecture("paper_resnet18", num_classes=2, backbone_bn_momentum=2)


def test_channels_are_divisible_by_8_as_torchvisions():
    theirs = torch_reference.torchvision.models._utils._make_divisible
    for channels in np.arange(1, 400, 0.7):
        assert divisible_channels(channels) == theirs(channels, 8)


# Training


def test_remat_recomputes_each_block():
    ours = small(width=1 / 16)
    graph, params, stats = abstract(lambda: MobileNetV3(ours, rngs=ShapeRngs(0)))
    images = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)

    def num_recomputed(remat):
        def forward(params, stats, x):
            module = nnx.merge(graph, params, stats)
            module.remat = remat
            return module(x)

        equations = jax.make_jaxpr(forward)(params, stats, images).eqns
        return sum(equation.primitive.name.startswith("remat") for equation in equations)

    assert (num_recomputed(True), num_recomputed(False)) == (NUM_BLOCKS, 0)
