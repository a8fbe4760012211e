"""Whole runs: repeated, killed, stopped, resumed, started from others; and bad input."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest

import tiny
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import initialize, saved_model
from tiny import finish, start_command

pytestmark = pytest.mark.usefixtures("shared_steps")


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def named_arrays(variables):
    """Arrays of a model, named as `tiny.saved_state` does."""
    return {f"['model']['params']['{k}']": v for k, v in variables.params.items()} | {
        f"['model']['batch_stats']['{k}']": v for k, v in variables.batch_stats.items()
    }


def best_model(workdir):
    """Arrays of the checkpoint that a workdir stands for."""
    return named_arrays(saved_model.read(workdir).variables)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    out, err = finish(start_command(workdir))
    return workdir, out, err


def test_output_and_files_of_a_run(unbroken):
    workdir, out, err = unbroken
    entries = metrics(workdir)
    evaluations = [entry for entry in entries if "eval/miou" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8]
    assert all(entry["eval/images"] == 5 for entry in evaluations)
    logged = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 4, 6, 8]
    assert {"learning_rate", "grad_norm", "images_per_second", "data_wait_share"} <= set(logged[0])
    assert f"mIoU {evaluations[-1]['eval/miou']:.4f} at step 8" in out
    picture = workdir / "pictures" / "predictions_000008.png"
    assert picture.exists()
    assert str(picture) in out
    assert "step 8/8" in err
    assert "images/s" in err
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 8


def test_the_same_command_twice_gives_the_same_bits(unbroken, tmp_path):
    finish(start_command(tmp_path))
    assert_same(tiny.saved_state(tmp_path), tiny.saved_state(unbroken[0]))


def test_a_run_killed_repeatedly_ends_as_if_never_killed(unbroken, tmp_path):
    """First by SIGTERM, at which it saves and exits with 0."""
    said = []

    def start_until(step, *flags):
        process = start_command(tmp_path, *flags)
        while True:
            line = process.stderr.readline()
            assert line, "it ended before it could be killed"
            said.append(line)
            if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= step:
                return process

    process = start_until(1)  # before the first checkpoint
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start_until(2, "--config.train.save_every=0")
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)  # with exit code 0
    assert time.monotonic() - sent < 10
    stopped = re.search(r"stopped by SIGTERM at step (\d); saved", err)[1]
    assert (tmp_path / "checkpoints" / stopped).is_dir()
    assert "mIoU" not in out
    process = start_until(5)
    assert f"from step {stopped}" in "".join(said)
    time.sleep(np.random.default_rng(0).uniform(0, 0.1))  # some moment of the next steps
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, err = finish(start_command(tmp_path))
    assert "from step" in err
    assert_same(tiny.saved_state(tmp_path), tiny.saved_state(unbroken[0]))
    steps = [entry["step"] for entry in metrics(tmp_path) if "loss" in entry]
    assert steps == sorted(set(steps))


def test_a_finished_run_costs_nothing_and_shows_its_result(unbroken):
    workdir, out, _ = unbroken
    before = (workdir / "metrics.jsonl").read_text()
    result = train(tiny.get_config(), workdir)
    assert out == f"mIoU {result.miou:.4f} at step {result.step}\npredictions: {result.picture}\n"
    assert (workdir / "metrics.jsonl").read_text() == before


def test_adamw_resumes_bit_for_bit(tmp_path):
    config = tiny.get_config(
        optimizer__name="adamw",
        optimizer__arguments={"b2": 0.95, "mu_dtype": "bfloat16"},
        optimizer__learning_rate=0.003,
        optimizer__schedule="cosine",
        optimizer__layer_decay=0.8,
        loss__label_smoothing=0.1,
        train__steps=4,
        train__eval_every=0,
    )
    train(config, tmp_path / "run")
    expected = tiny.saved_state(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train(config, tmp_path / "run")
    resumed = tiny.saved_state(tmp_path / "run")
    assert_same(resumed, expected)
    assert {value.dtype.name for name, value in resumed.items() if ".mu" in name} == {"bfloat16"}


def test_it_resumes_on_another_number_of_devices(unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    assert train(tiny.get_config(mesh__data=4), workdir).step == 8
    before, after = (
        {entry["step"]: entry["loss"] for entry in metrics(folder) if "loss" in entry}
        for folder in (unbroken[0], workdir)
    )
    assert before.keys() == after.keys()
    assert after[4] == before[4]
    np.testing.assert_allclose([after[6], after[8]], [before[6], before[8]], rtol=1e-3)


def test_fine_tuning_at_another_output_stride_with_frozen_batch_norm(unbroken, tmp_path):
    config = tiny.get_config(
        init__path=str(unbroken[0]),
        model__output_stride=8,
        train__freeze_bn=True,
        train__steps=2,
        optimizer__learning_rate=0.001,
    )
    result = train(config, tmp_path)
    assert result.step == 2
    start, end = best_model(unbroken[0]), tiny.saved_state(tmp_path)
    for name in filter(lambda name: "batch_stats" in name, start):
        np.testing.assert_array_equal(end[name], start[name], err_msg=name)
    assert sum(np.any(end[name] != start[name]) for name in start) > 10


def initial_variables(config):
    """Where a run of the config starts, as `best_model` names them, and the lines it prints."""
    said = []
    variables = initialize.init_variables(config, tiny.Run(config).model, log=said.append)
    return named_arrays(variables), said


def test_only_the_backbone_is_loaded(unbroken):
    start, said = initial_variables(tiny.get_config(init__backbone=str(unbroken[0])))
    source = best_model(unbroken[0])
    name = "['model']['params']['backbone.layer1.0.conv1.kernel']"
    np.testing.assert_array_equal(start[name], source[name])
    head = "['model']['params']['classifier.aspp.branches.0.conv.kernel']"
    assert np.any(start[head] != source[head])
    assert "backbone from" in said[0]


def test_evaluation_at_another_output_stride_counts_every_image(tmp_path):
    config = tiny.get_config(eval__output_stride=8, train__steps=1, eval__batch_size=4)
    train(config, tmp_path)
    (entry,) = [entry for entry in metrics(tmp_path) if "eval/miou" in entry]
    assert entry["eval/images"] == 5


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path):
    config = tiny.get_config(optimizer__learning_rate=1e30, train__save_every=1)
    with pytest.raises(UserError, match=r"step \d is not finite: .*learning_rate"):
        train(config, tmp_path)
    state = tiny.saved_state(tmp_path)
    assert all(np.all(np.isfinite(value)) for value in state.values())


def test_a_workdir_of_another_run_is_refused(unbroken):
    config = tiny.get_config(optimizer__learning_rate=0.1, train__steps=9)
    with pytest.raises(
        UserError, match=r"(?s)optimizer.learning_rate: 0.1 here, 0.05 there.*train.steps: 9 here"
    ):
        train(config, unbroken[0])


def test_a_run_that_failed_to_start_does_not_occupy_its_workdir(tmp_path):
    with pytest.raises(UserError, match="neither"):
        train(tiny.get_config(init__path="nowhere", train__steps=1), tmp_path)
    assert train(tiny.get_config(train__steps=1), tmp_path).step == 1


def test_checkpoints_without_a_config_are_refused(unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        train(tiny.get_config(), tmp_path / "run")


def test_an_unwritable_workdir_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --workdir"):
        train(tiny.get_config(), tmp_path / "file" / "run")


@pytest.mark.parametrize("address", ["az://bucket/run", "s3:/bucket/run", "gs:/bucket/run"])
def test_an_address_that_is_no_bucket_is_refused_as_workdir(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="addresses begin with gs:// or s3://"):
        train(tiny.get_config(), address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__batch_size": 7, "mesh__data": 8}, r"not divisible by 8 .*works: 8"),
        ({"model__num_classes": 3}, "num_classes = 3, but the data set has"),
        ({"loss__class_weights": (1.0, 2.0)}, "class_weights has 2 numbers"),
        ({"data__mean": (0.5,), "data__std": (0.5,)}, "images have 3 channels"),
        ({"init__path": "nowhere"}, "init.path = 'nowhere' is neither"),
        ({"data__name": "shapez"}, "shapes"),
        ({"model__architecture": "paper_resnet19"}, "paper_resnet18"),
    ],
)
def test_mismatches_are_reported_at_startup(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        train(tiny.get_config(**fields), tmp_path)
    assert not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(unbroken):
    config = tiny.get_config(init__path=str(unbroken[0]), model__architecture="paper_resnet34")
    with pytest.raises(UserError, match=r"(?s)does not fit .*paper_resnet34.*missing.*layer1.2"):
        initial_variables(config)
