"""`deeplab-jax data check`, as a user runs it."""

import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import ROOT
from deeplab_jax import config as config_lib
from deeplab_jax.cli.main import app
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate
from deeplab_jax.utils.errors import UserError
from own_data import NAMES, Maker


def run(*arguments, code=0):
    done = CliRunner().invoke(app, ["data", "check", *map(str, arguments)], env={"COLUMNS": "160"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def maker(tmp_path):
    maker = Maker(tmp_path / "data")
    maker.text("classes.txt", *NAMES)
    for split, names in (("train", "abcde"), ("val", "fg")):
        for name in names:
            maker.pair(name, folder=split, mask_name="{name}_mask", ignore=9, shape=(16, 20))
    return maker


def test_tables_json_and_sheet(maker, tmp_path):
    done = run(
        maker.root,
        *("--ignore-label", "9", "--mask-name", "{name}_mask", "--workers", "2"),
        *("--json", tmp_path / "report.json", "--sheet", tmp_path / "sheet.png"),
    )
    assert "20 x 16" in done.stdout
    assert "traffic light" in done.stdout
    assert done.stdout.endswith("no errors, no warnings\n")
    assert "Checking" in done.stderr
    assert "Checking" not in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["errors"], report["warnings"]) == (0, 0)
    assert report["splits"]["train"]["images"] == 5
    assert report["classes"][1]["name"] == "traffic light"
    assert set(report["classes"][1]) == {"id", "name", "color", "pixels", "share", "images"}
    assert Image.open(tmp_path / "sheet.png").size[0] == 6 * 248 + 8


def test_settings_of_a_config_and_those_that_override_it(maker, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from deeplab_jax.config import *\n"
        "def get_config():\n"
        "    folder = FolderConfig(mask_name='{name}_mask')\n"
        "    return Config(data=DataConfig(name='folder', ignore_label=9, folder=folder))\n"
    )
    config = ("--config", tmp_path / "mine.py")
    run(maker.root, *config)
    done = run(maker.root, *config, "--ignore-label", 200, code=1)
    assert "error unknown (7)" in done.stdout
    assert "config.data.ignore_label=9" in done.stdout
    run(maker.root, "--config", tmp_path / "mine.py", "--masks-hold", "colors", code=1)
    (maker.root / "classes.txt").rename(tmp_path / "names")
    assert "error classes" in run(maker.root, *config, code=1).stdout
    run(maker.root, *config, "--classes", tmp_path / "names")


def test_errors_exit_with_1_and_warnings_with_0(maker):
    settings = ("--ignore-label", "9", "--mask-name", "{name}_mask")
    maker.save(maker.root / "images/train/b.png", maker.images["a"])
    done = run(maker.root, *settings)
    assert "warning duplicates (1)" in done.stdout
    assert "train/a = train/b" in done.stdout
    (maker.root / "images/val/f.png").write_bytes(b"")
    (maker.root / "images/val/g.png").write_bytes(b"")
    done = run(maker.root, *settings, code=1)
    assert "error unreadable (2)" in done.stdout
    assert "1 error, 1 warning" in done.stdout


def test_brackets_in_names_are_printed_as_they_are(maker):
    maker.pair("[red]x", folder="train", mask_name="{name}_mask", ignore=9)
    (maker.root / "images/train/[red]x.png").write_bytes(b"")
    done = run(maker.root, "--ignore-label", "9", "--mask-name", "{name}_mask", code=1)
    assert "[red]x.png: is empty" in done.stdout


def test_an_empty_sheet_is_reported(maker, tmp_path):
    (maker.root / "classes.txt").unlink()
    arguments = ("--mask-name", "{name}_mask", "--sheet", tmp_path / "sheet.png")
    assert "was not drawn" in run(maker.root, *arguments, code=1).stderr
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "{root}/classes.txt/report.json"], "--json: .* cannot be written to"),
        (["--sheet", "{root}"], "--sheet: .* is a folder"),
        (["--masks-hold", "colours"], r"masks_hold must be ids, colors or binary"),
        (["--mask-name", "mask"], r"mask_name must be a text that holds \{name\} once"),
        (["--config", "none.py"], r"no config file none\.py"),
        (["--ignore-label", "256"], r"ignore_label must be an id"),
    ],
)
def test_mistakes(maker, arguments, message):
    with pytest.raises(UserError, match=message):
        run(maker.root, *(argument.replace("{root}", str(maker.root)) for argument in arguments))


def test_four_channels_need_no_mean(maker, tmp_path):
    for path in (maker.root / "images").rglob("*.png"):
        rgba = np.dstack([np.array(Image.open(path)), np.full((16, 20), 255, np.uint8)])
        maker.save(path, rgba)
    settings = ("--ignore-label", "9", "--mask-name", "{name}_mask")
    run(maker.root, *settings, "--channels", "4")


def documented(start):
    text = (ROOT / "docs/own_data.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("line", documented("python train.py"))
def test_documented_trainings_have_valid_configs(line):
    _, program, *arguments = shlex.split(line)
    assert program == "train.py"
    fields = dict(re.findall(r"^--config\.([\w.]+)=(.*)$", "\n".join(arguments), re.M))
    path = arguments[arguments.index("--config") + 1]
    config = config_io.with_fields(config_io.from_python(ROOT / path), fields, parse=True)
    validate(config)
    assert config.data.name == "folder"


def test_there_are_documented_trainings():
    assert len(documented("python train.py")) == 2


def test_documented_fields_exist():
    known = config_lib.flatten(config_lib.Config())
    named = set(re.findall(r"`(data\.[\w.]+)", (ROOT / "docs/own_data.md").read_text()))
    assert len(named) >= 8
    assert named <= known.keys()
