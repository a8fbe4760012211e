"""The training step: its parts, alone and on several devices."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tiny
from deeplab_jax.config import MeshConfig
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.distributed.mesh import check_batch, make_mesh
from deeplab_jax.models.functional import Variables, normalize
from deeplab_jax.training.losses import downsample_labels
from deeplab_jax.training.step import global_norm, gradients, has_cross_entropy_kernel
from deeplab_jax.utils.errors import UserError


@functools.cache
def plain():
    """The run that others are compared with; its step is compiled once."""
    return tiny.Run(tiny.get_config())


def low_logits(run, state, batch):
    """Logits of all heads in training, before they are upsampled."""
    pixels = normalize(batch["image"], run.config.data.mean, run.config.data.std)
    apply = functools.partial(run.model.apply, train=True, upsample=False)
    return jax.device_get(jax.jit(apply)(state.variables, pixels)[0])


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_the_loss_falls():
    _, history = plain().train(8)
    assert np.mean([h["loss"] for h in history[-2:]]) < 0.9 * history[0]["loss"]


def test_a_batch_without_a_valid_pixel_moves_no_parameter():
    run = tiny.Run(tiny.get_config(optimizer__weight_decay=0.0))
    start = run.start()
    before = jax.device_get(start.variables.params)
    (batch,) = run.batches(1)
    state, metrics = run.step(start, batch | {"label": jnp.full_like(batch["label"], IGNORE)})
    assert float(metrics["loss"]) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.variables.params), before)
    assert np.isfinite(flat(state.variables.batch_stats)).all()


def test_rematerialisation_changes_nothing():
    stored, curve = plain().train(3)
    remat, same_curve = tiny.Run(tiny.get_config(train__remat=True)).train(3)
    np.testing.assert_allclose(
        [h["loss"] for h in same_curve], [h["loss"] for h in curve], rtol=1e-5
    )
    np.testing.assert_allclose(flat(remat.variables), flat(stored.variables), rtol=1e-3, atol=1e-4)


def test_frozen_batch_norm_keeps_its_statistics_and_trains_the_rest():
    run = tiny.Run(tiny.get_config(train__freeze_bn=True))
    before = jax.device_get(run.start().variables)
    state, _ = run.train(2)
    after = jax.device_get(state.variables)
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats, before.batch_stats)
    moved = [name for name in before.params if np.any(after.params[name] != before.params[name])]
    assert "backbone.stem.0.conv.kernel" in moved

    moving, _ = plain().train(2)
    assert np.any(flat(moving.variables.batch_stats) != flat(before.batch_stats))


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    """Parts with unequal numbers of valid pixels: a mean of means would differ."""
    config = tiny.get_config(train__freeze_bn=True, model__dropout=0.0)
    run = tiny.Run(config)
    batch = run.batches(1)[0]
    label = np.array(batch["label"])
    label[::4, :20] = 255
    batch["label"] = jax.numpy.asarray(label)
    state = run.start()
    whole, _, loss = jax.jit(lambda s, b: gradients(run.model, config, s, b, run.mesh))(
        state, batch
    )
    in_parts = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, accumulate=4)
    )
    parts, _, same_loss = jax.jit(lambda s, b: gradients(run.model, in_parts, s, b, run.mesh))(
        state, batch
    )
    np.testing.assert_allclose(same_loss["loss"], loss["loss"], rtol=1e-5)
    np.testing.assert_allclose(flat(parts), flat(whole), rtol=1e-3, atol=1e-5)


def test_labels_downsampled_to_the_logits():
    config = tiny.get_config(loss__upsample=False, model__dropout=0.0)
    run = tiny.Run(config)
    batch, state = run.batches(1)[0], run.start()
    _, _, found = jax.jit(lambda s, b: gradients(run.model, config, s, b, run.mesh))(state, batch)
    logits = low_logits(run, state, batch)["out"].astype(np.float64)
    # 3 pixels of features over the 33 of the image: each covers 11, the first with its middle at 5.
    labels = np.asarray(batch["label"])[:, 5::11, 5::11]
    assert batch["label"].shape[1:] == (33, 33)
    assert logits.shape[1:3] == labels.shape[1:] == (3, 3)
    places = np.nonzero(labels != 255)
    chosen = logits[places]
    losses = np.log(np.exp(chosen).sum(-1)) - chosen[np.arange(len(chosen)), labels[places]]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_labels_are_not_downsampled_for_a_named_model_with_a_decoder():
    """Its logits have output stride 4, and the labels would have 16."""
    config = tiny.get_config(loss__upsample=False, model__architecture="smpplus_resnet18")
    with pytest.raises(UserError, match=r"loss.upsample must be true .* plus of smpplus_resnet18"):
        tiny.Run(config)


def test_metrics_of_a_model_with_aligned_corners():
    """Both heads' losses are torch's of logits that torch resizes."""
    config = tiny.get_config(
        model__architecture="smp_resnet18",
        model__dropout=0.0,
        model__aux_head=True,
        model__atrous_rates=(1, 2),
    )
    run = tiny.Run(config)
    batch, state = run.batches(1)[0], run.start()
    outputs = low_logits(run, state, batch)
    _, found = run.step(state, batch)
    assert set(found) == {"loss", "aux_loss", "grad_norm", "learning_rate"}
    assert found["learning_rate"] == pytest.approx(0.05)
    labels = torch.tensor(np.asarray(batch["label"]), dtype=torch.int64)
    expected = {}
    for head, logits in outputs.items():
        low = torch.tensor(logits.astype(np.float64)).permute(0, 3, 1, 2)
        assert low.shape[2:] == (5, 5)
        high = torch.nn.functional.interpolate(low, (33, 33), mode="bilinear", align_corners=True)
        expected[head] = torch.nn.functional.cross_entropy(high, labels, ignore_index=255).item()
    assert found["aux_loss"] == pytest.approx(expected["aux"], rel=1e-5)
    assert found["loss"] == pytest.approx(expected["out"], rel=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "stride"), [(40, 16), (128, 16), (193, 32), (65, 8), (7, 16)])
def test_downsampled_labels_are_at_the_positions_of_upsampled_features(size, stride, align_corners):
    """There torch's resize of 0, 1, 2, ... comes nearest to whole numbers."""
    features = torch.arange(-(-size // stride), dtype=torch.float64)
    resized = torch.nn.functional.interpolate(
        features[None, None, None], (1, size), mode="bilinear", align_corners=align_corners
    )[0, 0, 0]
    distance = np.abs(resized.numpy() - features.numpy()[:, None])
    pixels = np.broadcast_to(np.arange(size, dtype=np.uint8), (1, size, size))  # each its column
    columns, rows = (
        np.asarray(downsample_labels(jnp.asarray(labels), stride, align_corners))
        for labels in (pixels, pixels.swapaxes(1, 2))
    )
    np.testing.assert_array_equal(columns, rows.swapaxes(1, 2))
    chosen = np.take_along_axis(distance, columns[0, :1].T.astype(int), axis=1)[:, 0]
    # Half a pixel off at most, where a middle lies between two.
    np.testing.assert_allclose(chosen, distance.min(axis=1), atol=0.5 / stride + 1e-9)


def test_averaged_parameters_follow_the_formula():
    run = tiny.Run(tiny.get_config(optimizer__ema_decay=0.75))
    state = run.start()
    expected = jax.device_get(state.ema_params)
    for batch in run.batches(3):
        state, _ = run.step(state, batch)
        params = jax.device_get(state.variables.params)
        expected = {name: 0.75 * expected[name] + 0.25 * params[name] for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(state.ema_params[name], value, rtol=1e-5, atol=1e-7)
    assert state.eval_variables.params is state.ema_params
    assert isinstance(state.eval_variables, Variables)


def test_dropout_follows_the_step_and_the_seed():
    config = tiny.get_config(model__dropout=0.5, train__freeze_bn=True)
    run = tiny.Run(config)
    batch = run.batches(1)[0]
    loss = jax.jit(lambda s, b: gradients(run.model, config, s, b, run.mesh)[2]["loss"])
    state = run.start()
    later = dataclasses.replace(state, step=state.step + 1)
    assert loss(state, batch) == loss(state, batch)
    assert loss(state, batch) != loss(later, batch)


@pytest.mark.parametrize(
    ("backend", "capability", "devices", "expected"),
    [
        ("gpu", "9.0", 1, True),
        ("gpu", "8.0", 1, True),
        ("gpu", "7.5", 1, False),
        ("gpu", "gfx90a", 1, False),  # AMD
        ("gpu", "9.0", 2, False),
        ("cpu", "", 1, False),
    ],
)
def test_gpus_with_the_cross_entropy_kernel(monkeypatch, backend, capability, devices, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    device = types.SimpleNamespace(compute_capability=capability)
    mesh = types.SimpleNamespace(size=devices, devices=np.array([device] * devices))
    assert has_cross_entropy_kernel(mesh) == expected


def test_the_global_norm_is_that_of_all_gradients():
    rng = np.random.default_rng(0)
    grads = {str(i): rng.standard_normal(shape) for i, shape in enumerate([(3,), (2, 4), (5,)])}
    for some in (grads, {"1": grads["1"]}, {"0": grads["0"]}):
        expected = np.sqrt(sum(np.sum(x**2) for x in some.values()))
        assert global_norm(some) == pytest.approx(expected)


def test_bfloat16_follows_float32():
    _, curve = plain().train(3)
    state, close = tiny.Run(tiny.get_config(model__dtype="bfloat16")).train(3)
    np.testing.assert_allclose([h["loss"] for h in close], [h["loss"] for h in curve], rtol=0.05)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.variables)} == {"float32"}


def test_batches_not_divisible_by_the_devices_are_refused():
    with pytest.raises(UserError, match=r"10 is not divisible by 4 .*works: 8 or 12"):
        check_batch("config.train.batch_size", 10, make_mesh(MeshConfig(data=4)))
    with pytest.raises(UserError, match=r"works: 8$"):
        check_batch("config.train.batch_size", 3, make_mesh(MeshConfig(data=4)), accumulate=2)
    with pytest.raises(UserError, match=r"mesh.data = 99 .* needs 99 devices, but there are 8"):
        make_mesh(MeshConfig(data=99))
