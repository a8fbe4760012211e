"""Sums of batch norm, in the forms for each platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.models.ops import batch_norm


def test_sums_by_one_reduction_are_those_by_two():
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((3, 7, 5, 4)) for _ in range(2))
    for sums in (batch_norm._sum_apart, batch_norm._sum_together):
        found = sums(jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32))
        for mine, map_ in zip(found, (first, second), strict=True):
            np.testing.assert_allclose(mine, map_.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("platform", "count"), [("cpu", 4), ("tpu", 4), ("cuda", 2)])
def test_reductions_of_a_platform(platform, count):
    def norm(x):
        y, _, _ = batch_norm.normalize_by_batch(x, jnp.ones(4), jnp.ones(4), 1e-5)
        return jnp.sum(jnp.sin(y), (1, 2, 3))[0]

    x = jax.ShapeDtypeStruct((2, 5, 5, 4), jnp.float32)
    lowered = jax.jit(jax.grad(norm)).trace(x).lower(lowering_platforms=(platform,))
    # The statistics and the sums of the gradient; reductions over all axes but the last.
    assert lowered.as_text().count("dimensions = [0, 1, 2]") == count
