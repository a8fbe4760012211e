"""`deeplab-jax data check` and `data crops`, as a user runs them."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from conftest import ROOT
from deeplab_jax import config as config_lib
from deeplab_jax import data as data_lib
from deeplab_jax.cli.data_settings import DataSettings, data_options
from deeplab_jax.cli.main import app
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate
from deeplab_jax.data import pipeline
from deeplab_jax.utils.errors import UserError
from own_data import NAMES, Maker


def run(*arguments, code=0, command="check"):
    done = CliRunner().invoke(app, ["data", command, *map(str, arguments)], env={"COLUMNS": "160"})
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
    *_, summary, training = done.stdout.splitlines()
    assert summary.endswith("no errors, no warnings")
    assert training == (
        "To train: python train.py --config configs/folder.py --workdir runs/data "
        f"--config.data.root={maker.root} --config.data.ignore_label=9 "
        "'--config.data.folder.mask_name={name}_mask'"
    )
    assert "Checking" in done.stderr
    assert "Checking" not in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["errors"], report["warnings"]) == (0, 0)
    assert report["splits"]["train"]["images"] == 5
    assert report["classes"][1]["name"] == "traffic light"
    assert set(report["classes"][1]) == {"id", "name", "color", "pixels", "share", "images"}
    assert Image.open(tmp_path / "sheet.png").size[0] == 6 * 248 + 8


def test_crops_of_a_run_are_drawn(tmp_path, command):
    """The pixels are those of the first batch, as are the labels, whose background stays clear."""
    settings = ["--set=data.crop_size=50,40", "--set=data.augment.mix=cutmix"]
    settings += ["--set=data.augment.photometric=1", "--set=seed=3"]
    arguments = ["data", "crops", "shapes", tmp_path / "crops.png", *settings, "--count=4"]
    assert command(*arguments) == (0, "", "")
    picture = np.asarray(Image.open(tmp_path / "crops.png"))
    config = config_io.override(config_io.from_python("shapes"), [each[6:] for each in settings])
    with pipeline.train_batches(
        data_lib.load(config.data, "train"), config.data, batch_size=2, seed=3, start_step=0
    ) as batches:
        (first, second) = (next(batches) for _ in range(2))
    for index in range(4):
        batch, row = (first, second)[index // 2], index % 2
        top, left = 258 * (index // 3), 8 + 416 * (index % 3)
        image, label = (
            picture[top : top + 250, x : x + 200][2::5, 2::5] for x in (left, left + 208)
        )
        np.testing.assert_array_equal(image, batch["image"][row])
        clear = np.isin(batch["label"][row], (0, 255))
        np.testing.assert_array_equal((label == image).all(axis=2), clear)


def test_crops_of_wrong_settings(tmp_path, command):
    for setting, message in {
        "data.augment.mix=classmx": "data.augment.mix must be .*did you mean 'classmix'",
        "data.augment.rotation=400": "data.augment.rotation must be degrees, 0 to 180, got 400",
    }.items():
        code, _, err = command("data", "crops", "shapes", tmp_path / "x.png", f"--set={setting}")
        assert code == 2
        assert re.search(message, err)
    assert not (tmp_path / "x.png").exists()


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
    assert "error classes (1)" in done.stdout
    assert "If 9 does not count, set config.data.ignore_label=9" in done.stdout
    checks = [line for line in done.stdout.splitlines() if line.startswith("deeplab-jax")]
    start = f"deeplab-jax data check {maker.root} --config {tmp_path}/mine.py"
    assert checks == [f"{start} --ignore-label 200 --write-classes", f"{start} --ignore-label 9"]
    again = run(*shlex.split(checks[1])[3:])
    assert f"--config {tmp_path}/mine.py" in again.stdout.splitlines()[-1]
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
    for path in (maker.root / "masks").rglob("*.png"):
        path.write_bytes(b"")
    arguments = ("--mask-name", "{name}_mask", "--sheet", tmp_path / "sheet.png")
    assert "was not drawn" in run(maker.root, *arguments, code=1).stderr
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "{root}/classes.txt/report.json"], "--json: .* cannot be written to"),
        (["--sheet", "{root}"], "--sheet: .* is a folder"),
        (["--masks-hold", "colours"], r"masks_hold must be auto, ids, colors or binary"),
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
    assert len(documented("python train.py")) >= 2


def test_documented_fields_exist():
    known = config_lib.flatten(config_lib.Config())
    named = set(re.findall(r"`(data\.[\w.]+)", (ROOT / "docs/own_data.md").read_text()))
    assert len(named) >= 8
    assert named <= known.keys()


def commands_of(done):
    """The commands that an output ends its errors with."""
    return [line for line in done.stdout.splitlines() if line.startswith("deeplab-jax data check")]


def follow(line, code=0):
    """Runs a command that the check printed."""
    *program, _ = words = shlex.split(line)
    assert program[:3] == ["deeplab-jax", "data", "check"]
    return run(*words[3:], code=code)


@pytest.fixture
def trimaps(tmp_path):
    """Masks of 1, 2, 3 and a file that names three classes."""
    maker = Maker(tmp_path / "my data")
    maker.text("classes.txt", *NAMES)
    for name in "abcdefgh":
        maker.pair(name, shape=(16, 20))
        maker.save(maker.root / f"masks/{name}.png", np.uint8(maker.labels[name] % 254 + 1))
    return maker


def test_write_classes(trimaps):
    (line,) = commands_of(run(trimaps.root, code=1))
    assert line == f"deeplab-jax data check '{trimaps.root}' --write-classes"
    assert (trimaps.root / "classes.txt").read_text().splitlines() == list(NAMES)
    done = follow(line)
    lines = ["sky 1", "traffic light 2", "car 3"]
    assert (trimaps.root / "classes.txt").read_text().splitlines() == lines
    assert "\n".join(lines) in done.stdout
    assert "the one that was there is now classes.txt.orig" in done.stdout
    assert (trimaps.root / "classes.txt.orig").read_text().splitlines() == list(NAMES)
    training = done.stdout.splitlines()[-1]
    assert training.endswith(f"--workdir runs/my_data '--config.data.root={trimaps.root}'")


def test_write_classes_changes_no_file_that_fits_or_states_values(trimaps):
    trimaps.text("classes.txt", "sky 1", "light 2", "car 3")
    assert "fits the masks, so nothing is written" in run(trimaps.root, "--write-classes").stdout
    trimaps.text("classes.txt", "sky 1", "light 2")
    with pytest.raises(UserError, match=r"classes\.txt: states values"):
        run(trimaps.root, "--write-classes")
    trimaps.text("classes.txt", "sky 1 {2}")
    with pytest.raises(UserError, match="line 1"):
        run(trimaps.root, "--write-classes")
    assert sorted(path.name for path in trimaps.root.iterdir()) == [
        "classes.txt",
        "images",
        "masks",
    ]


def test_write_classes_elsewhere_and_twice(trimaps, tmp_path):
    other = tmp_path / "names.txt"
    done = run(trimaps.root, "--write-classes", "--classes", other)
    assert other.read_text().splitlines()[1:] == ["class_1 1", "class_2 2", "class_3 3"]
    assert f"--config.data.folder.classes={other}" in done.stdout.splitlines()[-1]
    for number, name in enumerate(("one", "two"), start=1):
        other.write_text(f"{name}\nb\nc\n")
        run(trimaps.root, "--write-classes", "--classes", other)
        kept = other.with_name(f"names.txt.orig{number if number > 1 else ''}")
        assert kept.read_text().startswith(name)


def test_write_classes_keeps_the_capitals_of_a_name(trimaps):
    (trimaps.root / "classes.txt").rename(trimaps.root / "Classes.TXT")
    follow(commands_of(run(trimaps.root, code=1))[0])
    assert (trimaps.root / "Classes.TXT").read_text().startswith("sky 1\n")
    assert not (trimaps.root / "classes.txt").exists()


def test_write_classes_where_nothing_can_be_written(trimaps, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("deeplab_jax.data_check.proposal.write_bytes", refuse)
    with pytest.raises(UserError, match=r"Read-only .* --write-classes --classes my_classes\.txt"):
        run(trimaps.root, "--write-classes")
    assert (trimaps.root / "classes.txt").read_text().splitlines() == list(NAMES)


def test_write_classes_leaves_polygons_alone(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcdefgh":
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(root / f"{name}.png")
        square = {"label": "cat", "points": [[2, 2], [9, 9]], "shape_type": "rectangle"}
        size = {"imageHeight": 16, "imageWidth": 20, "imagePath": f"{name}.png", "shapes": [square]}
        (root / f"{name}.json").write_text(json.dumps(size))
    done = run(root, "--write-classes")
    assert "fits the masks, so nothing is written" in done.stdout
    assert not (root / "classes.txt").exists()


def test_what_was_found_is_printed_and_an_ambiguous_set_runs_by_its_own_words(tmp_path):
    maker = Maker(tmp_path / "data")
    for name in "abcdefgh":
        maker.pair(name, mask_name="{name}_label")
    (maker.root / "images").rename(maker.root / "Photos")
    done = run(maker.root, code=1)
    pattern = "masks masks/{name}_label.png"
    assert done.stdout.startswith(f"note: found: images Photos/{{name}}.png, {pattern}")
    shutil.copytree(maker.root / "masks", maker.root / "masks2")
    with pytest.raises(UserError) as error:
        run(maker.root)
    lines = str(error.value).splitlines()
    first, second = [line for line in lines if line.startswith("deeplab-jax data check")]
    assert "masks/" in first
    assert "masks2/" in second
    done = follow(second)
    training = shlex.split(done.stdout.splitlines()[-1])
    assert "--config.data.folder.mask_pattern=masks2/{name}_label.png" in training


def test_settings_in_a_message_become_options():
    settings = DataSettings("", {"data.ignore_label": 3, "data.folder.threshold": 9})
    text = (
        "Set config.data.folder.image_pattern='a b/{name}.jpg' and "
        "config.data.folder.mask_pattern={name}_mask.png, or config.data.folder.threshold=7; or "
        "`--config.data.root=/x/y`. Or config.loss.name=dice."
    )
    start = "deeplab-jax data check root --ignore-label 3"
    assert settings.mending_commands("root", text) == [
        f"{start} --threshold 9 --image-pattern 'a b/{{name}}.jpg' "
        "--mask-pattern '{name}_mask.png'",
        f"{start} --threshold 7",
        "deeplab-jax data check /x/y --ignore-label 3 --threshold 9",
    ]
    assert settings.mending_commands("root", "Nothing to set.") == []
    assert settings.mending_commands("root", "config.data.folder.threshold=9 is wrong.") == []


def test_the_training_line_carries_all_options_and_parses(trimaps):
    arguments = "--ignore-label 3 --channels 4 --mask-name {name} --masks-hold binary --threshold 5"
    taken = []

    @data_options
    def command(settings: DataSettings) -> None:
        taken.append(settings)

    app = typer.Typer()
    app.command()(command)
    CliRunner().invoke(app, arguments.split())
    line = taken[0].train_command("ROOT")
    fields = dict(re.findall(r"--config\.([\w.]+)=(\S+)", " ".join(shlex.split(line))))
    config = config_io.with_fields(
        config_lib.Config(), fields | {"data.name": "folder"}, parse=True
    )
    validate(config)
    assert config.data.folder == taken[0].config("ROOT").data.folder
    assert (config.data.ignore_label, config.data.mean) == (3, (0.5,) * 4)


def test_advice_is_printed_and_is_no_error(tmp_path):
    maker = Maker(tmp_path / "data")
    maker.text("classes.txt", "background", "crack")
    for name in "abcdefgh":
        maker.pair(name, shape=(40, 60))
        mask = np.zeros((40, 60), np.uint8)
        mask[5, :40] = 1
        maker.save(maker.root / f"masks/{name}.png", mask)
    (tmp_path / "small.py").write_text(
        "from deeplab_jax.config import *\n"
        "def get_config(): return Config(data=DataConfig(name='folder', crop_size=(16,)))\n"
    )
    report = tmp_path / "report.json"
    done = run(maker.root, "--config", tmp_path / "small.py", "--json", report)
    assert (
        "advice large images (1): images are 60 x 40 pixels (median), crops 16 x 16" in done.stdout
    )
    assert "advice imbalance (1): background has 98.33% of the pixels (crack 1.67%)" in done.stdout
    assert "no errors, no warnings" in done.stdout
    assert json.loads(report.read_text())["warnings"] == 0


def test_prepare(maker, tmp_path):
    settings = ("--ignore-label", "9", "--mask-name", "{name}_mask")
    out, report = tmp_path / "out", tmp_path / "report.json"
    done = run(maker.root, out, *settings, "--json", report, command="prepare")
    assert f"{out}: written; images: 7 hard links" in done.stdout
    assert "Writing" in done.stderr
    written = json.loads(report.read_text())
    assert (written["out"], written["images"]) == (str(out), {"hard link": 7})
    training = done.stdout.splitlines()[-1]
    assert training.endswith(f"--workdir runs/out --config.data.root={out}")
    copied = run(maker.root, tmp_path / "copied", *settings, "--copy", command="prepare")
    assert "images: 7 copies" in copied.stdout
    again = run(out)
    assert "no errors" in again.stdout
    table = re.findall(r"^\d  .*$", again.stdout, re.M)
    assert table == re.findall(r"^\d  .*$", done.stdout, re.M)
    with pytest.raises(UserError, match="exists already"):
        run(maker.root, out, *settings, command="prepare")


def test_prepare_resets_what_a_config_says_about_masks(maker, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from deeplab_jax.config import *\n"
        "def get_config():\n"
        "    folder = FolderConfig(mask_name='{name}_mask')\n"
        "    return Config(data=DataConfig(name='folder', ignore_label=9, folder=folder))\n"
    )
    config = ("--config", tmp_path / "mine.py")
    done = run(maker.root, tmp_path / "out", *config, command="prepare")
    flags = shlex.split(done.stdout.splitlines()[-1])[-3:]
    assert flags == [
        f"--config.data.root={tmp_path / 'out'}",
        "--config.data.ignore_label=255",
        "--config.data.folder.mask_name={name}",
    ]
    run(tmp_path / "out", *config, "--ignore-label", 255, "--mask-name", "{name}")


def test_prepare_writes_nothing_if_there_are_errors(maker, tmp_path):
    (maker.root / "images/val/f.png").write_bytes(b"")
    settings = ("--ignore-label", "9", "--mask-name", "{name}_mask")
    done = run(maker.root, tmp_path / "out", *settings, command="prepare", code=1)
    assert "error unreadable (1)" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("out: not written, because there are errors")
    assert not (tmp_path / "out").exists()
