"""Reading configs from Python files, from JSON and from FIELD=VALUE texts."""

import pytest

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config, DataConfig, EvalConfig, FolderConfig, flatten
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate
from deeplab_jax.utils.errors import UserError


def test_a_config_comes_back_from_its_json(tmp_path):
    ours = Config(
        data=DataConfig(name="folder", root="r", folder=FolderConfig(val_fraction=0.25)),
        eval=EvalConfig(scales=(0.5, 1.0)),
    )
    (tmp_path / "config.json").write_text(config_lib.to_json(ours))
    assert config_io.from_json(tmp_path / "config.json") == ours
    assert config_io.from_run(tmp_path) is None  # a config alone is no run
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "3"):
        assert config_io.from_run(path) == ours


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a config"),
        ("[]", "it must hold a JSON object"),
        ('{"data": 3}', "no field 'data', which is a section; its fields: data.name"),
        ('{"data": {"colour": 3}}', r"no field 'data\.colour'; nearest"),
    ],
)
def test_a_damaged_config_is_reported(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        config_io.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): return 3", r"get_config\(\) must return a Config, got int"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(:", "SyntaxError"),
    ],
)
def test_a_config_file_without_a_config_is_reported(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        config_io.from_python(tmp_path / "mine.py")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.steps=7", 7),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.learning_rate=1", 1.0),
        ("train.remat=true", True),
        ("train.remat=False", False),
        ("model.multi_grid=1,2,4", (1, 2, 4)),
        ("data.crop_size=(360,480)", (360, 480)),
        ("data.crop_size=513", (513,)),
        ("model.output_stride=8", 8),
        ("model.output_stride=None", None),
        ("model.width=0.5", 0.5),
        ("optimizer.arguments=nesterov=True", {"nesterov": True}),
        (
            "optimizer.arguments=nesterov=false, accumulator_dtype='bfloat16'",
            {"nesterov": False, "accumulator_dtype": "bfloat16"},
        ),
        ("optimizer.arguments=", {}),
        ("loss.class_weights=auto", "auto"),
        ("loss.class_weights=1,0.5", (1.0, 0.5)),
        ("loss.class_weights=none", None),
        ("data.root=a=b", "a=b"),
        ("init.path=", ""),
        ("seed=3", 3),
    ],
)
def test_settings_have_the_types_of_their_fields(setting, value):
    config = Config()
    changed = config_io.override(config, [setting])
    found = flatten(changed)[setting.partition("=")[0]]
    assert found == value
    assert type(found) is type(value)
    assert config == Config()
    if not setting.startswith(("data.root", "init")):
        validate(changed)


def test_values_of_arguments_have_the_types_that_they_spell():
    setting = "optimizer.arguments=b1=0,b2=1,eps=1e-3,mu_dtype=none,threshold=5"
    found = config_io.override(Config(), [setting]).optimizer.arguments
    assert found == {"b1": 0, "b2": 1, "eps": 1e-3, "mu_dtype": None, "threshold": 5}
    assert [type(value) for value in found.values()] == [int, int, float, type(None), int]


@pytest.mark.parametrize(
    "setting", ["train.remat=yes", "train.steps=1.5", "model.multi_grid=1,b", "model.width=wide"]
)
def test_values_of_other_types_are_refused_by_the_rules(setting):
    with pytest.raises(UserError, match=f"config.{setting.partition('=')[0]} must be"):
        validate(config_io.override(Config(), [setting]))


def test_the_last_setting_of_a_field_wins():
    changed = config_io.override(Config(), ["train.steps=1", "train.steps=2", "seed=4"])
    assert (changed.train.steps, changed.seed) == (2, 4)


@pytest.mark.parametrize("name", ["train", "data.folder", "batch_size", "optimizers.momentum"])
def test_branches_and_unknown_names_are_not_fields(name):
    with pytest.raises(UserError, match=f"the config has no field '{name}'"):
        config_io.override(Config(), [f"{name}=1"])
