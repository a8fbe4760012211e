"""Predictions into folders and consoles as people have them."""

import errno
import io
import json
import os
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.inference import pipeline
from own_data import Maker


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write(f"photos/{name}.png")
    return tmp_path


def write(name):
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def predict(command, model):
    def run(*arguments):
        done = command("predict", model, "photos", "--out", "out", "--json", "a.json", *arguments)
        return *done, json.loads(pathlib.Path("a.json").read_text())

    return run


def names_in(report):
    return [pathlib.Path(entry["image"]).name for entry in report["images"]]


def folder_instead_of_an_output():
    pathlib.Path("out/b_overlay.png").mkdir(parents=True)


def file_instead_of_a_folder():
    write("photos/b/b.png")
    os.remove("photos/b.png")
    pathlib.Path("out").mkdir()
    pathlib.Path("out/b").touch()


def long_name():
    os.rename("photos/b.png", f"photos/{'b' * 250}.png")


def link_to_nothing():
    os.remove("photos/b.png")
    os.symlink("absent", "photos/b.png")


def no_image():
    pathlib.Path("photos/b.png").write_text("no image")


@pytest.mark.parametrize(
    "break_one",
    [
        *(folder_instead_of_an_output, file_instead_of_a_folder, long_name, link_to_nothing),
        no_image,
    ],
)
def test_the_failure_of_one_file_leaves_the_others(predict, break_one):
    break_one()
    code, out, err, report = predict()
    assert code == 2
    assert "1 of 3 images could not be predicted" in err
    assert names_in(report) == ["a.png", "c.png"]
    (problem,) = report["problems"]
    assert "photos/b" in problem
    assert "2 images in out" in out
    assert {"a_ids.png", "a_overlay.png", "c_ids.png", "c_overlay.png"} <= set(os.listdir("out"))
    assert not [name for name in os.listdir("out") if name.endswith(".partial")]


def test_a_long_name_needs_no_more_than_its_outputs(predict):
    name = "é" * 121  # 242 bytes
    os.rename("photos/b.png", f"photos/{name}.png")
    code, _, _, report = predict()
    assert code == 0
    assert f"{name}_overlay.png" in os.listdir("out")
    assert len(report["images"]) == 3


def test_an_argument_of_a_length_that_no_file_has_fails_alone(command, model):
    code, out, err = command("predict", model, "photos/a.png", "x" * 300, "--out", "out")
    assert code == 2
    assert "1 of 2 images could not be predicted" in err
    assert "1 image in out" in out


def test_a_full_disk_ends_the_command_with_what_was_done(predict, monkeypatch):
    write_png = pipeline.write_png

    def fill(path, *picture):
        if path.name.startswith("b"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_png(path, *picture)

    monkeypatch.setattr(pipeline, "write_png", fill)
    code, out, err, report = predict()
    assert code == 2
    assert names_in(report) == ["a.png"]
    assert "1 image in out" in out
    assert "2 of 3 images could not be predicted" in err
    assert "No space left on device" in err


def test_earlier_outputs_are_counted(predict, command, model):
    assert predict("--side-by-side", "--heatmap", "0")[0] == 0
    os.rename("out", "photos/earlier")
    code, out, _, report = predict()
    assert code == 0
    assert names_in(report) == ["a.png", "b.png", "c.png"]
    assert "left out: 12 of the pictures, which deeplab-jax wrote" in out


NAME = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1", "cp1252"])
def test_any_name_can_be_printed(predict, command, monkeypatch, encoding, here):
    for name in (NAME, "日本", "\N{SNOWMAN}"):
        write(f"photos/{name}.png")
    printed = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", printed)
    code, _, _, report = predict("--out", NAME)
    assert code == 0
    assert len(report["images"]) == 6
    printed.flush()
    text = printed.buffer.getvalue().decode(encoding)
    assert "6 images in caf" in text
    assert "#" in text

    maker = Maker(here / "data\N{SNOWMAN}")
    for name in (NAME, "日本", *"abcdef"):
        maker.pair(name)
    maker.text("classes.txt", "sky", "café ☃", "car")
    write(f"{maker.root}/images/{NAME}2.png")
    report_file, sheet = here / "check.json", here / "sheet.png"
    code, _, _ = command("data", "check", maker.root, "--json", report_file, "--sheet", sheet)
    assert code == 1
    assert sheet.exists()
    assert any(
        NAME in text for text in json.loads(report_file.read_text())["findings"][0]["examples"]
    )
    printed.flush()
    assert f"{'caf' if encoding == 'ascii' else 'café'}" in printed.buffer.getvalue().decode(
        encoding
    )
