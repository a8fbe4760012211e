"""Cascaded blocks: strides, rates against tables from the paper, and the head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deeplab_jax.analysis import summary
from deeplab_jax.analysis.conv_trace import convolutions
from deeplab_jax.analysis.plots import model_figure
from deeplab_jax.analysis.receptive_field import variants
from deeplab_jax.config import Config
from deeplab_jax.config.rules import validate
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.backbones import resnet
from deeplab_jax.models.backbones.resnet import Bottleneck, ResNet, Stages
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.layers import ShapeRngs
from deeplab_jax.utils.errors import UserError
from drawings import texts
from random_modules import abstract_module, random_module


def cascade(blocks=3, depth=50, family="paper", **overrides):
    options = {"num_classes": 2, "width": 0.125, **overrides}
    return architecture(f"{family}_resnet{depth}", cascade=blocks, **options)


@pytest.fixture
def short(monkeypatch):
    """A ResNet-50 with one block per stage before block4."""
    monkeypatch.setitem(resnet.RESNETS, "resnet50", Stages(Bottleneck, (1, 1, 1, 3)))


# Strides and rates


def stages(ours):
    """(stride, rates) of the 3x3 convolutions of block3, block4, ..."""
    found = {}
    for conv in convolutions(FunctionalModel(ours)):
        if conv.kernel_size == 3 and conv.name.startswith("backbone.layer"):
            found.setdefault(int(conv.name[len("backbone.layer")]), []).append(conv)
    for blocks in found.values():
        assert all(conv.stride == 1 for conv in blocks[1:])
    return [
        (blocks[0].stride, tuple(conv.rate for conv in blocks))
        for stage, blocks in found.items()
        if stage >= 3
    ]


# The paper's figure 3: (a) is output stride 256, with no rate above 1, (b) is 16. Table 1 has all.
STRIDES_AND_RATES = {
    8: [(1, 2), (1, 4), (1, 8), (1, 16), (1, 32)],
    16: [(2, 1), (1, 2), (1, 4), (1, 8), (1, 16)],
    32: [(2, 1), (2, 1), (1, 2), (1, 4), (1, 8)],
    64: [(2, 1), (2, 1), (2, 1), (1, 2), (1, 4)],
    128: [(2, 1), (2, 1), (2, 1), (2, 1), (1, 2)],
    256: [(2, 1), (2, 1), (2, 1), (2, 1), (2, 1)],
}


@pytest.mark.parametrize("output_stride", STRIDES_AND_RATES)
def test_strides_and_rates_of_table_1(short, output_stride):
    found = stages(cascade(output_stride=output_stride, multi_grid=(1, 1, 1)))
    assert [(stride, set(rates)) for stride, rates in found] == [
        (stride, {rate}) for stride, rate in STRIDES_AND_RATES[output_stride]
    ]
    assert [len(rates) for _, rates in found] == [1, 3, 3, 3, 3]


# Rates of block4 to block7 at output stride 16, written by hand.
MULTI_GRIDS = {
    (1, 2, 1): [(2, 4, 2), (4, 8, 4), (8, 16, 8), (16, 32, 16)],
    (1, 2, 3): [(2, 4, 6), (4, 8, 12), (8, 16, 24), (16, 32, 48)],
    (1, 2, 4): [(2, 4, 8), (4, 8, 16), (8, 16, 32), (16, 32, 64)],
    (2, 2, 2): [(4, 4, 4), (8, 8, 8), (16, 16, 16), (32, 32, 32)],
}


@pytest.mark.parametrize("multi_grid", MULTI_GRIDS)
def test_rates_of_table_3(short, multi_grid):
    (_, block3), *copies = stages(cascade(multi_grid=multi_grid))
    assert set(block3) == {1}
    assert copies == [(1, rates) for rates in MULTI_GRIDS[multi_grid]]


def test_multi_grid_where_blocks_are_strided(short):
    """The network of table 4, at an intermediate output stride."""
    found = stages(cascade(2, output_stride=64, multi_grid=(1, 2, 1)))
    assert found[1:] == [(2, (1, 2, 1)), (2, (1, 2, 1)), (1, (2, 4, 2))]


# Parameters


def shapes(ours):
    model = FunctionalModel(ours).abstract
    return {name: leaf.shape for part in model for name, leaf in part.items()}


def test_parameters_are_the_same_at_every_output_stride_and_copies_of_block4(short):
    ours = cascade(width=1 / 64)
    here = shapes(ours)
    assert here == shapes(ours.at_output_stride(8)) == shapes(ours.at_output_stride(256))

    def block(number):
        prefix = f"backbone.layer{number}."
        return {n.removeprefix(prefix): s for n, s in here.items() if n.startswith(prefix)}

    assert block(5) == block(6) == block(7)
    assert block(5).keys() == block(4).keys()
    assert {n: s for n, s in block(5).items() if "0." not in n[:2]} == {
        n: s for n, s in block(4).items() if "0." not in n[:2]
    }
    # In the paper, logits follow the last block, without ASPP.
    head = {name: shape for name, shape in here.items() if not name.startswith("backbone.")}
    assert head == {
        "classifier.logits.kernel": (1, 1, here["backbone.layer7.2.conv3.kernel"][3], 2),
        "classifier.logits.bias": (2,),
    }


def test_no_copies_are_the_column_block4_and_aux_heads_read_block3(short):
    ours = shapes(cascade(0, family="torchvision"))
    assert not any("layer5" in name for name in ours)
    channels = ours["backbone.layer4.2.conv3.kernel"][3]
    assert ours["classifier.head_conv.conv.kernel"][:3] == (3, 3, channels)
    three = shapes(cascade(3, family="torchvision"))
    name = "aux_classifier.head_conv.conv.kernel"
    assert three[name] == ours[name]


# Values


@functools.partial(jax.jit, static_argnums=0)
def features(graph, params, stats, images):
    return nnx.merge(graph, params, stats)(images)


def test_subsampled_features_equal_the_strided_cascades():
    """The a trous identity, exact under torchvision's rule: at output stride 256 as within 32."""
    strided = cascade(depth=18, family="torchvision", output_stride=256, residual="pre")
    dense = strided.at_output_stride(32)
    module = random_module(lambda: ResNet(strided, rngs=ShapeRngs(0)))
    _, *state = nnx.split(module, nnx.Param, nnx.BatchStat)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 290, 257, 3)), jnp.float32)

    def run(ours):
        abstract = abstract_module(lambda: ResNet(ours, rngs=ShapeRngs(0)))
        return features(nnx.split(abstract)[0], *state, images)

    sparse, found = run(strided), run(dense)
    assert sparse["layer7"].shape[1:3] == (2, 2)
    for name, step in {"layer4": 1, "layer5": 2, "layer6": 4, "layer7": 8}.items():
        scale = float(jnp.abs(sparse[name]).max())
        assert scale > 0.1
        np.testing.assert_allclose(
            found[name][:, ::step, ::step] / scale, sparse[name] / scale, atol=1e-5
        )
    # The final norm and relu follow only the last block.
    assert float(sparse["layer6"].min()) < 0 <= float(sparse["layer7"].min())


