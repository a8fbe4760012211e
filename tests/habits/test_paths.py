"""Paths with `~`, and paths from shell variables that are not set."""

import inspect
import json
import shutil
import typing

import pytest
import typer

import deeplab_jax as dl
import small_checkpoint
from conftest import ROOT
from deeplab_jax import data
from deeplab_jax.cli.main import app
from deeplab_jax.config import Config, DataConfig
from deeplab_jax.config import io as config_io
from deeplab_jax.data.datasets import records
from deeplab_jax.training.workdir import Workdir
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import hub
from own_data import Maker

NO_PATHS = {
    *("split", "protocol", "scales", "heatmap", "height", "width", "batch", "output", "layout"),
    *("platforms", "size", "topology", "settings", "competition", "masks_hold", "mask_name"),
    *("repository", "message", "license", "family", "steps", "host"),
    *("image_pattern", "mask_pattern", "positive", "sizes", "of", "precision"),
}


def path_parameters():
    """Yields each command with each of its parameters that holds a path."""

    def walk(command, names=()):
        for name, each in getattr(command, "commands", {}).items():
            yield from walk(each, (*names, name))
        if command.params and not hasattr(command, "commands"):
            yield names, command

    for names, command in walk(typer.main.get_command(app)):
        types = inspect.signature(inspect.unwrap(command.callback), eval_str=True).parameters
        for one in command.params:
            hint = types[one.name].annotation if one.name in types else None
            text = {str, list[str], list[str] | None} & {*typing.get_args(hint)[:1]}
            if text and one.name not in NO_PATHS:
                yield pytest.param(names, command, one, id=f"{' '.join(names)} {one.opts[0]}")


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


@pytest.fixture
def command(command):
    """Runs a command; its exit code, and what it prints."""

    def run(*arguments):
        code, out, err = command(*arguments)
        return code, out + err

    return run


@pytest.mark.parametrize(("names", "group", "one"), path_parameters())
def test_an_empty_path_is_an_error(command, home, names, group, one):
    arguments = []
    for each in group.params:
        if each is one:
            arguments += [""] if each.param_type_name == "argument" else [f"{each.opts[0]}="]
        elif each.param_type_name == "argument" and each.required:
            arguments.append("x")
        elif each.required:
            arguments.append(f"{each.opts[0]}=x")
    code, error = command(*names, *arguments)
    assert code == 2
    assert error == (
        f"error: {one.opts[0]} is empty. If it comes from a shell variable, the variable is unset\n"
    )


def test_commands_expand_the_home_folder(command, home):
    shutil.copy(ROOT / "configs" / "shapes.py", home / "mine.py")
    assert command("summary", "~/mine.py", "--json=~/new/summary.json")[0] == 0
    assert json.loads((home / "new" / "summary.json").read_text())
    Maker(home / "data").pair("a")
    code, printed = command(
        "data", "check", "~/data", "--config=~/mine.py", "--classes=~/absent.txt"
    )
    assert code
    assert f"{home}/absent.txt" in printed
    assert not list((home.parent / "here").iterdir())


def test_python_functions_expand_the_home_folder(home):
    small_checkpoint.write(home / "saved")
    assert dl.load("~/saved").path == home / "saved"
    done = dl.convert("~/saved", "~/new/model.pth")
    assert done.destination == home / "new" / "model.pth"
    assert done.destination.is_file()
    assert Workdir("~/run").path == home / "run"
    assert hub.find_weights("~/saved", "config.init.path") == home / "saved"
    shutil.copy(ROOT / "configs" / "shapes.py", home / "mine.py")
    assert config_io.from_python("~/mine.py") == config_io.from_python("shapes")
    with pytest.raises(UserError, match=f"{home}/none.png"):
        dl.load("~/saved").predict("~/none.png")
    assert not list((home.parent / "here").iterdir())


def test_python_functions_refuse_an_empty_path(home):
    small_checkpoint.write(home / "saved")
    calls = {
        "--workdir": lambda: dl.train(Config(data=DataConfig(name="shapes")), ""),
        "the path of the weights": lambda: dl.load(""),
        "the destination": lambda: dl.convert("~/saved", ""),
        "the path of the config": lambda: config_io.from_python(" "),
        "the path of the image": lambda: dl.load("~/saved").predict(""),
    }
    for name, call in calls.items():
        with pytest.raises(UserError, match=f"^{name} is empty"):
            call()
    assert not list((home.parent / "here").iterdir())


@pytest.mark.parametrize("name", ["voc", "coco", "cityscapes", "ade20k", "folder"])
def test_data_sets_expand_the_home_folder(home, name):
    (home / "data").mkdir()
    with pytest.raises(UserError, match=f"{home}/data"):
        data.load(DataConfig(name=name, root="~/data"), "val")
    with pytest.raises(UserError, match="~no-such-user/data"):
        data.load(DataConfig(name=name, root="~no-such-user/data"), "val")


def test_lists_of_classes_expand_the_home_folder(home):
    maker = Maker(home / "data")
    for index in range(12):
        maker.pair(f"{index}")
    (home / "names.txt").write_text("sky\nlight\ncar\n")
    config = maker.config(classes="~/names.txt")
    assert data.load(config, "val").labels.names == ("sky", "light", "car")


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_variable_is_an_unset_one(home, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    else:
        monkeypatch.setenv("TFDS_DATA_DIR", value)
    assert records.data_dir() == home / "tensorflow_datasets"
