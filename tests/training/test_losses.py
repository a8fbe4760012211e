"""Losses against torch and literal float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deeplab_jax import config as config_lib
from deeplab_jax.config import LossConfig, MeshConfig
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.distributed.mesh import make_mesh, row_sharding
from deeplab_jax.models.ops.resize import resize_bilinear
from deeplab_jax.training import losses


def batch(seed, shape=(2, 7, 5), classes=4, ignored=0.3):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, classes)).astype(np.float32) * 3
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    labels[rng.random(shape) < ignored] = IGNORE
    return logits, labels


@functools.cache
def compiled(settings):
    """Value and gradient of the mean loss; one program for each config and shape."""
    config = LossConfig(**dict(settings))

    def mean_loss(logits, labels):
        total = losses.loss_sum(logits, labels, config)
        return losses.mean(total, losses.loss_count(labels, config))

    return jax.jit(jax.value_and_grad(mean_loss))


def value_and_gradient(logits, labels, **config):
    value, gradient = compiled(tuple(config.items()))(logits, labels)
    return float(value), np.asarray(gradient)


def mean_loss(logits, labels, **config):
    return value_and_gradient(logits, labels, **config)[0]


def torch_value_and_gradient(loss, logits):
    """Of a function of float64 logits `[n, h, w, classes]` by torch's autograd."""
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    value = loss(theirs)
    value.backward()
    return value.item(), theirs.grad.numpy()


def agree(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=2e-8)


def test_the_registries_hold_these_losses():
    assert config_lib.PIXEL_LOSSES["focal"] is losses.focal
    assert config_lib.IMAGE_LOSSES["dice"] is losses.dice
    assert config_lib.IMAGE_LOSSES["lovasz"] is losses.lovasz


# Losses of pixels


@pytest.mark.parametrize("class_weights", [None, (0.2, 1.0, 3.0, 0.5)])
def test_cross_entropy_is_torchs(class_weights):
    logits, labels = batch(0)
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)

    def reference(theirs):
        return torch.nn.functional.cross_entropy(
            theirs.permute(0, 3, 1, 2),
            torch.tensor(labels.astype(np.int64)),
            weight=weight,
            ignore_index=IGNORE,
        )

    ours = value_and_gradient(logits, labels, class_weights=class_weights)
    agree(ours, torch_value_and_gradient(reference, logits))


@pytest.mark.parametrize("smoothing", [0.05, 0.4])
@pytest.mark.parametrize("class_weights", [None, (0.2, 0.0, 3.0, 0.5)])
@pytest.mark.parametrize(
    ("low", "high", "align_corners"),
    [((7, 5), (7, 5), False), ((3, 3), (33, 20), False), ((2, 5), (9, 17), True)],
)
def test_label_smoothing_is_torchs(low, high, align_corners, class_weights, smoothing):
    logits, _ = batch(6, (2, *low))
    _, labels = batch(7, (2, *high))
    config = LossConfig(label_smoothing=smoothing, class_weights=class_weights)
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)

    def reference(theirs):
        resized = theirs.permute(0, 3, 1, 2)
        if low != high:
            resized = torch.nn.functional.interpolate(
                resized, high, mode="bilinear", align_corners=align_corners
            )
        return torch.nn.functional.cross_entropy(
            resized,
            torch.tensor(labels.astype(np.int64)),
            weight=weight,
            ignore_index=IGNORE,
            label_smoothing=smoothing,
        )

    def mean_loss(logits, labels):
        total = losses.loss_sum(logits, labels, config, align_corners=align_corners)
        return losses.mean(total, losses.loss_count(labels, config))

    value, gradient = jax.jit(jax.value_and_grad(mean_loss))(logits, labels)
    agree((value, np.asarray(gradient)), torch_value_and_gradient(reference, logits))


@pytest.mark.parametrize(
    ("gamma", "class_weights"),
    [(0.0, (0.2, 1.0, 3.0, 0.5)), (0.5, None), (2.0, (0.2, 1.0, 3.0, 0.5)), (5.0, None)],
)
def test_focal_is_its_formula(gamma, class_weights):
    logits, labels = batch(5)
    labels[0, 0, 0], logits[0, 0, 0] = 1, (0, 200, 0, 0)  # certain and right: p = 1 exactly
    valid = torch.tensor(labels != IGNORE)
    targets = torch.tensor(np.where(labels == IGNORE, 0, labels).astype(np.int64))
    table = torch.tensor(class_weights or (1.0,) * 4, dtype=torch.float64)
    weights = torch.where(valid, table[targets], 0.0)

    def reference(theirs):
        log_p = torch.log_softmax(theirs, -1).gather(-1, targets[..., None])[..., 0]
        wrong = (1 - log_p.exp()).clamp_min(1e-12)  # at p = 1 exactly autograd would give NaN
        return (weights * wrong**gamma * -log_p).sum() / weights.sum()

    ours = value_and_gradient(
        logits, labels, name="focal", focal_gamma=gamma, class_weights=class_weights
    )
    agree(ours, torch_value_and_gradient(reference, logits))
    if gamma == 0:
        assert ours[0] == mean_loss(logits, labels, class_weights=class_weights)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_finite_where_the_model_is_certain(gamma):
    logits = np.zeros((1, 1, 2, 3), np.float32)
    logits[0, 0, :, 1] = 1e4
    labels = np.array([[[1, 0]]], np.uint8)  # right, and utterly wrong
    value, gradient = value_and_gradient(logits, labels, name="focal", focal_gamma=gamma)
    assert value == pytest.approx(5e3)
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[0, 0, 0] == 0)


