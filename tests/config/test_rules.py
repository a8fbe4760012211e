"""The config tree, its checks, and what the command line makes of it."""

import dataclasses
import errno
import json
import math
import operator
import subprocess
import sys

import pytest

from conftest import ROOT
from deeplab_jax import config as config_lib
from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.config import Config
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate
from deeplab_jax.utils.errors import UserError

CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_configs_are_valid_and_documented(path):
    module: dict = {"__file__": str(ROOT / path)}
    source = (ROOT / path).read_text()
    exec(compile(source, str(path), "exec"), module)
    row = list(module.get("ROWS", []))[-1:]  # the rows of a table are all tried in test_configs
    validate(module["get_config"](*row))
    assert f"--config {path}" in module["__doc__"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.output_stride", 12, r"8, 16 or 32 \(nearest: 8\), got 12"),
        ("model.output_stride", 30, r"nearest: 32"),
        ("model.multi_grid", ("a",), "must be whole numbers"),
        ("model.dtype", "float16", "float32 or bfloat16"),
        ("data.crop_size", (0,), "1 pixel or more"),
        ("data.crop_size", (1, 2, 3), "one side or height,width"),
        ("data.scale_range", (2.0, 0.5), "the smaller first"),
        ("data.shapes.radius_range", (0.4, 0.2), "the smaller first"),
        ("data.shapes.radius_range", (0.2, 1.0), "below 1"),
        ("data.shapes.max_shapes", 0, "1 or more"),
        ("data.std", (1.0,), "as many finite numbers above 0 as data.mean"),
        ("data.std", (1.0, 1.0, math.inf), "as many finite numbers above 0 as data.mean"),
        ("data.mean", (0.5, 0.5, math.nan), "finite numbers"),
        ("data.augment.photometric", 1.5, r"in \[0, 1\], got 1.5"),
        ("data.augment.color_jitter", -0.1, r"in \[0, 1\]"),
        ("data.augment.blur", math.nan, r"in \[0, 1\]"),
        ("data.augment.rotation", 400, "degrees, 0 to 180, got 400"),
        ("data.augment.max_class_share", 0.0, "above 0 and at most 1"),
        ("data.augment.mix", "cut_mix", r"empty, cutmix, classmix or copy_paste .*'cutmix'\?"),
        ("optimizer.accumulate", 3, "must divide train.batch_size = 16"),
        ("optimizer.warmup_steps", 30_000, "below train.steps = 30000"),
        ("optimizer.name", "adamv", r"an optimizer of optax \(did you mean 'adam'\?\): .* lion"),
        ("optimizer.name", "warmup_cosine_decay_schedule", "an optimizer of optax"),
        ("optimizer.name", "scale_by_learning_rate", "an optimizer of optax"),
        ("optimizer.name", "lbfgs", "gradient and a schedule alone; optax says: .*value_fn"),
        ("optimizer.name", "sm3", "gradient and a schedule alone; optax says"),
        ("optimizer.name", "noisy_sgd", "its state holds a random key"),
        ("optimizer.schedule", "cosin", r"poly, cosine or constant \(did you mean 'cosine'\?\)"),
        ("optimizer.arguments", {"beta1": 1}, r"\(nesterov, .*\) without 'beta1'"),
        ("optimizer.arguments", {"nesterof": True}, r"\(did you mean 'nesterov'\?\)"),
        ("optimizer.arguments", {"nesterov": 1}, "with true or false for nesterov"),
        ("optimizer.arguments", {"momentum": 0.5}, "which is the field optimizer.momentum"),
        ("optimizer.arguments", {"accumulator_dtype": "float99"}, "optax says: .*float99"),
        ("optimizer.arguments", "b1", r"arguments \(name=value,...\)"),
        ("optimizer.layer_decay", 1.5, "above 0 and at most 1"),
        ("loss.label_smoothing", 1.0, r"in \[0, 1\)"),
        ("optimizer.learning_rate", "0.1", "must be a number, got '0.1'"),
        ("train.steps", 1.5, "must be a whole number"),
        ("train.freeze_bn", 1, "must be true or false"),
        ("loss.hard_pixel_fraction", 0.0, "above 0 and at most 1"),
        ("loss.class_weights", (0.0, 0.0), "not all 0"),
        ("mesh.data", 0, "-1 or 1 or more"),
    ],
)
def test_a_wrong_value_is_named(field, value, message):
    config = Config()
    branch, name = field.rsplit(".", 1)
    setattr(operator.attrgetter(branch)(config), name, value)
    with pytest.raises(UserError, match=f"config.{field} .*{message}"):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"momentum": 0.8}, "optimizer.momentum must be left out with optimizer.name = adamw"),
        ({"decoupled_weight_decay": True}, "optimizer.decoupled_weight_decay must be false"),
        ({"arguments": {"b1": "x"}}, "optax says: .*, got {'b1': 'x'}"),
        ({"arguments": {"b1": True}}, "with a number or a text for b1"),
        ({"arguments": {"weight_decay": 1}}, "which is the field optimizer.weight_decay"),
        ({"arguments": {"mask": None}}, r"optax.adamw \(b1, b2, .*\) without 'mask'"),
        ({"arguments": {"b3": 1, "c": 2}}, "(?s)without 'b3' .*without 'c'"),
    ],
)
def test_wrong_values_of_adamw_are_named(fields, message):
    config = Config()
    config.optimizer = config_lib.OptimizerConfig(name="adamw", **fields)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_every_optimizer_of_optax_that_steps_from_gradients_is_taken():
    import optax

    for name in ("adam", "adamw", "lion", "rmsprop", "lamb", "lars", "adafactor", "adabelief"):
        assert hasattr(optax, name)
        config = Config()
        config.optimizer.name = name
        validate(config)


