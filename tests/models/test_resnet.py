"""ResNet: rates against hand-made tables, units against torch, the a trous identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deeplab_jax.models import resnet
from deeplab_jax.models.atrous import using
from deeplab_jax.models.convolutions import convolutions
from deeplab_jax.models.deeplab import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.layers import LayerMaker, recompute
from deeplab_jax.models.resnet import BasicUnit, BottleneckUnit, ResNet, UnitPlan
from random_modules import random_module


def make_resnet(ours):
    return random_module(lambda: ResNet(ours, rngs=nnx.Rngs(0)))


def small(depth=18, family="paper", **overrides):
    return architecture(f"{family}_resnet{depth}", num_classes=2, width=0.125, **overrides)


# --- Strides and rates -------------------------------------------------------------------------

# (stride, rate) of each 3x3 convolution of layer3 and layer4, written out by hand.
# ResNet-50: one a unit, 6 and 3 units.
S2, R1, R2, R4 = (2, 1), (1, 1), (1, 2), (1, 4)
BOTTLENECK = {
    ("paper", 32, (1, 1, 1)): ([S2, *[R1] * 5], [S2, R1, R1]),
    ("paper", 32, (1, 2, 4)): ([S2, *[R1] * 5], [S2, R2, R4]),
    ("paper", 16, (1, 1, 1)): ([S2, *[R1] * 5], [R2, R2, R2]),
    ("paper", 16, (1, 2, 4)): ([S2, *[R1] * 5], [R2, R4, (1, 8)]),
    ("paper", 8, (1, 1, 1)): ([R2] * 6, [R4, R4, R4]),
    ("paper", 8, (1, 2, 4)): ([R2] * 6, [R4, (1, 8), (1, 16)]),
    ("torchvision", 32, (1, 1, 1)): ([S2, *[R1] * 5], [S2, R1, R1]),
    ("torchvision", 32, (1, 2, 4)): ([S2, *[R1] * 5], [S2, R2, R4]),
    ("torchvision", 16, (1, 1, 1)): ([S2, *[R1] * 5], [R1, R2, R2]),
    ("torchvision", 16, (1, 2, 4)): ([S2, *[R1] * 5], [R1, R4, (1, 8)]),
    ("torchvision", 8, (1, 1, 1)): ([R1, *[R2] * 5], [R2, R4, R4]),
    ("torchvision", 8, (1, 2, 4)): ([R1, *[R2] * 5], [R2, (1, 8), (1, 16)]),
}
# ResNet-18: two a unit, 2 and 2 units; the multi-grid's last entry finds no unit.
BASIC = {
    ("paper", 32, (1, 2, 4)): ([S2, R1, R1, R1], [S2, R1, R2, R2]),
    ("paper", 16, (1, 1, 1)): ([S2, R1, R1, R1], [R2, R2, R2, R2]),
    ("paper", 16, (1, 2, 4)): ([S2, R1, R1, R1], [R2, R2, R4, R4]),
    ("paper", 8, (1, 2, 4)): ([R2, R2, R2, R2], [R4, R4, (1, 8), (1, 8)]),
    ("torchvision", 16, (1, 2, 4)): ([S2, R1, R1, R1], [R1, R2, R4, R4]),
    ("torchvision", 8, (1, 1, 1)): ([R1, R2, R2, R2], [R2, R4, R4, R4]),
}


def stage_rates(ours, stage):
    return [
        (conv.stride, conv.rate)
        for conv in convolutions(FunctionalModel(ours))
        if conv.name.startswith(f"backbone.{stage}.") and conv.kernel_size == 3
    ]


@pytest.mark.parametrize(
    ("depth", "rule", "output_stride", "multi_grid", "layer3", "layer4"),
    [(50, *key, *stages) for key, stages in BOTTLENECK.items()]
    + [(18, *key, *stages) for key, stages in BASIC.items()],
)
def test_effective_rates(depth, rule, output_stride, multi_grid, layer3, layer4):
    ours = small(depth, output_stride=output_stride, multi_grid=multi_grid, dilation_rule=rule)
    assert stage_rates(ours, "layer3") == layer3
    assert stage_rates(ours, "layer4") == layer4


def test_rates_and_strides_outside_the_last_stages():
    rates = {conv.name: conv for conv in convolutions(FunctionalModel(small(50, output_stride=8)))}
    assert (rates["backbone.conv1"].kernel_size, rates["backbone.conv1"].stride) == (7, 2)
    strided = {name for name, conv in rates.items() if conv.stride > 1}
    assert strided == {
        "backbone.conv1",
        "backbone.layer2.0.conv2",
        "backbone.layer2.0.downsample.0",
    }
    atrous = {name: conv.rate for name, conv in rates.items() if conv.rate > 1}
    heads = {name: rate for name, rate in atrous.items() if not name.startswith("backbone")}
    assert heads == {f"classifier.0.convs.{i}.0": rate for i, rate in enumerate((12, 24, 36), 1)}
    assert not any("layer1" in name or "layer2" in name for name in atrous)
    assert all(rates[name].kernel_size == 3 for name in atrous)


def test_multi_grid_starts_over_where_there_are_more_units():
    assert stage_rates(small(50, multi_grid=(1, 3)), "layer4") == [(1, 2), (1, 6), (1, 2)]


@pytest.mark.parametrize("place", ["conv1", "conv2"])
def test_place_of_the_stride(place):
    ours = small(50, output_stride=32, stride_place=place)
    strided = [
        c.name for c in convolutions(FunctionalModel(ours)) if c.stride > 1 and "layer" in c.name
    ]
    expected = [f"backbone.layer{i}.0.{p}" for i in (2, 3, 4) for p in (place, "downsample.0")]
    assert sorted(strided) == sorted(expected)


def apply(ours, params, stats, images):
    graph = nnx.split(nnx.eval_shape(lambda: ResNet(ours, rngs=nnx.Rngs(0))), nnx.Param, ...)[0]
    return jax.jit(lambda p, s, x: nnx.merge(graph, p, s)(x))(params, stats, images)


@pytest.mark.parametrize(
    ("depth", "overrides"),
    [(18, {}), (50, {"stride_place": "conv1"}), (50, {"residual": "pre"})],
)
def test_removed_strides_give_the_strided_networks_features_between_others(depth, overrides):
    """The a trous identity, exact under torchvision's rule, at an odd size too."""
    strided = small(depth, "torchvision", output_stride=32, **overrides)
    model = make_resnet(strided)
    _, params, stats = nnx.split(model, nnx.Param, ...)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 75, 90, 3)), jnp.float32)
    sparse = apply(strided, params, stats, images)
    dense = apply(strided.at_output_stride(8), params, stats, images)
    assert dense["layer4"].shape[1:3] == (10, 12)
    assert float(jnp.abs(sparse["layer4"]).max()) > 0.1
    for name, step in {"layer2": 1, "layer3": 2, "layer4": 4}.items():
        scale = float(jnp.abs(sparse[name]).max())
        np.testing.assert_allclose(
            dense[name][:, ::step, ::step] / scale, sparse[name] / scale, atol=1e-5
        )


