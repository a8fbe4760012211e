"""Checkpoints: round trips, which are kept, damage, kills and full disks."""

import dataclasses
import errno
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from deeplab_jax.config import Config, MeshConfig, OptimizerConfig
from deeplab_jax.distributed.mesh import make_mesh, replicated
from deeplab_jax.models.functional import Variables
from deeplab_jax.training import checkpoint
from deeplab_jax.training.state import TrainState, init_state
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model

OPTIMIZER = OptimizerConfig(head_multiplier=2.0, clip_norm=1.0)
INFO = {"format": saved_model.FORMAT, "classes": ["a", "b"], "number": 3}


def state_of(step: int, *, ema: bool = True) -> TrainState:
    """A state in which every number tells the step it belongs to."""
    params = {
        "backbone.stem.0.conv.kernel": jnp.full((64, 128), step, jnp.float32),
        "classifier.logits.bias": jnp.full((3,), step, jnp.float32),
    }
    config = Config(optimizer=dataclasses.replace(OPTIMIZER, ema_decay=0.9 if ema else 0.0))
    state = init_state(config, Variables(params, {"backbone.stem.0.bn.mean": jnp.zeros(3)}))
    opt_state = jax.tree.map(lambda leaf: jnp.full_like(leaf, step), state.opt_state)
    averaged = jax.tree.map(lambda leaf: leaf + 0.5, params) if ema else None
    return TrainState(jnp.asarray(step, jnp.int32), state.variables, opt_state, averaged)


def abstract_of(ema: bool = True, devices: int = 1):
    sharding = replicated(make_mesh(MeshConfig(data=devices)))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: state_of(0, ema=ema)),
    )


def open_at(folder: pathlib.Path, log=None, keep: int = 2) -> checkpoint.Checkpoints:
    folder.mkdir(parents=True, exist_ok=True)
    return checkpoint.Checkpoints(folder, keep=keep, log=log if log is not None else print)


def steps_in(folder: pathlib.Path) -> set[int]:
    return {int(child.name) for child in folder.iterdir() if child.name.isdigit()}


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_is_exact_on_another_number_of_devices(tmp_path, ema):
    checkpoints = open_at(tmp_path / "checkpoints")
    assert checkpoints.restore(abstract_of(ema)) is None
    checkpoints.save(state_of(7, ema=ema), 7, INFO, 0.5, wait=True)
    restored = checkpoints.restore(abstract_of(ema, devices=4))
    checkpoints.close()
    assert (restored.step, restored.miou) == (7, 0.5)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(7, ema=ema))
    assert len(restored.state.step.sharding.device_set) == 4


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = open_at(tmp_path, keep=2)
    for step, miou in [(1, 0.3), (2, 0.9), (3, np.nan), (4, 0.4), (5, None)]:
        checkpoints.save(state_of(step), step, INFO, miou, wait=step == 5)
    checkpoints.close()
    assert steps_in(tmp_path) == {2, 4, 5}
    assert saved_model.find_checkpoint(tmp_path).name == "2"


def test_a_step_saved_already_is_left_as_it_is(tmp_path):
    checkpoints = open_at(tmp_path)
    checkpoints.save(state_of(1), 1, INFO, None, wait=True)
    checkpoints.save(state_of(1), 1, INFO, 0.5, wait=True)
    assert checkpoints.restore(abstract_of()).miou is None
    checkpoints.close()


def test_reading_a_model_needs_nothing_but_the_folder(tmp_path):
    checkpoints = open_at(tmp_path / "checkpoints")
    checkpoints.save(state_of(4), 4, INFO, None, wait=True)
    checkpoints.close()
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "4"):
        saved = saved_model.read(path)
        assert saved.info == INFO
        # The averaged parameters are those that count.
        np.testing.assert_array_equal(saved.variables.params["classifier.logits.bias"], [4.5] * 3)
        assert isinstance(saved.variables.params["classifier.logits.bias"], np.ndarray)
        assert set(saved.variables.batch_stats) == {"backbone.stem.0.bn.mean"}
    with pytest.raises(UserError, match="no checkpoint at"):
        saved_model.read(tmp_path / "elsewhere")


