"""The optimizer against torch's SGD, and the schedule against its formula."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from deeplab_jax.config import OptimizerConfig
from deeplab_jax.training.optimizer import is_decayed, is_head, make_optimizer, poly_schedule


def test_poly_schedule_is_the_papers_formula():
    schedule = poly_schedule(OptimizerConfig(learning_rate=0.007, power=0.9), 30_000)
    for step in (0, 1, 15_000, 29_999, 30_000):
        np.testing.assert_allclose(
            schedule(step), 0.007 * (1 - step / 30_000) ** 0.9, rtol=1e-4, atol=1e-9
        )


def test_warmup_rises_from_zero_and_meets_the_schedule():
    schedule = poly_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 110)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(schedule(60), 0.5**0.9, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_five_steps_equal_torch(clip_norm):
    config = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.01, head_multiplier=10.0, clip_norm=clip_norm
    )
    rng = np.random.default_rng(0)
    start = {
        "backbone.stem.0.conv.kernel": rng.normal(size=(3, 4)),
        "backbone.stem.0.bn.scale": rng.normal(size=4),
        "classifier.logits.kernel": rng.normal(size=(4, 2)),
        "classifier.logits.bias": rng.normal(size=2),
    }
    params = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    tx = make_optimizer(config, 5, params)
    state = tx.init(params)

    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    groups = [
        {
            "params": [tensor],
            "weight_decay": 0.01 if name.endswith("kernel") else 0.0,
            "lr": 0.1 * (1 if name.startswith("backbone.") else 10),
        }
        for name, tensor in theirs.items()
    ]
    sgd = torch.optim.SGD(groups, momentum=0.9)
    poly = torch.optim.lr_scheduler.PolynomialLR(sgd, total_iters=5, power=0.9)

    for _ in range(5):
        grads = {name: rng.normal(size=value.shape) for name, value in start.items()}
        updates, state = tx.update(
            {name: jnp.asarray(g, jnp.float32) for name, g in grads.items()}, state, params
        )
        params = optax.apply_updates(params, updates)
        for name, tensor in theirs.items():
            tensor.grad = torch.tensor(grads[name])
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip_norm)
        sgd.step()
        poly.step()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_which_parameters_are_decayed_and_which_are_the_heads():
    assert is_decayed("backbone.layer1.0.conv1.kernel")
    assert not is_decayed("backbone.stem.0.bn.scale")
    assert not is_decayed("classifier.logits.bias")
    assert is_head("classifier.aspp.project.conv.kernel")
    assert is_head("aux_classifier.head_conv.conv.kernel")
    assert not is_head("backbone.stem.0.conv.kernel")