# --- Parameters --------------------------------------------------------------------------------


def shapes(ours):
    state = nnx.state(nnx.eval_shape(lambda: ResNet(ours, rngs=nnx.Rngs(0))))
    return {path: variable.shape for path, variable in nnx.to_flat_state(state)}


# At 1/64 all stages have the least of 8 channels: the shortcuts must stay convolutions.
@pytest.mark.parametrize("width", [1 / 64, 1 / 8])
@pytest.mark.parametrize(("depth", "residual"), [(18, "post"), (50, "pre")])
def test_parameters_are_the_same_at_every_output_stride(depth, residual, width):
    at_16 = architecture(f"paper_resnet{depth}", num_classes=2, width=width, residual=residual)
    assert shapes(at_16) == shapes(at_16.at_output_stride(8)) == shapes(at_16.at_output_stride(32))


@pytest.mark.parametrize(
    ("depth", "millions"), [(18, 11.69), (34, 21.80), (50, 25.56), (101, 44.55), (152, 60.19)]
)
def test_parameter_counts_are_the_published_ones_without_the_classifier(depth, millions):
    """torchvision's documentation, "number of parameters", with 1000 classes."""
    ours = architecture(f"paper_resnet{depth}", num_classes=2)
    model = nnx.eval_shape(lambda: ResNet(ours, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    classifier = model.out_channels * 1000 + 1000
    assert (count + classifier) / 1e6 == pytest.approx(millions, abs=0.006)


def test_width_scales_every_number_of_channels():
    full, half = (architecture("paper_resnet50", num_classes=2, width=w) for w in (1, 0.5))
    halved = {
        path: tuple(n // 2 if n > 7 else n for n in shape) for path, shape in shapes(full).items()
    }
    assert shapes(half) == halved


# --- Units and stems ---------------------------------------------------------------------------


def torch_conv(x, conv):
    kernel = torch.tensor(np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1))
    padding = conv.rate * (kernel.shape[2] - 1) // 2
    return torch.nn.functional.conv2d(
        x, kernel, stride=conv.stride, padding=padding, dilation=conv.rate
    )


def torch_norm(x, norm):
    mean, var, scale, bias = (
        torch.tensor(np.asarray(getattr(norm, name)[...]))
        for name in ("mean", "var", "scale", "bias")
    )
    return torch.nn.functional.batch_norm(x, mean, var, scale, bias, eps=norm.epsilon)


def torch_post_unit(x, unit, num_convs):
    y = x
    for i in range(1, num_convs + 1):
        y = torch_norm(torch_conv(y, getattr(unit, f"conv{i}")), getattr(unit, f"bn{i}"))
        if i < num_convs:
            y = y.relu()
    if unit.downsample is not None:
        x = torch_norm(torch_conv(x, unit.downsample[0]), unit.downsample[1])
    return (x + y).relu()


def torch_pre_unit(x, unit, num_convs):
    y = first = torch_norm(x, unit.bn1).relu()
    y = torch_conv(y, unit.conv1)
    for i in range(2, num_convs + 1):
        y = torch_conv(torch_norm(y, getattr(unit, f"bn{i}")).relu(), getattr(unit, f"conv{i}"))
    return y + (x if unit.downsample is None else torch_conv(first, unit.downsample[0]))


@pytest.mark.parametrize(
    ("residual", "reference"), [("post", torch_post_unit), ("pre", torch_pre_unit)]
)
@pytest.mark.parametrize(("unit_type", "num_convs"), [(BasicUnit, 2), (BottleneckUnit, 3)])
@pytest.mark.parametrize(
    ("stride", "entry_rate", "rate", "project"),
    [(1, 2, 2, False), (2, 1, 1, True), (1, 2, 4, True)],
)
def test_units_equal_torch(
    x64, residual, reference, unit_type, num_convs, stride, entry_rate, rate, project
):
    in_channels = 12 if project else 4 * unit_type.expansion
    plan = UnitPlan(in_channels, 4, stride, entry_rate, rate, project)
    ours = small(residual=residual, dtype="float64")
    unit = random_module(
        lambda: unit_type(plan, ours, LayerMaker("float64", 0.9, 1e-5, nnx.Rngs(0)))
    )
    x = np.random.default_rng(0).normal(size=(2, 9, 7, in_channels))
    expected = reference(torch.tensor(x.transpose(0, 3, 1, 2)), unit, num_convs)
    np.testing.assert_allclose(
        jax.jit(unit)(x), expected.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("residual", ["post", "pre"])
@pytest.mark.parametrize("stem", ["conv7x7", "deep"])
def test_stems_equal_torch(residual, stem):
    backbone = make_resnet(small(stem=stem, residual=residual, in_channels=5))
    images = np.random.default_rng(0).normal(size=(1, 37, 30, 5)).astype(np.float32)
    x = torch.tensor(images.transpose(0, 3, 1, 2))
    if stem == "deep":
        conv_a, bn_a, _, conv_b, bn_b, _, conv = backbone.conv1
        assert [c.stride for c in (conv_a, conv_b, conv)] == [2, 1, 1]
        assert [c.kernel.shape[0] for c in (conv_a, conv_b, conv)] == [3, 3, 3]
        x = torch_norm(torch_conv(x, conv_a), bn_a).relu()
        x = torch_norm(torch_conv(x, conv_b), bn_b).relu()
    else:
        conv = backbone.conv1
    x = torch_norm(torch_conv(x, conv), backbone.bn1).relu()
    x = torch.nn.functional.max_pool2d(x, 3, stride=2, padding=1)
    features = nnx.eval_shape(lambda: backbone(jnp.asarray(images)))
    assert features["layer4"].shape[:3] == (1, 3, 2)
    stem_only = jax.jit(lambda images: backbone(images)["stem"])(images)
    np.testing.assert_allclose(stem_only, x.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def test_pre_activation_ends_in_a_norm_and_relu():
    backbone = make_resnet(small(residual="pre"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 33, 33, 3)), jnp.float32)
    features = jax.jit(lambda x: backbone(x))(x)
    assert float(features["layer3"].min()) < 0 <= float(features["layer4"].min())
    # Move the last norm's bias by 5: features that were above 0 move with it.
    backbone.final_bn.bias[...] += 5.0
    moved = jax.jit(lambda x: backbone(x))(x)["layer4"]
    above = np.asarray(features["layer4"]) > 0
    np.testing.assert_allclose(moved[above], features["layer4"][above] + 5, rtol=1e-5)


# --- Recomputation -----------------------------------------------------------------------------


@pytest.mark.parametrize("update_bn", [True, False])
def test_recomputing_a_unit_changes_neither_gradients_nor_running_statistics(x64, update_bn):
    plan = UnitPlan(8, 4, 1, 1, 2, project=True)
    unit = random_module(
        lambda: BottleneckUnit(
            plan, small(dtype="float64"), LayerMaker("float64", 0.9, 1e-5, nnx.Rngs(0))
        )
    )
    graph, params, stats = nnx.split(unit, nnx.Param, nnx.BatchStat)
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 8))

    def gradients(call):
        def loss(params, x):
            module = nnx.merge(graph, params, stats, copy=True)
            return jnp.square(call(module, x)).mean(), nnx.state(module, nnx.BatchStat)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    recomputed = gradients(lambda module, x: recompute(module, x, update_bn=update_bn))
    plain = gradients(lambda module, x: module(x, update_bn=update_bn))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), recomputed, plain)
    moved = recomputed[0][1]["bn3"]["mean"].get_value()
    assert np.array_equal(moved, unit.bn3.mean[...]) != update_bn