def test_mean_is_per_valid_pixel_of_the_whole_batch():
    logits, labels = batch(2)
    labels[0] = IGNORE  # a mean of the images' means would halve the loss
    labels[0, 0, 0] = 1
    logged = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    valid = [(i, int(labels[i])) for i in np.ndindex(labels.shape) if labels[i] != IGNORE]
    expected = np.mean([logged[(*i, label)] for i, label in valid])
    np.testing.assert_allclose(mean_loss(logits, labels), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "fraction"),
    [("cross_entropy", 0.1), ("cross_entropy", 0.5), ("cross_entropy", 0.999), ("focal", 0.25)],
)
def test_hard_pixels_are_the_top_k(name, fraction):
    logits, labels = batch(4, shape=(2, 20, 13))
    log_p = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    each = -log_p if name == "cross_entropy" else -((1 - np.exp(log_p)) ** 2) * log_p
    valid = labels != IGNORE
    picked = np.take_along_axis(each, np.where(valid, labels, 0)[..., None].astype(int), -1)[..., 0]
    ordered = np.sort(picked[valid])[::-1]
    kept = fraction * valid.sum()
    whole = int(kept)
    expected = (
        ordered[:whole].sum() + (kept - whole) * ordered[min(whole, len(ordered) - 1)]
    ) / kept
    value, gradient = value_and_gradient(logits, labels, name=name, hard_pixel_fraction=fraction)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    touched = np.any(gradient != 0, axis=-1).sum()
    assert touched in (int(np.floor(kept)), int(np.ceil(kept)))


def test_equal_losses_at_the_threshold_are_weighted_equally():
    values = jnp.asarray([[[1.0, 1.0, 1.0, 2.0]]])
    weights = losses.top_k_weights(values, jnp.ones_like(values, bool), jnp.asarray(2.0))
    np.testing.assert_allclose(np.asarray(weights).ravel(), [1 / 3, 1 / 3, 1 / 3, 1])


# Losses of images


def per_image(class_loss, labels):
    """Mean over the images that have a valid pixel of the mean over the classes they hold."""

    def loss(logits):
        images = []
        for p, label in zip(torch.softmax(logits, -1), torch.tensor(labels), strict=True):
            valid = label != IGNORE
            if valid.any():
                present = label[valid].unique().tolist()
                images.append(
                    sum(class_loss(p[valid][:, c], label[valid] == c) for c in present)
                    / len(present)
                )
        return sum(images) / len(images)

    return loss


def dice_of_class(p, true):
    return 1 - 2 * p[true].sum() / (p.sum() + true.sum())


def lovasz_of_class(p, true):
    """Literally: the Lovász extension of the Jaccard loss, as a sum over sets that grow."""
    errors = torch.where(true, 1 - p, p)
    order = torch.argsort(errors, descending=True)
    wrong = torch.zeros_like(true)
    total, before = 0.0, 0.0
    for place in order:
        wrong[place] = True
        predicted = true ^ wrong
        jaccard_loss = 1 - (true & predicted).sum() / (true | predicted).sum().double()
        total = total + errors[place] * (jaccard_loss - before)
        before = jaccard_loss
    return total


CLASS_LOSSES = {"dice": dice_of_class, "lovasz": lovasz_of_class}


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("case", ["plain", "absent class", "one pixel", "an ignored image"])
def test_losses_of_images_are_their_definitions(name, case):
    logits, labels = batch(6, shape=(3, 6, 5))
    if case == "absent class":
        labels[labels == 2] = IGNORE
        labels[0][labels[0] == 1] = 3
    if case == "one pixel":
        labels[1] = IGNORE
        labels[1, 2, 3] = 1
    if case == "an ignored image":
        labels[0] = IGNORE
    reference = per_image(CLASS_LOSSES[name], labels)
    agree(
        value_and_gradient(logits, labels, name=name), torch_value_and_gradient(reference, logits)
    )


@pytest.mark.parametrize("name", config_lib.IMAGE_LOSSES)
def test_losses_of_images_go_from_0_to_1(name):
    _, labels = batch(7)
    right = 50 * np.eye(4, dtype=np.float32)[np.where(labels == IGNORE, 0, labels)]
    assert mean_loss(right, labels, name=name) == pytest.approx(0, abs=1e-6)
    wrong = np.roll(right, 1, axis=-1)
    assert mean_loss(wrong, labels, name=name) == pytest.approx(1)