def test_validation_uses_no_device():
    """Processes of a pod validate before they connect, and devices are found only after."""
    code = """
from deeplab_jax.config import Config, OptimizerConfig
from deeplab_jax.config.rules import validate
import sys
validate(Config())
assert "optax" not in sys.modules
validate(Config(optimizer=OptimizerConfig(name="adamw", arguments={"b1": 0.8})))
import jax
jax.config.update("jax_platforms", "none")  # fails if a device were there already
try:
    jax.devices()
except RuntimeError as error:
    print("no device was found before:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "no device was found before" in done.stdout, done.stderr


def test_smoothing_is_for_the_cross_entropy():
    config = Config()
    config.loss.name, config.loss.label_smoothing = "focal", 0.1
    with pytest.raises(UserError, match=r"label_smoothing must be 0 with loss\.name = focal"):
        validate(config)


@pytest.mark.parametrize("field", ["photometric", "color_jitter", "gray"])
def test_colours_are_changed_only_where_there_are_any(field):
    config = Config()
    setattr(config.data.augment, field, 0.5)
    for channels, message in {1: None, 3: None, 4: "4 channels", 2: "2 channels"}.items():
        config.data.mean = config.data.std = (0.5,) * channels
        if message is None:
            validate(config)
            continue
        with pytest.raises(UserError, match=rf"data.augment.{field} must be 0 .*{message}"):
            validate(config)
    config.data.augment = config_lib.AugmentConfig(blur=0.5, rotation=10.0, mix="classmix")
    validate(config)


def test_all_wrong_values_are_named_together():
    config = Config()
    config.train.steps = 0
    config.eval.size = 0
    with pytest.raises(UserError, match=r"(?s)train\.steps.*eval\.size"):
        validate(config)


def test_differences_name_fields_and_skip_those_that_may_change():
    ours, theirs = Config(), Config()
    theirs.optimizer.learning_rate = 0.1
    theirs.train.log_every = 7
    theirs.mesh.data = 4
    stored = json.loads(config_lib.to_json(theirs))
    assert config_lib.differences(ours, stored) == {
        "config.optimizer.learning_rate": "0.007 here, 0.1 there"
    }
    ours.optimizer.learning_rate = 0.1
    assert config_lib.differences(ours, stored) == {}
    del stored["optimizer"]["name"]  # by a version without this field
    assert config_lib.differences(ours, stored) == {}
    ours.optimizer.name = "adamw"
    assert config_lib.differences(ours, stored) == {
        "config.optimizer.name": "adamw here, sgd there"
    }


def test_a_dictionary_is_one_field(tmp_path):
    config = Config()
    config.optimizer.name, config.optimizer.arguments = "adamw", {"b1": 0.8, "nesterov": True}
    assert config_lib.flatten(config)["optimizer.arguments"] == config.optimizer.arguments
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    read = config_io.from_json(tmp_path / "config.json")
    assert read == config
    read.optimizer.arguments["b1"] = 0.9
    assert list(config_lib.differences(config, json.loads(config_lib.to_json(read)))) == [
        "config.optimizer.arguments"
    ]


def test_fields_that_may_change_exist():
    assert set(config_lib.flatten(Config())) >= config_lib.RESUMABLE


def test_crop_shape():
    data = Config().data
    assert config_lib.crop_shape(data) == (513, 513)
    assert config_lib.crop_shape(dataclasses.replace(data, crop_size=(360, 480))) == (360, 480)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.stepz=3"], "no field 'train.stepz'; nearest: train.steps"),
        (["--config.trian.steps=3"], "no field 'trian.steps'; nearest: train.steps"),
        (["--config.train.steps=many"], "many"),
        (["--config.model.output_stride=12"], "nearest: 8"),
        (["--config.model.architecture=resnet50"], "torchvision_resnet50"),
        (["--config.data.name=shapez"], "shapes"),
        (["3"], "unexpected '3'"),
        (["--confg=x"], "confg"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_and_no_traceback(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    done = command("--config", "configs/shapes.py", "--workdir", str(workdir), *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not workdir.exists()


def test_a_missing_config_file_or_workdir_is_reported():
    done = command("--config", "configs/none.py", "--workdir", "x")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "configs/none.py" in done.stderr
    done = command("--config", "configs/shapes.py")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "workdir" in done.stderr


def test_a_full_disk_is_reported_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    assert stop.value.code == 2
    assert "the disk is full (metrics.jsonl)" in capsys.readouterr().err
    with pytest.raises(OSError, match="broken"), exit_on_user_error():
        raise OSError(errno.EIO, "broken")


def test_a_config_file_is_executed_once_and_its_error_is_one_message(tmp_path):
    (tmp_path / "mine.py").write_text("print('executed')\nraise KeyError('oops')\n")
    done = command(f"--config={tmp_path}/mine.py", "--config.train.steps=3", "--workdir=x")
    assert (done.returncode, done.stdout) == (2, "executed\n")
    assert done.stderr == f"error: {tmp_path}/mine.py: KeyError: 'oops'\n"


def test_help_shows_examples():
    done = command("--help")
    assert "python train.py --config configs/voc_os16.py --workdir runs/voc" in done.stdout
    assert "--workdir" in done.stdout