def test_remat_recomputes_each_unit_and_moves_the_same_statistics():
    backbone = make_resnet(small(18))
    graph, state = nnx.split(backbone)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 33, 3)), jnp.float32)

    def run(remat):
        def forward(state, x):
            module = nnx.merge(graph, state, copy=True)
            return module(x, update_bn=True, remat=remat), nnx.state(module, nnx.BatchStat)

        names = [equation.primitive.name for equation in jax.make_jaxpr(forward)(state, x).eqns]
        return jax.jit(forward)(state, x), sum(name.startswith("remat") for name in names)

    (recomputed, num_recomputed), (plain, num_plain) = run(remat=True), run(remat=False)
    assert (num_recomputed, num_plain) == (8, 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), recomputed, plain
    )


@pytest.mark.parametrize(
    ("platform", "gradient", "method", "once"),
    [
        ("cpu", False, None, True),
        ("cpu", True, None, False),
        ("cpu", False, "native", False),  # read by exporters and the partitioner
        ("cuda", False, None, False),
    ],
)
def test_the_sum_of_a_unit_is_computed_once_on_cpu(platform, gradient, method, once):
    def total(shortcut, y, variance):
        return resnet._activated_sum(shortcut, y, variance).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 3, 3, 2),) * 2 + ((),)]
    function = jax.grad(total, argnums=(0, 1)) if gradient else total
    with using(method):
        traced = jax.jit(function).trace(*shapes)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert (text.count("%arg2") > 1) == once  # whether the condition is read


@pytest.mark.parametrize("variance", [0.0, float("nan")])
def test_the_sum_of_a_unit_and_its_gradients(variance):
    rng = np.random.default_rng(0)
    shortcut, y, cotangent = jnp.asarray(rng.normal(size=(3, 1, 3, 3, 2)), jnp.float32)

    def activated_sum(shortcut, y):
        return resnet._activated_sum(shortcut, y, jnp.float32(variance))

    expected = np.maximum(shortcut + y, 0)
    np.testing.assert_array_equal(activated_sum(shortcut, y), expected)
    value, gradient = jax.vjp(activated_sum, shortcut, y)
    np.testing.assert_array_equal(value, expected)
    for each in gradient(cotangent):
        np.testing.assert_array_equal(each, np.where(shortcut + y > 0, cotangent, 0))