# What is shown of it, and mistakes


def test_summary_shows_each_block_with_its_rates():
    found = summary.summarize(cascade(depth=18, output_stride=64), 257)
    parts = {part.name: part.rates for part in found.parts}
    assert [parts[f"backbone.layer{i}"] for i in (4, 5, 6, 7)] == [(1, 2), (1, 2), (2, 4), (4, 8)]
    assert "cascade of 3," in summary.describe(found.architecture)
    assert {"layer7", "64"} <= set(texts(model_figure(found)))
    names = [name for name, _ in variants(found.architecture)]
    assert names == [f"output stride {stride}" for stride in (8, 16, 32, 64, 128, 256)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks": None, "output_stride": 64}, r"must be 8, 16 or 32 \(nearest: 32\), got 64"),
        ({"blocks": 1, "output_stride": 128}, "must be 8, 16, 32 or 64 .*, got 128"),
        ({"blocks": 4}, "cascade must be None, 0, 1, 2 or 3, got 4"),
        ({"atrous_rates": (6,)}, "atrous_rates must be left out with cascade = "),
        ({"decoder": "transposed", "output_stride": 64}, "decoder must be bilinear or plus at"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        cascade(**overrides)


@pytest.mark.parametrize(
    ("model", "stride", "message"),
    [
        ({}, 64, r"model.output_stride must be 8, 16 or 32 \(nearest: 32\), got 64"),
        ({"cascade": 2}, 256, r"must be 8, 16, 32, 64 or 128 \(nearest: 128\), got 256"),
        ({"cascade": 4}, 64, "config.model.cascade must be None, 0, 1, 2 or 3, got 4"),
        ({"cascade": 3, "atrous_rates": (6,)}, 8, "must be left out with cascade = 3, which"),
    ],
)
def test_mistakes_in_a_config_are_named(model, stride, message):
    config = Config()
    vars(config.model).update(model, output_stride=stride)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_config_of_the_plain_cascade():
    config = Config()
    vars(config.model).update(cascade=3, output_stride=256)
    config.eval.output_stride = 8
    validate(config)
