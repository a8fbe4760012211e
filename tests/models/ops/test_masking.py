"""A padded image gives the same logits as without padding."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.layers import ShapeRngs
from deeplab_jax.models.ops.masking import mask_padding, padding_mask, valid_sizes
from deeplab_jax.models.ops.pooling import max_pool, mean_over_image
from deeplab_jax.models.ops.resize import resize_bilinear
from random_modules import random_variables

PADDED = (65, 49)
SIZES = [(1, 1), (1, 40), (38, 47), (65, 49), (64, 3)]

# Each backbone, head, decoder and output stride reads neighbouring pixels in its own way.
VARIANTS = {
    "paper": ({}, SIZES),
    "output stride 8, both heads": (
        {"output_stride": 8, "aux_head": True, "head_conv": True},
        SIZES[1:3],
    ),
    "output stride 32, bottleneck": (
        {"name": "paper_resnet50", "output_stride": 32, "atrous_rates": (2, 3)},
        SIZES[2:3],
    ),
    "pre-activation, deep stem, transposed": (
        {"residual": "pre", "stem": "deep", "decoder": "transposed"},
        SIZES[1:3],
    ),
    "pre-activation, 7x7 stem, output stride 8, transposed": (
        {"residual": "pre", "decoder": "transposed", "output_stride": 8},
        SIZES[2:3],
    ),
    "bottleneck, pre-activation, stride on conv1": (
        {"name": "torchvision_resnet50", "residual": "pre", "stride_place": "conv1"},
        SIZES[2:3],
    ),
    "mobilenet, plus": (
        {"name": "torchvision_mobilenet_v3_large", "width": 0.25, "decoder": "plus"},
        SIZES[2:3],
    ),
    "pooled shortcuts, wide stem, separable plus, aligned corners": (
        {
            "name": "smpplus_resnet50",
            "shortcut": "avg_pool",
            "stem": "deep128",
            "atrous_rates": (2, 3),
            "output_stride": 16,
            "decoder_convs": 2,
        },
        SIZES[1:3],
    ),
    "pooled shortcuts, output stride 8, aligned corners, 1x1 pyramid, both heads": (
        {"name": "smp_resnet18", "shortcut": "avg_pool", "atrous_rates": (), "aux_head": True},
        SIZES[2:4],
    ),
    "mmseg": ({"name": "mmseg_resnet18", "multi_grid": (1, 2, 4)}, SIZES[2:3]),
    "mobilenet, SAME padding": ({"name": "tf_mobilenet_v2", "decoder": "plus"}, SIZES[1:4]),
    "cascade": ({"cascade": 2, "output_stride": 64, "residual": "pre"}, SIZES[2:3]),
}


@functools.cache
def model_and_variables(**overrides):
    options = {"num_classes": 5, "width": 0.125, **overrides}
    ours = architecture(options.pop("name", "paper_resnet18"), **options)
    model = FunctionalModel(ours)
    return model, random_variables(model)


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, images, sizes=None):
    return model.apply(variables, images, sizes=sizes)[0]


def pad(images, shape, fill):
    """Stacks images, padded with a value that must not matter."""
    padded = np.full((len(images), *shape, images[0].shape[2]), fill, images[0].dtype)
    for row, image in zip(padded, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return jnp.asarray(padded)


def largest_difference(variant, sizes, dtype="float32", fill=np.nan):
    """Returns the largest relative difference between padded and unpadded logits."""
    model, variables = model_and_variables(**variant, dtype=dtype)
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(*size, 3)).astype(dtype) for size in sizes]
    # With NaN as padding, any read of the padding shows in the logits.
    padded = run(model, variables, pad(images, PADDED, fill), jnp.asarray(sizes))
    differences = []
    for row, image in enumerate(images):
        unpadded = run(model, variables, jnp.asarray(image)[None])
        assert padded.keys() == unpadded.keys() >= {"out"}
        for head, expected in unpadded.items():
            height, width = image.shape[:2]
            ours = padded[head][row, :height, :width]
            assert np.abs(expected).max() > 0.01
            differences.append(np.abs(ours - expected[0]).max() / np.abs(expected).max())
    return max(differences)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_unpadded_image(variant):
    assert largest_difference(*VARIANTS[variant]) < 1e-5


def test_float64_logits_are_those_of_the_unpadded_image(x64):
    assert largest_difference({}, SIZES[2:3], "float64") < 1e-11


def test_bfloat16_logits_are_close_to_those_of_the_unpadded_image():
    model, variables = model_and_variables(dtype="bfloat16")
    image = np.random.default_rng(0).normal(size=(38, 47, 3)).astype(np.float32)
    padded = run(model, variables, pad([image], PADDED, np.nan), jnp.asarray([(38, 47)]))["out"]
    unpadded = run(model, variables, jnp.asarray(image)[None])["out"]
    assert np.abs(padded[:, :38, :47] - unpadded).max() < 0.02 * np.abs(unpadded).max()


@pytest.fixture
def maps():
    """Two maps at half the size of images of 66x50, padded by NaN, and their sizes."""
    values = np.random.default_rng(0).normal(-3, 1, (2, 33, 25, 4)).astype(np.float32)
    sizes = [(33, 25), (20, 9)]
    padded = np.full_like(values, np.nan)
    for row, (height, width) in enumerate(sizes):
        padded[row, :height, :width] = values[row, :height, :width]
    return jnp.asarray(padded), sizes


@jax.jit
def mean_pool_mask(x):
    with padding_mask(jnp.asarray([(65, 50), (39, 18)]), (2, 66, 50, 3)):
        return valid_sizes(x), mean_over_image(x, jnp.float32), max_pool(x), mask_padding(x, 7)


def test_mean_and_pool_are_over_the_image(maps):
    x, sizes = maps
    valid, mean, pooled, filled = jax.device_get(mean_pool_mask(x))
    np.testing.assert_array_equal(valid, sizes)
    for row, (height, width) in enumerate(sizes):
        image = np.asarray(x)[row, :height, :width]
        np.testing.assert_allclose(mean[row, 0, 0], image.mean((0, 1)), rtol=1e-5)
        for top, left in np.ndindex(-(-height // 2), -(-width // 2)):
            window = image[max(0, 2 * top - 1) : 2 * top + 2, max(0, 2 * left - 1) : 2 * left + 2]
            np.testing.assert_array_equal(pooled[row, top, left], window.max((0, 1)))
        assert np.all(filled[row, height:] == 7)
        assert np.all(filled[row, :, width:] == 7)
        np.testing.assert_array_equal(filled[row, :height, :width], image)
    # In the padding, the next layer needs numbers that do not overflow.
    assert np.abs(pooled).max() < 100


def test_resize_weighs_pixels_of_large_images_exactly():
    """Coordinates in float32 would have 11 bits before the point and leave 13 behind it."""
    stripes = (np.arange(3000) % 2).astype(np.float32)[None, :, None, None]
    sizes = {"in_sizes": jnp.asarray([(2999, 1)]), "out_sizes": jnp.asarray([(2001, 1)])}
    resized = resize_bilinear(jnp.asarray(stripes), 2050, 1, **sizes)
    centres = (np.arange(2001) + 0.5) * 2999 / 2001 - 0.5
    ours = np.asarray(resized)[0, :2001, 0, 0]
    np.testing.assert_allclose(ours, 1 - np.abs(centres % 2 - 1), atol=1e-6)


def test_nothing_is_computed_for_padding_without_sizes():
    model, variables = model_and_variables()
    images, sizes = jnp.zeros((1, 65, 65, 3)), jnp.ones((1, 2), jnp.int32)

    def operations(**options):
        jaxpr = jax.make_jaxpr(lambda x: model.apply(variables, x, **options)[0])(images)
        return [equation.primitive.name for equation in jaxpr.eqns]

    assert operations().count("lt") == 0
    assert operations(sizes=sizes).count("lt") > 10


@pytest.mark.parametrize("padded", [(1, 1), (2, 33), (9, 4), (16, 17), (32, 32), (33, 1)])
def test_strides_are_told_apart_in_padded_images_of_any_size(padded):
    """The stride of a map follows from its size and the images' size."""
    for height in range(1, padded[0] + 1):
        with padding_mask(jnp.asarray([(height, padded[1])]), (1, *padded, 3)):
            for stride in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                x = jnp.zeros((1, *(-(-side // stride) for side in padded), 1))
                expected = [-(-side // stride) for side in (height, padded[1])]
                assert valid_sizes(x).tolist() == [expected]


def test_a_row_without_pixels_has_no_effect():
    model, variables = model_and_variables()
    images = np.random.default_rng(0).normal(size=(2, *PADDED, 3)).astype(np.float32)
    sizes = [(38, 47), (0, 0)]
    outputs = run(model, variables, jnp.asarray(images), jnp.asarray(sizes))
    assert np.isfinite(outputs["out"]).all()


def test_training_refuses_sizes():
    model, variables = model_and_variables()
    images, sizes = jnp.zeros((2, 40, 40, 3)), jnp.ones((2, 2), jnp.int32)
    with pytest.raises(ValueError, match="takes no sizes: padding is for inf"):
        model.apply(variables, images, train=True, key=jax.random.key(0), sizes=sizes)


def test_refuses_sizes_of_other_images():
    model, _ = model_and_variables()
    module = nnx.eval_shape(lambda: build_model(model.architecture, rngs=ShapeRngs(0)))
    with pytest.raises(ValueError, match=r"sizes must be \[2, 2\], got \[1, 2\]"):
        module(jnp.zeros((2, 40, 40, 3)), sizes=jnp.ones((1, 2), jnp.int32))


def test_refuses_maps_of_other_images():
    with (
        padding_mask(jnp.ones((1, 2), jnp.int32), (1, 40, 40, 3)),
        pytest.raises(ValueError, match="a map of 7x7 is not that of images of 40x40"),
    ):
        valid_sizes(jnp.zeros((1, 7, 7, 1)))


def test_mask_ends_with_its_block():
    x = jnp.zeros((1, 40, 40, 1))
    with contextlib.suppress(KeyError), padding_mask(jnp.ones((1, 2), jnp.int32), x.shape):
        assert valid_sizes(x) is not None
        raise KeyError
    assert valid_sizes(x) is None
