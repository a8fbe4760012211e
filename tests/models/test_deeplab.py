"""Complete models, and their heads against torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.layers import ShapeRngs
from random_modules import abstract_module, random_module, random_variables

VARIANTS = {
    "paper": {},
    "pre": {"residual": "pre", "stem": "deep", "decoder": "transposed"},
    "os8": {"output_stride": 8, "aux_head": True, "head_conv": True},
    "cascade": {"cascade": 3, "aux_head": True},
    "plus": {"decoder": "plus"},
    "mobilenet": {"name": "torchvision_mobilenet_v3_large", "width": 1 / 16},  # mostly 8 channels
}


def narrow(**overrides):
    options = {"num_classes": 5, "width": 0.125, **overrides}
    return architecture(options.pop("name", "paper_resnet18"), **options)


@functools.cache
def split_model(ours):
    """Returns the graph, random parameters and random running statistics."""
    model = random_module(lambda: build_model(ours, rngs=ShapeRngs(0)))
    return nnx.split(model, nnx.Param, nnx.BatchStat)


def graph_of(ours):
    return nnx.split(abstract_module(lambda: build_model(ours, rngs=ShapeRngs(0))))[0]


@functools.partial(jax.jit, static_argnames=("graph", "train", "freeze_bn"))
def run(graph, params, stats, images, key=None, *, train=False, freeze_bn=False):
    """Returns logits and the running statistics after the batch."""
    model = nnx.merge(graph, params, stats)
    model.set_attributes(use_running_average=not train or freeze_bn, deterministic=not train)
    outputs = model(images, rngs=key)
    return outputs, nnx.state(model, nnx.BatchStat)


def random_images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


# Parameters


@pytest.mark.parametrize(
    ("name", "count"), [("torchvision_resnet50", 42_004_074), ("torchvision_resnet101", 60_996_202)]
)
def test_parameter_counts_are_torchvisions_with_the_auxiliary_head(name, count):
    ours = architecture(name, num_classes=21)
    model = nnx.eval_shape(lambda: build_model(ours, rngs=ShapeRngs(0)))
    _, params, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_names():
    ours = narrow(name="torchvision_resnet50")
    model = nnx.eval_shape(lambda: build_model(ours, rngs=ShapeRngs(0)))
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert names >= {
        "backbone.stem.0.conv.kernel",
        "backbone.stem.0.bn.mean",
        "backbone.layer1.0.downsample.conv.kernel",
        "backbone.layer1.0.downsample.bn.var",
        "backbone.layer4.2.conv3.kernel",
        "backbone.layer4.2.bn3.scale",
        "classifier.aspp.branches.0.conv.kernel",
        "classifier.aspp.branches.3.bn.bias",
        "classifier.aspp.branches.4.project.conv.kernel",
        "classifier.aspp.branches.4.project.bn.scale",
        "classifier.aspp.project.conv.kernel",
        "classifier.aspp.project.bn.mean",
        "classifier.head_conv.conv.kernel",
        "classifier.head_conv.bn.scale",
        "classifier.logits.kernel",
        "classifier.logits.bias",
        "aux_classifier.head_conv.conv.kernel",
        "aux_classifier.head_conv.bn.scale",
        "aux_classifier.logits.bias",
    }
    paper = nnx.eval_shape(lambda: build_model(narrow(), rngs=ShapeRngs(0)))
    paper_names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(paper))}
    heads = {name for name in paper_names if not name.startswith(("backbone", "classifier.aspp"))}
    assert heads == {"classifier.logits.kernel", "classifier.logits.bias"}


# At 1/64 all stages have the minimum of 8 channels, but shortcuts must stay convolutions.
@pytest.mark.parametrize("width", [1 / 64, 1 / 8])
@pytest.mark.parametrize("variant", [*VARIANTS, "bottleneck"])
def test_parameters_are_the_same_at_every_output_stride(variant, width):
    options = VARIANTS.get(variant, {"name": "paper_resnet50", "residual": "pre"})
    ours = narrow(**options | {"width": width})
    shapes = [
        jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype),
            nnx.to_pure_dict(
                nnx.state(nnx.eval_shape(lambda o=o: build_model(o, rngs=ShapeRngs(0))))
            ),
        )
        for o in map(ours.at_output_stride, (8, 16, 32))
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_parameters_serve_another_output_stride():
    ours = narrow(**VARIANTS["pre"])
    _, params, stats = split_model(ours)
    images = random_images(1, 65, 49, 3)
    logits = {
        stride: run(graph_of(ours.at_output_stride(stride)), params, stats, images)[0]["out"]
        for stride in (8, 16)
    }
    assert logits[8].shape == logits[16].shape == (1, 65, 49, 5)
    assert np.isfinite(logits[8]).all()
    assert not np.allclose(logits[8], logits[16], atol=1e-3)


def test_starts_from_nearly_equal_probabilities_decided_by_the_seed():
    # At the smallest width most kernels have the same shape and share a compiled initializer.
    ours = narrow(num_classes=21, width=1 / 64)
    first, again, other = (
        nnx.split(build_model(ours, rngs=nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
        for seed in (0, 0, 1)
    )
    assert same(first[1], again[1])
    assert not same(first[1], other[1])
    logits = run(*first, random_images(1, 33, 33, 3))[0]["out"]
    entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1)
    assert float(entropy.min()) > 0.9 * np.log(21)


# Shapes


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 150), st.integers(1, 150)),
    variant=st.sampled_from(sorted(VARIANTS)),
    in_channels=st.integers(1, 5),
)
def test_logits_have_the_images_size(size, variant, in_channels):
    ours = narrow(in_channels=in_channels, **VARIANTS[variant])
    images = jax.ShapeDtypeStruct((*size, in_channels), jnp.float32)

    def evaluate(images):
        model = build_model(ours, rngs=ShapeRngs(0))
        model.eval()
        return model(images)

    outputs = nnx.eval_shape(evaluate, images)
    assert set(outputs) == ({"out", "aux"} if ours.aux_head else {"out"})
    for logits in outputs.values():
        assert logits.shape == (*size, 5)
        assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("variant", "size"), [("paper", (1, 1)), ("pre", (3, 40)), ("os8", (1, 1))]
)
def test_small_images_give_finite_logits(variant, size):
    ours = narrow(**VARIANTS[variant])
    for logits in run(*split_model(ours), random_images(1, *size, 3))[0].values():
        assert logits.shape == (1, *size, 5)
        assert np.isfinite(logits).all()


# Training


@pytest.mark.parametrize("name", ["paper_resnet18", "torchvision_mobilenet_v3_large"])
def test_training_moves_the_running_statistics_and_freezing_keeps_them(name):
    ours = narrow(name=name, dropout=0.0, aux_head=True)
    graph, params, stats = split_model(ours)
    images = random_images(2, 33, 33, 3)
    trained, moved = run(graph, params, stats, images, train=True)
    frozen, kept = run(graph, params, stats, images, train=True, freeze_bn=True)
    evaluated, kept_too = run(graph, params, stats, images)
    assert same(kept, stats)
    assert same(kept_too, stats)
    for path, variable in nnx.to_flat_state(moved):
        before = dict(nnx.to_flat_state(stats))[path]
        assert not np.array_equal(variable[...], before[...]), path  # every one changes
    for name, logits in evaluated.items():
        np.testing.assert_array_equal(frozen[name], logits)
        assert not np.allclose(trained[name], logits, atol=1e-3)


def test_dropout_depends_on_the_key_and_acts_only_in_training():
    ours = narrow(dropout=0.5, aux_head=True)
    graph, params, stats = split_model(ours)
    images, key = random_images(2, 33, 33, 3), jax.random.key
    outputs = {
        "key 0": run(graph, params, stats, images, key(0), train=True, freeze_bn=True)[0],
        "key 0 again": run(graph, params, stats, images, key(0), train=True, freeze_bn=True)[0],
        "key 1": run(graph, params, stats, images, key(1), train=True, freeze_bn=True)[0],
        "evaluated": run(graph, params, stats, images, key(1))[0],
        "without a key": run(graph, params, stats, images)[0],
    }
    for head in ("out", "aux"):
        logits = {name: np.asarray(output[head]) for name, output in outputs.items()}
        np.testing.assert_array_equal(logits["key 0"], logits["key 0 again"])
        np.testing.assert_array_equal(logits["evaluated"], logits["without a key"])
        assert not np.array_equal(logits["key 0"], logits["key 1"])
        assert not np.array_equal(logits["key 1"], logits["evaluated"])


def test_one_small_image_trains_without_nan():
    """Image pooling normalizes one value per channel, and the last stage has one pixel."""
    ours = narrow(dropout=0.0, aux_head=True, decoder="transposed")
    graph, params, stats = split_model(ours)
    images = random_images(1, 5, 7, 3)

    @jax.jit
    def gradients(params):
        def loss(params):
            model = nnx.merge(graph, params, stats, copy=True)
            model.train()
            return sum(jnp.square(logits - 1).mean() for logits in model(images).values())

        return jax.grad(loss)(params)

    leaves = jax.tree.leaves(gradients(params))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.abs(leaf).max() > 0 for leaf in leaves)


@pytest.mark.parametrize("name", ["torchvision_resnet18", "torchvision_mobilenet_v3_large"])
def test_bfloat16_is_close_to_float32(name):
    ours = narrow(name=name)
    graph, params, stats = split_model(ours)
    images = random_images(1, 65, 65, 3)
    exact = run(graph, params, stats, images)[0]["out"]
    half = narrow(name=name, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(split_model(half)[1:])} == {jnp.dtype("float32")}
    rounded = run(graph_of(half), params, stats, images)[0]["out"]
    assert rounded.dtype == jnp.float32
    error = float(jnp.abs(rounded - exact).max() / jnp.std(exact))
    assert 1e-4 < error < 0.2  # computed in bfloat16, but accurate


# Mistakes


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 9, 9, 4), r"images must be \[n, h, w, 3\], got \[1, 9, 9, 4\]"),
        ((9, 9, 3), r"images must be \[n, h, w, 3\], got \[9, 9, 3\]"),
    ],
)
def test_refuses(shape, message):
    model = nnx.merge(*split_model(narrow()))
    with pytest.raises(ValueError, match=message):
        model(jnp.ones(shape))


def test_training_needs_the_key_of_dropout():
    model = FunctionalModel(narrow())
    with pytest.raises(ValueError, match=r"train=True needs a key: dropout is 0\.1"):
        model.apply(random_variables(model), jnp.ones((1, 9, 9, 3)), train=True)


@pytest.mark.parametrize("name", ["paper_resnet18", "torchvision_mobilenet_v3_large"])
def test_the_graph_definition_hashes_so_that_it_can_be_jits_key(name):
    model = nnx.eval_shape(lambda: build_model(name, num_classes=2, rngs=ShapeRngs(0)))
    graph, _ = nnx.split(model)
    assert isinstance(hash(graph), int)


def test_build_model_takes_a_name_with_classes_or_an_architecture():
    with pytest.raises(TypeError, match="build_model needs num_classes with a name"):
        build_model("paper_resnet18", rngs=nnx.Rngs(0))
    for options in ({"num_classes": 5}, {"width": 0.25}):
        with pytest.raises(TypeError, match="are for a name, not for an Architecture"):
            build_model(narrow(), rngs=nnx.Rngs(0), **options)
