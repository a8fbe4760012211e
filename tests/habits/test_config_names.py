"""Configs of the package, by name, in every command that takes a config."""

import json

import pytest

import tiny
from deeplab_jax import config as config_lib
from deeplab_jax.config import io as config_io
from deeplab_jax.data import labels
from deeplab_jax.evaluation import setup
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.plan import plan as plan_module
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model
from own_data import Maker
from random_modules import random_variables


@pytest.fixture
def command(command, monkeypatch, tmp_path):
    """Runs a command in `tmp_path`; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return command


@pytest.mark.parametrize("name", ["voc_os16", "paper:table1_os8", "study:os8"])
def test_a_name_is_the_file(name):
    stem, colon, row = name.partition(":")
    assert config_io.is_config(name)
    assert config_io.from_python(name) == config_io.from_python(
        config_io.CONFIGS / f"{stem}.py{colon}{row}"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vocos16", "no config 'vocos16' .did you mean 'voc_os16'"),
        ("voc_os16.yaml", "give a file that ends in .py"),
        ("paper", "name one, as in"),
        ("paper:table1_os7", "did you mean 'table1_os8'"),
        ("voc_os16:row", "no rows"),
    ],
)
def test_a_wrong_name_is_an_error(name, message):
    with pytest.raises(UserError, match=message):
        config_io.from_python(name)


def test_summary_takes_a_name(command, tmp_path):
    code, out, _ = command("summary", "paper:table1_os8", "--json=-")
    assert code == 0
    assert json.loads(out)["architecture"]["output_stride"] == 8
    (tmp_path / "voc_os16").mkdir()  # a path that exists is not taken for a name
    code, _, error = command("summary", "voc_os16")
    assert code == 2
    assert "voc_os16" in error
    assert "checkpoint" in error


def test_plan_takes_a_name(command, monkeypatch):
    monkeypatch.setattr(plan_module, "prepare", lambda: None)
    code, _, error = command("plan", "paper:table1_os9", "--topology=v5e:2x2")
    assert (code, "did you mean 'table1_os8'" in error) == (2, True)
    code, _, error = command("plan", "voc_os16", "--topology=v5e:2x2", "--set", "train.steps=None")
    assert (code, error) == (2, "error: config.train.steps must be a whole number, got 'None'\n")


def test_data_check_takes_a_name(command, tmp_path):
    maker = Maker(tmp_path / "data")
    for index in range(12):
        maker.pair(f"{index}")
    maker.text("classes.txt", "sky", "traffic light", "car")
    code, out, _ = command("data", "check", "data", "--config=folder")
    assert code == 0, out


def test_evaluate_takes_a_name_unless_it_is_a_data_set():
    camvid = config_io.from_python("camvid")
    assert setup.base_config("camvid", "nothing") == camvid
    assert setup.base_config("paper:table1_os8", "nothing").data.name == "voc"
    assert setup.base_config("shapes", "nothing").data == config_lib.DataConfig(name="shapes")


@pytest.fixture
def cascade(tmp_path):
    """A workdir with a model with two cascaded blocks."""
    arch = architecture("paper_resnet18", num_classes=5, width=0.0625, cascade=2, atrous_rates=())
    model = FunctionalModel(arch)
    info = saved_model.describe(
        *(arch, labels.named("background", "disc", "triangle", "ring", "cross")),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        resize="none",
        size=(33, 33),
    )
    folder = tmp_path / "run" / "checkpoints" / "7"
    saved_model.write_model(folder, random_variables(model), info)
    trained = tiny.get_config()
    trained.model = config_lib.ModelConfig(architecture="paper_resnet18", cascade=2)
    (tmp_path / "run" / "config.json").write_text(config_lib.to_json(trained))
    return tmp_path / "run"


@pytest.mark.parametrize("path", ["run", "run/checkpoints/7", "copy"])
def test_the_cascade_of_the_checkpoint_allows_its_output_strides(command, cascade, path):
    (cascade / "checkpoints" / "7").rename(cascade.parent / "copy") if path == "copy" else None
    data = ["--data=shapes"] if path == "copy" else []
    arguments = ["evaluate", path, *data, "--limit=1", "--size=65", "--json=-", "--batch-size=1"]
    code, out, error = command(*arguments, "--output-stride=64")
    assert code == 0, error
    assert json.loads(out)["output_stride"] == 64
    for stride in (48, 256):
        code, _, error = command(*arguments, f"--output-stride={stride}")
        assert code == 2
        assert "8, 16, 32, 64 or 128" in error
