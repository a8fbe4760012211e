"""Max pooling and its gradient against torch."""

import jax
import numpy as np
import pytest
import torch

from deeplab_jax.models.ops.pooling import max_pool


@pytest.mark.parametrize("values", ["distinct", "equal"])
@pytest.mark.parametrize(("h", "w"), [(9, 9), (8, 8), (7, 10), (2, 3), (1, 1), (9, 1), (33, 64)])
def test_max_pool_and_its_gradient_equal_torch(h, w, values):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, h, w, 3)).astype(np.float32)
    if values == "equal":  # as after relu: the first of equal values gets the gradient
        x = np.maximum(np.rint(x), 0)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(theirs, 3, stride=2, padding=1)
    cotangent = rng.standard_normal(pooled.shape).astype(np.float32)
    pooled.backward(torch.tensor(cotangent))

    ours, gradient = jax.vjp(jax.jit(max_pool), x)
    np.testing.assert_array_equal(ours, pooled.detach().numpy().transpose(0, 2, 3, 1))
    expected = theirs.grad.numpy().transpose(0, 2, 3, 1)
    found = gradient(cotangent.transpose(0, 2, 3, 1))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
