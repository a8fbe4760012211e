"""Runs that are moved, copied or linked, whose data or weights are moved, or that go on longer."""

import copy
import dataclasses
import json
import shutil

import pytest
from PIL import Image

import tiny
from deeplab_jax.config import SecondStageConfig
from deeplab_jax.training import train as train_module
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError
from own_data import Maker

pytestmark = pytest.mark.usefixtures("shared_steps")


def get_config():
    config = tiny.get_config()
    config.model.width = 0.0625
    config.train = dataclasses.replace(config.train, steps=2, eval_every=0, save_every=1)
    return config


@pytest.fixture
def no_steps(monkeypatch):
    """Training is an error, so that what succeeds has resumed."""

    def make_train_step(*_):
        def step(*_):
            raise AssertionError("the run did not resume")

        return step

    return lambda: monkeypatch.setattr(train_module, "make_train_step", make_train_step)


def test_a_run_of_two_stages_resumes_wherever_it_is(tmp_path, no_steps):
    config = get_config()
    config.second_stage = SecondStageConfig(steps=2, output_stride=8, split="val")
    train(config, tmp_path / "run")
    no_steps()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    for name in ("copy", "moved"):
        assert train(config, tmp_path / name).step == 2
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert train(config, tmp_path / "link").step == 2


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The workdir of a run of `get_config`."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    train(get_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A data set of one's own, a run on it, and its config."""
    root = tmp_path_factory.mktemp("own")
    maker = Maker(root / "data")
    for index in range(12):
        maker.pair(f"{index:02}", shape=(33, 33))
    maker.text("classes.txt", "sky", "traffic light", "car")
    config = get_config()
    config.data = dataclasses.replace(maker.config(), split="train", crop_size=(33,), num_workers=0)
    train(config, root / "run")
    return root, config


@pytest.fixture
def own(own_run, tmp_path):
    """A copy of that data set and run in `tmp_path`, and the config for it."""
    root, config = own_run
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    config = copy.deepcopy(config)
    config.data.root = str(tmp_path / "data")
    return config


def test_data_may_move(tmp_path, own, no_steps, monkeypatch):
    no_steps()
    shutil.copytree(tmp_path / "data", tmp_path / "scratch" / "data")
    own.data.root = str(tmp_path / "scratch" / "data")
    assert train(own, tmp_path / "run").step == 2
    monkeypatch.chdir(tmp_path)
    own.data.root = "data"
    assert train(own, tmp_path / "run").step == 2


def test_a_list_of_classes_may_move(tmp_path, own, no_steps):
    no_steps()
    shutil.copy(tmp_path / "data" / "classes.txt", tmp_path / "names.txt")
    own.data.folder.classes = str(tmp_path / "names.txt")
    assert train(own, tmp_path / "run").step == 2
    (tmp_path / "names.txt").write_text("sky\nlight\ncar\n")
    with pytest.raises(UserError, match=r"classes of train: .*'light'"):
        train(own, tmp_path / "run")


def test_other_masks_are_another_run(tmp_path, own):
    path = next((tmp_path / "data" / "masks").iterdir())
    mask = Image.open(path)
    mask.putpixel((5, 5), (mask.getpixel((5, 5)) + 1) % 3)
    mask.save(path)
    with pytest.raises(UserError, match=r"names and labels of (train|val) .* here, .* there"):
        train(own, tmp_path / "run")


def test_other_pixels_are_reported_and_the_run_resumes(tmp_path, own, no_steps, capfd):
    no_steps()
    path = next((tmp_path / "data" / "images").iterdir())
    image = Image.open(path)
    image.putpixel((5, 5), (1, 2, 3))
    image.save(path)
    assert train(own, tmp_path / "run").step == 2
    assert "not as at the start of this run" in capfd.readouterr().err


@pytest.mark.parametrize("field", ["path", "backbone"])
def test_weights_may_move(tmp_path, field, first_run, own_run, no_steps):
    config = get_config()
    shutil.copytree(first_run, tmp_path / "first")
    setattr(config.init, field, str(tmp_path / "first"))
    train(config, tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert recorded[f"config.init.{field}"]
    no_steps()
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    assert train(config, tmp_path / "run").step == 2  # what it started from is not needed any more
    setattr(config.init, field, str(tmp_path / "elsewhere"))
    assert train(config, tmp_path / "run").step == 2
    setattr(config.init, field, str(own_run[0] / "run"))
    with pytest.raises(UserError, match=f"config.init.{field}: "):
        train(config, tmp_path / "run")


def test_more_steps_are_refused_and_the_error_says_how_to_continue(tmp_path, first_run):
    config = get_config()
    shutil.copytree(first_run, tmp_path / "run")
    config.train.steps = 3
    with pytest.raises(UserError, match=r"--config\.init\.path=.*run and another --workdir"):
        train(config, tmp_path / "run")
    config.init.path = str(tmp_path / "run")
    assert train(config, tmp_path / "longer").step == 3


def test_a_second_stage_that_does_not_fit_is_refused_before_the_first(tmp_path, first_run):
    shutil.copytree(first_run, tmp_path / "run")
    config = get_config()
    config.second_stage = SecondStageConfig(steps=2)
    with pytest.raises(UserError, match=r"stage 2 of 2: .* holds a run with another config"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "stage1").exists()


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"3"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, first_run, name, content):
    shutil.copytree(first_run, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        train(get_config(), tmp_path / "run")
