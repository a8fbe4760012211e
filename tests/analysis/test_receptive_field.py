"""The effective receptive field against difference quotients and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.analysis import receptive_field
from deeplab_jax.analysis.receptive_field import EffectiveField, effective_field
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from random_modules import random_variables

ARCHITECTURE = architecture("paper_resnet18", num_classes=3, width=0.125)


@pytest.fixture(scope="module")
def variables():
    return random_variables(FunctionalModel(ARCHITECTURE))


def test_energy_is_that_of_difference_quotients(variables):
    height, width = 33, 49
    field = effective_field(ARCHITECTURE, variables, height, width, samples=1, seed=3)
    assert field.energy.sum() == pytest.approx(1)
    assert field.centre == (16, 32)
    key = jax.random.split(jax.random.key(3), 1)[0]
    image = jax.random.normal(key, (1, height, width, 3), jnp.float32)
    model = FunctionalModel(ARCHITECTURE)
    pixels = [(16, 16), (20, 9), (5, 40)]
    # Small, so that few of the relus change; far above the rounding of the logits.
    step = 2e-3

    @jax.jit
    def logits(images):
        return model.apply(variables, images, upsample=False)[0]["out"][:, 1, 2].sum(-1)

    moved = []
    for sign in (1, -1):
        for row, column in pixels:
            moved += [image[0].at[row, column, c].add(sign * step) for c in range(3)]
    values = np.asarray(logits(jnp.stack(moved))).reshape(2, len(pixels), 3)
    energy = np.abs((values[0] - values[1]) / (2 * step)).sum(-1)
    ours = np.array([field.energy[pixel] for pixel in pixels])
    np.testing.assert_allclose(ours / ours.sum(), energy / energy.sum(), rtol=0.05, atol=0.01)


def test_energy_is_the_mean_over_seeded_samples(variables):
    def energy(**options):
        return effective_field(ARCHITECTURE, variables, 33, 49, **options).energy

    steps = []
    one = energy(samples=1, seed=3)
    np.testing.assert_array_equal(one, energy(samples=1, seed=3))
    many = energy(samples=3, seed=3, progress=lambda: steps.append(1))
    assert len(steps) == 3
    assert not np.allclose(many, one)
    assert many.std() < one.std()  # smoother


def test_a_learned_decoder_and_bfloat16_do_not_matter(variables):
    other = dataclasses.replace(ARCHITECTURE, decoder="transposed", dtype="bfloat16")
    decoder = {"decoder.kernel": np.ones((64, 64, 3), np.float32)}
    more = Variables(variables.params | decoder, variables.batch_stats)
    np.testing.assert_array_equal(
        effective_field(other, more, 33, 49, samples=1).energy,
        effective_field(ARCHITECTURE, variables, 33, 49, samples=1).energy,
    )


@pytest.mark.parametrize(
    ("fraction", "side"), [(0.01, 1), (1 / 81, 1), (9 / 81, 3), (10 / 81, 5), (0.5, 7), (1.0, 9)]
)
def test_side_of_an_even_field(fraction, side):
    field = EffectiveField(np.full((9, 9), 1 / 81), (4, 4), 99)
    assert field.side(fraction - 1e-9) == side


def test_side_is_centred_and_may_exceed_the_image():
    energy = np.zeros((5, 11))
    energy[2, 2] = energy[2, 10] = 0.5
    field = EffectiveField(energy, (2, 2), 99)
    assert field.side(0.5) == 1
    assert field.side(0.51) == 17
    assert field.side() == 17


def test_variants_have_the_same_parameters():
    variants = dict(receptive_field.variants(ARCHITECTURE))
    assert [(v.output_stride, v.atrous_rates) for v in variants.values()] == [
        *((8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9)), (16, (1, 1, 1))),
    ]
    assert "output stride 32, ASPP rates 3, 6, 9" in variants
    shapes = [jax.tree.map(jnp.shape, FunctionalModel(v).abstract) for v in variants.values()]
    assert all(shape == shapes[0] for shape in shapes)
    odd = dataclasses.replace(ARCHITECTURE, atrous_rates=(5, 7))  # 2.5 at output stride 32
    assert [v.output_stride for _, v in receptive_field.variants(odd)] == [8, 16, 16]
    without = dataclasses.replace(ARCHITECTURE, atrous_rates=())
    names = [name for name, _ in receptive_field.variants(without)]
    assert names == ["output stride 8", "output stride 16", "output stride 32"]


def test_damaged_weights_are_an_error(variables):
    broken = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan), variables)
    with pytest.raises(
        UserError, match=r"paper_resnet18: .* sums to nan, expected .* weights seem to be damaged"
    ):
        effective_field(ARCHITECTURE, broken, 33, 49, samples=1)
    with pytest.raises(ValueError, match="samples must be 1 or more, got 0"):
        effective_field(ARCHITECTURE, variables, 33, 49, samples=0)
