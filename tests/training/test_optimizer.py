"""Optimizers against torch's and literal NumPy, schedules against formulas, rates of layers."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import tiny
from deeplab_jax.config import MeshConfig, OptimizerConfig
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training.optimizer import (
    is_decayed,
    is_head,
    make_optimizer,
    make_schedule,
    stages_to_head,
)

FORMULAS = {
    "poly": lambda t: (1 - t) ** 0.9,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "constant": lambda t: 1.0,
}


def rate_at(config, step, num_steps):
    """The learning rate by its formula."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    past = (step - config.warmup_steps) / (num_steps - config.warmup_steps)
    return config.learning_rate * FORMULAS[config.schedule](min(past, 1.0))


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize("warmup_steps", [0, 1, 300])
def test_schedules_are_their_formulas(schedule, warmup_steps):
    config = OptimizerConfig(learning_rate=0.007, schedule=schedule, warmup_steps=warmup_steps)
    ours = make_schedule(config, 3000)
    steps = [*range(0, 3001, 37), 1, 299, 300, 301, 2999, 3000, 3010]
    expected = [rate_at(config, step, 3000) for step in steps]
    # Near the end float32's 1 - t has few digits.
    np.testing.assert_allclose([ours(step) for step in steps], expected, rtol=2e-4, atol=1e-8)


SHAPES = {
    "backbone.stem.0.conv.kernel": (3, 4),
    "backbone.stem.0.bn.scale": (4,),
    "backbone.layer1.0.conv1.kernel": (4, 4),
    "backbone.layer2.0.conv1.kernel": (4, 4),
    "classifier.logits.kernel": (4, 2),
    "classifier.logits.bias": (2,),
}


def start_and_gradients(steps=5):
    rng = np.random.default_rng(0)
    start, *grads = (
        {name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(steps + 1)
    )
    return start, grads


def ours_after(config, start, grads):
    params = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    tx = make_optimizer(config, len(grads), params)
    state = tx.init(params)
    for each in grads:
        each = {name: jnp.asarray(gradient, jnp.float32) for name, gradient in each.items()}
        updates, state = tx.update(each, state, params)
        params = optax.apply_updates(params, updates)
    return params


def factors(config):
    """Of the learning rate: stem, layer1 and layer2 are 3, 2 and 1 stages before the head."""
    distances = {"stem": 3, "layer1": 2, "layer2": 1}
    return {
        name: config.layer_decay ** distances[name.split(".")[1]]
        if name.startswith("backbone.")
        else config.head_multiplier
        for name in SHAPES
    }


# The optimizers that torch has too, with the arguments that make torch's equal.
TORCHS = {
    "sgd": ({}, functools.partial(torch.optim.SGD, momentum=0.9)),
    "nesterov": (
        {"arguments": {"nesterov": True}, "momentum": 0.8},
        functools.partial(torch.optim.SGD, momentum=0.8, nesterov=True),
    ),
    "adamw": (
        {"name": "adamw", "arguments": {"b1": 0.8, "b2": 0.95, "eps": 1e-3}},
        functools.partial(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-3),
    ),
    # Without weight decay of its own: it is added to the gradient.
    "adam": ({"name": "adam"}, torch.optim.Adam),
    "rmsprop": (
        {"name": "rmsprop", "arguments": {"decay": 0.99, "eps_in_sqrt": False}},
        torch.optim.RMSprop,
    ),
}


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", TORCHS)
def test_five_steps_equal_torch(optimizer, clip_norm, schedule):
    fields, make_theirs = TORCHS[optimizer]
    config = OptimizerConfig(
        learning_rate=0.1,
        weight_decay=0.3,
        head_multiplier=10.0,
        layer_decay=0.7,
        clip_norm=clip_norm,
        schedule=schedule,
        **fields,
    )
    start, grads = start_and_gradients()
    ours = ours_after(config, start, grads)

    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    groups = [
        {"params": [theirs[name]], "weight_decay": 0.3 if name.endswith("kernel") else 0.0}
        for name in SHAPES
    ]
    optimizer = make_theirs(groups, lr=1.0)
    for step, each in enumerate(grads):
        for group, factor in zip(optimizer.param_groups, factors(config).values(), strict=True):
            group["lr"] = factor * rate_at(config, step, 5)
        for name, tensor in theirs.items():
            tensor.grad = torch.tensor(each[name])
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip_norm)
        optimizer.step()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor.detach().numpy(), rtol=5e-5, atol=5e-6)


def lion(value, gradient, moment, rate, decay):
    """Algorithm 2 of arXiv 2302.06675."""
    direction = np.sign(0.9 * moment + 0.1 * gradient) + decay * value
    return value - rate * direction, 0.95 * moment + 0.05 * gradient


def sgdw(value, gradient, moment, rate, decay):
    """Algorithm 1 of arXiv 1711.05101, with the learning rate on the decay too."""
    moment = 0.9 * moment + gradient
    return value - rate * (moment + decay * value), moment