def test_lovasz_of_a_hard_prediction_is_one_minus_the_iou():
    """It extends the Jaccard loss: at probabilities of 0 and 1 it is that loss."""
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 3, (1, 40, 50)).astype(np.uint8)
    ids = np.where(rng.random(labels.shape) < 0.7, labels, rng.integers(0, 3, labels.shape))
    logits = 200 * np.eye(3, dtype=np.float32)[ids]
    iou = [
        np.sum((labels == c) & (ids == c)) / np.sum((labels == c) | (ids == c)) for c in range(3)
    ]
    np.testing.assert_allclose(
        mean_loss(logits, labels, name="lovasz"), 1 - np.mean(iou), rtol=1e-5
    )


# All losses

SETTINGS = [
    *({"name": name} for name in [*config_lib.PIXEL_LOSSES, *config_lib.IMAGE_LOSSES]),
    {"label_smoothing": 0.1},
    {"hard_pixel_fraction": 0.25},
]


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_ignored_pixels_have_no_gradient_and_no_influence(config):
    logits, labels = batch(1)
    value, gradient = value_and_gradient(logits, labels, **config)
    assert np.all(gradient[labels == IGNORE] == 0)
    if "hard_pixel_fraction" not in config:
        assert np.all(np.any(gradient[labels != IGNORE] != 0, axis=-1))
    changed = np.where((labels == IGNORE)[..., None], 100.0, logits).astype(np.float32)
    assert mean_loss(changed, labels, **config) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_only_ignored_pixels_give_zero(config):
    logits, labels = batch(3)
    value, gradient = value_and_gradient(logits, np.full_like(labels, IGNORE), **config)
    assert value == 0
    assert np.all(gradient == 0)


@pytest.mark.parametrize("config", SETTINGS[:-1], ids=str)
def test_sums_of_parts_add_up(config):
    """The count is the whole batch's and the sums are the parts': a mean of means would differ."""
    logits, labels = batch(9, shape=(4, 5, 6))
    labels[0] = IGNORE
    labels[1, 1:] = IGNORE
    settings = LossConfig(**config)
    parts = [
        losses.loss_sum(jnp.asarray(logits[i::2]), jnp.asarray(labels[i::2]), settings)
        for i in range(2)
    ]
    count = losses.loss_count(jnp.asarray(labels), settings)
    assert float(sum(parts) / count) == pytest.approx(mean_loss(logits, labels, **config), rel=1e-6)


@pytest.mark.parametrize("name", [*config_lib.PIXEL_LOSSES, *config_lib.IMAGE_LOSSES])
def test_a_sharded_batch_has_the_same_loss(name):
    logits, labels = batch(10, shape=(4, 5, 6))
    rows = row_sharding(make_mesh(MeshConfig(data=4)))
    alone = value_and_gradient(logits, labels, name=name)
    divided = value_and_gradient(*jax.device_put((logits, labels), rows), name=name)
    agree(divided, alone)


@pytest.mark.parametrize(
    ("low", "high"),
    [((5, 7), (33, 41)), ((1, 1), (3, 9)), ((3, 3), (4, 4)), ((9, 9), (8, 8)), ((3, 4), (9, 4))],
)
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(name="focal", hard_pixel_fraction=0.3),
        LossConfig(name="dice"),
        LossConfig(label_smoothing=0.2, hard_pixel_fraction=0.3),
    ],
    ids=lambda config: f"{config.name}-{config.label_smoothing}",
)
@pytest.mark.parametrize("align_corners", [False, True])
def test_low_logits_give_the_loss_of_the_upsampled_ones(x64, low, high, config, align_corners):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, *low, 4)))
    labels = jnp.asarray(rng.choice([0, 1, 2, 3, 255], size=(2, *high)).astype(np.uint8))

    def of_low(logits):
        return losses.loss_sum(logits, labels, config, align_corners=align_corners)

    def of_upsampled(logits):
        upsampled = resize_bilinear(logits, *high, align_corners=align_corners)
        return losses.loss_sum(upsampled, labels, config)

    ours, expected = (jax.value_and_grad(f)(logits) for f in (of_low, of_upsampled))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(ours[1], expected[1], atol=1e-12)


def test_memory_of_the_loss_at_full_resolution():
    """16 x 513 x 513 x 21 logits, 354 MB in float32, are never there: by the compiler's count."""
    logits = jax.ShapeDtypeStruct((16, 33, 33, 21), jnp.float32)
    labels = jax.ShapeDtypeStruct((16, 513, 513), jnp.uint8)

    def temporaries(loss):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(logits, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporaries(lambda x, y: losses.loss_sum(x, y, LossConfig()))
    plain = temporaries(lambda x, y: losses.loss_sum(resize_bilinear(x, 513, 513), y, LossConfig()))
    assert plain > 16 * 513 * 513 * 21 * 4
    assert ours <= plain / 4
