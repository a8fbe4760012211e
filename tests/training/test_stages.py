"""Runs of two stages: what the second takes from the first, and that each resumes."""

import dataclasses
import json
import signal

import numpy as np
import pytest

import tiny
from deeplab_jax.config import SecondStageConfig, flatten
from deeplab_jax.training.train import stage_configs, train
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model
from tiny import finish

STAGE = SecondStageConfig(steps=3, output_stride=8, split="val")
CHANGED = {f"second_stage.{name}" for name in ("steps", "output_stride", "split")} | {
    f"train.{name}" for name in ("steps", "eval_every", "save_every")
}


def get_config():
    config = tiny.get_config()
    config.train = dataclasses.replace(config.train, steps=3, eval_every=0, save_every=1)
    config.second_stage = dataclasses.replace(STAGE)
    return config


def logged(workdir, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


def start_command(workdir):
    changed = {name: value for name, value in flatten(get_config()).items() if name in CHANGED}
    flags = [f"--config.{name}={value}" for name, value in changed.items()]
    return tiny.start_command(workdir, *flags, "--config.train.log_every=1")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    finish(start_command(workdir))
    return workdir


def test_the_second_starts_from_the_firsts_last_arrays_and_keeps_its_statistics(unbroken):
    first = saved_model.read(unbroken / "stage1" / "checkpoints" / "3")
    last = saved_model.read(unbroken)
    assert last.path == unbroken / "checkpoints" / "3"
    for name, value in first.variables.batch_stats.items():
        np.testing.assert_array_equal(last.variables.batch_stats[name], value, err_msg=name)
    moved = [
        np.abs(last.variables.params[name] - value).max()
        for name, value in first.variables.params.items()
    ]
    assert 0 < max(moved) < 0.1  # three steps at a learning rate of 0.001, not other arrays
    assert logged(unbroken / "stage1", "learning_rate")[0] == pytest.approx(0.05)
    assert logged(unbroken, "learning_rate")[0] == pytest.approx(0.001)
    strides = [read.info["architecture"]["output_stride"] for read in (first, last)]
    assert strides == [16, 8]


def test_configs_of_the_stages(tmp_path):
    config = get_config()
    first, second = stage_configs(config, tmp_path)
    assert first.second_stage.steps == second.second_stage.steps == 0
    assert dataclasses.replace(first, second_stage=STAGE) == config
    assert second.init.path == str(tmp_path / "stage1" / "checkpoints" / "3")
    assert (second.data.split, second.model.output_stride, second.train.steps) == ("val", 8, 3)
    assert second.train.freeze_bn
    config.second_stage = SecondStageConfig(steps=1)
    _, second = stage_configs(config, tmp_path)
    assert (second.data.split, second.model.output_stride) == ("train", None)
    assert stage_configs(tiny.get_config(), tmp_path)[1] is None


def test_rates_that_a_config_gives_scale_with_the_seconds_features(tmp_path):
    config = get_config()
    config.model.output_stride, config.model.atrous_rates = 16, (2, 4, 6)
    assert stage_configs(config, tmp_path)[1].model.atrous_rates == (4, 8, 12)
    config.model.output_stride = None  # the architecture's: 16 too
    assert stage_configs(config, tmp_path)[1].model.atrous_rates == (4, 8, 12)
    config.second_stage.output_stride = 32
    assert stage_configs(config, tmp_path)[1].model.atrous_rates == (1, 2, 3)
    config.model.atrous_rates = (1, 2, 3)
    with pytest.raises(UserError, match=r"atrous_rates .* not whole"):
        stage_configs(config, tmp_path)


def test_an_absolute_multi_grid_scales_with_the_seconds_features(tmp_path):
    config = get_config()
    config.model.architecture, config.model.multi_grid = "mmseg_resnet18", (1, 2)
    config.model.output_stride = 16
    second = stage_configs(config, tmp_path)[1].model
    assert (second.multi_grid, second.atrous_rates) == ((2, 4), None)
    config.model.dilation_rule = "paper"
    assert stage_configs(config, tmp_path)[1].model.multi_grid == (1, 2)
    config.model.cascade, config.second_stage.output_stride = 2, 64
    assert stage_configs(config, tmp_path)[1].model.multi_grid == (1, 2)


def test_a_run_killed_in_each_stage_ends_as_if_never_killed(unbroken, tmp_path):
    for stage in ("stage 1 of 2", "stage 2 of 2"):
        process = start_command(tmp_path)
        reached = False
        for line in process.stderr:
            reached |= line.startswith(stage)
            if reached and line.startswith("step 2/3"):
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert reached
    assert not (tmp_path / "checkpoints" / "3").exists()
    finish(start_command(tmp_path))
    ended, expected = (tiny.saved_state(folder) for folder in (tmp_path, unbroken))
    for name, value in expected.items():
        np.testing.assert_array_equal(ended[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, r"second_stage\.steps must be 0 or more, got -1"),
        ({"output_stride": 7}, r"second_stage\.output_stride must be 8, 16 or 32"),
        ({"learning_rate": 0.0}, r"second_stage\.learning_rate must be above 0"),
    ],
)
def test_impossible_stages(fields, message, tmp_path):
    config = get_config()
    config.second_stage = dataclasses.replace(STAGE, **fields)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path)