@pytest.mark.parametrize(
    ("fields", "update"),
    [
        ({"name": "lion", "arguments": {"b2": 0.95}}, lion),
        ({"decoupled_weight_decay": True}, sgdw),
    ],
)
def test_five_steps_equal_the_papers_algorithms(fields, update):
    config = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.3, head_multiplier=3.0, layer_decay=0.5, **fields
    )
    params, grads = start_and_gradients()
    ours = ours_after(config, params, grads)
    moments = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step, each in enumerate(grads):
        for name, factor in factors(config).items():
            rate, decay = factor * rate_at(config, step, 5), 0.3 * name.endswith("kernel")
            params[name], moments[name] = update(
                params[name], each[name], moments[name], rate, decay
            )
    for name, value in params.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6)


# The first argument that each takes for the mask of its weight decay differs.
@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "adamaxw", "nadamw", "adan", "lars"])
def test_five_steps_equal_a_plain_loop_with_optax(name):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, weight_decay=0.3, schedule="cosine", warmup_steps=2
    )
    start, grads = start_and_gradients()
    mask = {name: name.endswith("kernel") for name in SHAPES}
    argument = "weight_decay_mask" if name == "lars" else "mask"
    params = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    state = None
    for step, each in enumerate(grads):
        rate = rate_at(config, step, 5)
        tx = getattr(optax, name)(rate, weight_decay=0.3, **{argument: mask})
        state = tx.init(params) if state is None else state
        each = {name: jnp.asarray(gradient, jnp.float32) for name, gradient in each.items()}
        updates, state = tx.update(each, state, params)
        params = optax.apply_updates(params, updates)
    ours = ours_after(config, start, grads)
    for name, value in params.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6)


PARTS = {
    "paper_resnet18": ["layer4", "layer3", "layer2", "layer1", "stem"],
    "paper_resnet50_cascade": [*(f"layer{number}" for number in range(7, 0, -1)), "stem"],
    "torchvision_mobilenet_v3_large": [*(f"block{number}" for number in range(15, 0, -1)), "stem"],
    "tf_mobilenet_v2": [*(f"block{number}" for number in range(17, 0, -1)), "stem"],
}


@pytest.mark.parametrize("name", PARTS)
def test_rates_of_the_stages_of_a_model(name):
    """A step of SGD with layer decay 1/2 is that without, times powers of two, exactly."""
    cascade = 3 if name.endswith("_cascade") else None
    chosen = architecture(name.removesuffix("_cascade"), num_classes=2, cascade=cascade)
    params = FunctionalModel(dataclasses.replace(chosen, width=1 / 64)).abstract.params
    ones = {name: jnp.ones(()) for name in params}

    def update(**fields):
        tx = make_optimizer(OptimizerConfig(momentum=0, **fields), 5, ones)
        return tx.update(ones, tx.init(ones), ones)[0]

    plain, scaled = update(), update(layer_decay=0.5, head_multiplier=4.0)
    distances = {part: distance for distance, part in enumerate(PARTS[name], start=1)}
    distances |= {"last": 1}  # MobileNetV3's 1x1 convolution after its blocks
    for parameter in params:
        room, part = parameter.split(".")[:2]
        expected = 0.5 ** distances[part] if room == "backbone" else 4.0
        assert float(scaled[parameter] / plain[parameter]) == expected, parameter


def test_stages_of_other_backbones():
    names = [
        "stem.kernel",
        "stem_norm.scale",
        "stages.0.1.kernel",
        "stages.1.0.kernel",
        "norm.bias",
    ]
    names = [f"backbone.{name}" for name in names]
    assert list(stages_to_head([*names, "classifier.0.kernel"]).items()) == list(
        zip(names, (3, 3, 2, 1, 1), strict=True)
    )
    assert stages_to_head(["backbone.conv.kernel"]) == {"backbone.conv.kernel": 1}


def test_a_fully_sharded_adamw_steps_as_on_one_device():
    config = tiny.get_config()
    config.optimizer = OptimizerConfig(name="adamw", schedule="cosine", layer_decay=0.8)
    one, curve = tiny.Run(config).train(2)
    config.mesh = MeshConfig(data=4, fully_sharded=True)
    four, same_curve = tiny.Run(config).train(2)
    losses, same_losses = ([each["loss"] for each in history] for history in (curve, same_curve))
    np.testing.assert_allclose(same_losses, losses, rtol=1e-4)
    kernel = "backbone.layer4.1.conv2.kernel"
    for moments in (optax.tree.get(four.opt_state, "mu"), optax.tree.get(four.opt_state, "nu")):
        array = moments[kernel]
        assert 4 * array.addressable_shards[0].data.size == array.size
    before, after = optax.tree.get(one.opt_state, "mu"), optax.tree.get(four.opt_state, "mu")
    np.testing.assert_allclose(after[kernel], before[kernel], rtol=1e-2, atol=1e-5)


def test_which_parameters_are_decayed_and_which_are_the_heads():
    assert is_decayed("backbone.layer1.0.conv1.kernel")
    assert not is_decayed("backbone.stem.0.bn.scale")
    assert not is_decayed("classifier.logits.bias")
    assert is_head("classifier.aspp.project.conv.kernel")
    assert is_head("aux_classifier.head_conv.conv.kernel")
    assert not is_head("backbone.stem.0.conv.kernel")