def damage_truncate(path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES = {
    "truncate": damage_truncate,
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saves") / "checkpoints"
    checkpoints = open_at(folder)
    for step in (1, 2):
        checkpoints.save(state_of(step), step, INFO, None, wait=True)
    checkpoints.close()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_noticed_or_harmless(two_saves, tmp_path, damage):
    files = [path.relative_to(two_saves) for path in (two_saves / "2").rglob("*") if path.is_file()]
    fell_back = 0
    for number, file in enumerate(sorted(files)):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(two_saves, folder)
        DAMAGES[damage](folder / file)
        said: list[str] = []
        checkpoints = open_at(folder, said.append)
        restored = checkpoints.restore(abstract_of())
        jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(restored.step))
        if restored.step == 1 and said:
            fell_back += 1
            assert "checkpoint 2 cannot be read" in said[0]
            assert (folder.parent / "broken" / "2").is_dir()
            # The run that goes on reaches step 2 again and can save it.
            checkpoints.save(state_of(2), 2, INFO, None, wait=True)
            assert steps_in(folder) == {1, 2}
        checkpoints.close()
    assert fell_back >= 3


def test_if_nothing_can_be_read_it_is_an_error(two_saves, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saves, folder)
    for step in (1, 2):
        damage_truncate(folder / str(step) / "model" / "manifest.ocdbt")
    checkpoints = open_at(folder)
    with pytest.raises(
        UserError, match=r"(?s)can be read.*step 2.*step 1.*start from the beginning"
    ):
        checkpoints.restore(abstract_of())
    assert steps_in(folder) == {1, 2}


def test_a_foreign_checkpoint_is_not_taken(two_saves, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saves, folder)
    foreign = abstract_of()
    foreign.variables.params["backbone.stem.0.conv.kernel"] = jax.ShapeDtypeStruct(
        (64, 127), jnp.float32
    )
    with pytest.raises(UserError, match="no checkpoint under"):
        open_at(folder).restore(foreign)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "x"), ValueError("x [OS error 28: ENOSPC No space left on device]")],
)
@pytest.mark.parametrize("method", ["save_checkpointables_async", "wait", "close"])
def test_a_full_disk_is_reported(tmp_path, monkeypatch, method, error):
    def fail(*_, **__):
        raise error

    checkpoints = open_at(tmp_path)
    save = functools.partial(checkpoints.save, state_of(1), 1, INFO, None, wait=True)
    monkeypatch.setattr(checkpoints._checkpointer, method, fail)
    with pytest.raises(UserError, match=r"is full .*Free some space"):
        checkpoints.close() if method == "close" else save()


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = open_at(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"is full .*Free some space"):
        checkpoints.save(state_of(1), 1, INFO, None, wait=True)
    assert steps_in(tmp_path) == set()


def test_a_disk_that_fills_up_while_saving_leaves_nothing_half_written(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs rights that this user lacks")
    try:
        checkpoints = open_at(mount / "checkpoints")
        checkpoints.save(state_of(1), 1, INFO, None, wait=True)
        noise = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
        full = state_of(2)
        full.variables.params["backbone.stem.0.conv.kernel"] = jnp.asarray(
            noise
        )  # hard to compress
        full.ema_params["backbone.stem.0.conv.kernel"] = jnp.asarray(noise + 1)
        (mount / "filler").write_bytes(b"x" * (shutil.disk_usage(mount).free - 50_000))
        with pytest.raises(UserError, match="is full"):
            checkpoints.save(full, 2, INFO, None, wait=True)
        (mount / "filler").unlink()
        restored = open_at(mount / "checkpoints").restore(abstract_of())
        assert restored.step == 1
        jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(1))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


SAVE_FOREVER = """
    import pathlib, sys
    sys.path.insert(0, {tests!r})
    from training.test_checkpoint import INFO, open_at, state_of
    checkpoints = open_at(pathlib.Path({folder!r}))
    for step in range(1, 10_000):
        checkpoints.save(state_of(step), step, INFO, None, wait=False)
        print(step, flush=True)
"""


def test_a_complete_checkpoint_survives_a_kill_at_any_moment(tmp_path):
    code = textwrap.dedent(SAVE_FOREVER).format(
        tests=str(pathlib.Path(__file__).parent.parent), folder=str(tmp_path / "checkpoints")
    )
    rng = np.random.default_rng(0)
    for attempt in range(3):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            text=True,
        )
        begun = 0
        while begun < 3 + attempt:  # the save of this step is under way, the one before is whole
            begun = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        checkpoints = open_at(tmp_path / "checkpoints")
        restored = checkpoints.restore(abstract_of())
        checkpoints.close()
        assert restored.step >= begun - 1
        jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(restored.step))


def test_a_checkpoint_of_another_format_is_refused_and_left_where_it_is(tmp_path):
    """Its names of parameters are others: not damage, so it is not set aside."""
    checkpoints = open_at(tmp_path / "checkpoints")
    checkpoints.save(state_of(3), 3, INFO | {"format": 1}, None, wait=True)
    checkpoints.close()
    message = "has checkpoint format 1, and this version of deeplab_jax reads format 2.*\\.pth"
    with pytest.raises(UserError, match=message):
        saved_model.read(tmp_path)
    with pytest.raises(UserError, match=message):
        saved_model.check_format(tmp_path)
    assert steps_in(tmp_path / "checkpoints") == {3}


def test_a_run_of_another_format_does_not_resume(tmp_path):
    from deeplab_jax.training.train import train

    checkpoints = open_at(tmp_path / "checkpoints")
    checkpoints.save(state_of(3), 3, INFO | {"format": 1}, None, wait=True)
    checkpoints.close()
    (tmp_path / "config.json").write_text("{}")  # older configs lack fields too: format comes first
    with pytest.raises(UserError, match="has checkpoint format 1"):
        train(tiny.get_config(), tmp_path)
    assert steps_in(tmp_path / "checkpoints") == {3}
    assert not (tmp_path / "broken").exists()
