"""The commands and code of README.md work, and the commands of the pages that continue it."""

import argparse
import re
import shlex
import subprocess

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import typer

import small_checkpoint
from conftest import ROOT
from deeplab_jax.cli.main import app
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("index", "training", "predicting")]


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


COMMANDS = [
    line
    for text in [README, *(page.read_text() for page in PAGES)]
    for block in blocks(text, "sh")
    for line in block.replace("\\\n", " ").splitlines()
]
TRAINING = [line for line in COMMANDS if line.startswith("python train.py")]


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_give_valid_configs(line):
    argv = [a.replace("configs/", f"{ROOT}/configs/") for a in shlex.split(line, comments=True)[2:]]
    known = argparse.ArgumentParser()
    known.add_argument("--config", required=True)
    known.add_argument("--workdir", required=True)
    values, overrides = known.parse_known_args(argv)
    assert all(flag.startswith("--config.") for flag in overrides)
    settings = [flag.removeprefix("--config.") for flag in overrides]
    validate(config_io.override(config_io.from_python(values.config), settings))


def test_there_are_training_commands():
    assert len(TRAINING) >= 5


@pytest.mark.parametrize("target", ["quickstart", "test", "lint"])
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert target == "lint" or f"make {target}" in README


def test_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    files = [link for link in links if not link.startswith("#")]
    assert files
    for link in files:
        assert (ROOT / link).exists(), link
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings_of(README)}
    for link in set(links) - set(files):
        assert link[1:] in headings, link


def headings_of(text):
    return re.findall(r"^#+ (.*)$", text, re.M)


PYTHON = blocks(README, "python")


def test_the_python_example_of_a_segmenter_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_checkpoint.write(tmp_path / "runs" / "mine")
    cv2.imwrite("photo.jpg", np.zeros((20, 30, 3), np.uint8))
    names = {}
    exec(PYTHON[0], names)
    assert names["ids"].shape == (20, 30)
    assert set(names["names"]) <= set(names["segmenter"].classes)


def test_the_python_example_of_a_module_runs():
    narrow = PYTHON[1].replace("num_classes=21", "num_classes=21, width=0.03125")
    assert narrow != PYTHON[1]
    names = {"images": jnp.zeros((1, 17, 33, 3))}
    exec(narrow, names)
    assert names["logits"].shape == (1, 17, 33, 21)


COMMAND_LINES = [line for line in COMMANDS if line.startswith("deeplab-jax")]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_have_the_documented_options(line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"{line}: no such command"
    command.make_context("deeplab-jax", words)  # raises for an unknown option or argument
