"""The branches of ASPP; `tests/weights` compares its values with torchvision's."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deeplab_jax.models.heads import ASPP
from random_modules import random_module


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
