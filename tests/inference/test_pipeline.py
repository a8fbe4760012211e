"""The pipeline that predicts files: order, errors, batches, memory, and its end at any moment."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time
import weakref

import jax
import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from deeplab_jax.inference import files, pipeline
from deeplab_jax.inference.compilation import Programs
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("here")

# The sizes of nine photos, a tenth of their sides.
PHOTOS = [(72, 108), (72, 108), (30, 45), (96, 64), (43, 64), (81, 108), (73, 108), (85, 128)]


def write_images(sizes):
    """Writes images of these sizes; the inputs of `predict_images`."""
    pathlib.Path("in").mkdir()
    rng = np.random.default_rng(0)
    inputs = {}
    for index, size in enumerate(sizes):
        path = pathlib.Path(f"in/{index:03}.png")
        coarse = rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), np.uint8)
        Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]).save(path)
        inputs[path] = pathlib.Path(f"out/{path.stem}")
    return inputs


def names(results):
    return [
        str(one).split(":")[0] if isinstance(one, UserError) else str(one.path) for one in results
    ]


def pictures(folder="out"):
    return {
        path.name: np.asarray(Image.open(path)) for path in sorted(pathlib.Path(folder).iterdir())
    }


def test_results_have_the_order_of_the_images_with_errors_in_between(loaded):
    inputs = write_images([(20 + i % 3, 30) for i in range(40)])
    paths = list(inputs)
    paths[7].write_bytes(paths[7].read_bytes()[:80])
    paths[8].write_text("no image")
    paths[21].unlink()
    pathlib.Path("out/030_ids.png").mkdir(parents=True)
    results = list(pipeline.predict_images(loaded, inputs))
    assert names(results) == [str(path) for path in paths]
    failed = [index for index, one in enumerate(results) if isinstance(one, UserError)]
    assert failed == [7, 8, 21, 30]
    assert "is truncated" in str(results[7])
    assert results[39].size == (20, 30)


def test_an_image_that_is_too_large_is_named(loaded):
    inputs = write_images([(20, 30), (1, 40_000)])
    good, error = pipeline.predict_images(loaded, inputs)
    assert good.size == (20, 30)
    assert str(error).startswith(f"{list(inputs)[1]}: an image of 1x40000 pixels is too large")


def test_a_full_disk_in_a_writer_ends_all(loaded, monkeypatch):
    inputs = write_images([(20, 30)] * 80)
    write_png, attempts = pipeline.write_png, []

    def fill(path, *picture):
        attempts.append(path)
        if path.name.startswith("005"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_png(path, *picture)

    monkeypatch.setattr(pipeline, "write_png", fill)
    *done, last = pipeline.predict_images(loaded, inputs)
    assert names(done)[:5] == [str(path) for path in list(inputs)[:5]]
    assert isinstance(last, files.OutputError)
    assert "No space left on device" in str(last)
    assert len(attempts) < 80


def test_a_picture_that_does_not_fit_in_memory_is_the_error_of_its_image(loaded, monkeypatch):
    overlay = pipeline.overlays.overlay

    def draw(pixels, ids, labels, *, opacity, unsure):
        if len(ids) == 40:
            raise MemoryError
        return overlay(pixels, ids, labels, opacity=opacity)

    monkeypatch.setattr(pipeline.overlays, "overlay", draw)
    inputs = write_images([(20, 30), (40, 30), (20, 30)])
    first, large, last = inputs
    one, error, other = pipeline.predict_images(loaded, inputs)
    assert [one.path, other.path] == [first, last]
    assert str(error) == f"{large}: its pictures do not fit in memory"


def test_photos_of_seven_sizes_need_few_programs(model, monkeypatch):
    monkeypatch.setattr("deeplab_jax.inference.predictor.CPU_PROGRAM_PIXELS", 7000)
    fresh = deeplab_jax.load(model)
    inputs = write_images([*PHOTOS, PHOTOS[-1]])
    results = list(pipeline.predict_images(fresh, inputs))
    assert fresh.num_compilations <= 3
    for result in results:
        np.testing.assert_array_equal(
            np.asarray(Image.open(result.files["ids"])), fresh.predict(result.path)
        )


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {}),
        ({"positive": PositiveClass(1, 0.4)}, {}),
        ({"positive": PositiveClass(2, 0.3), "heatmap_classes": (1, 2)}, {}),
        ({"side_by_side": True}, {"scales": (0.5, 1), "flip": True}),
        ({}, {"window": 65}),
    ],
    ids=["plain", "threshold", "heat maps", "views", "windows"],
)
def test_batches_give_what_single_images_give(model, options, settings):
    inputs = write_images([(40, 60), (40, 56), (33, 60), (50, 70), (40, 60), (40, 60), (39, 59)])
    paths = list(inputs)
    paths[2].write_text("no image")
    found = {}
    for batch in (1, 4):
        segmenter = deeplab_jax.load(model, **settings)
        segmenter.predictor.max_batch = batch
        results = list(pipeline.predict_images(segmenter, inputs, **options))
        assert names(results) == [str(path) for path in paths]
        found[batch] = pictures()
        if batch == 4 and "window" not in settings:
            shapes = set(segmenter.predictor._planned.values())
            assert {shape.num_images for shape in shapes} == {4}
    assert found[1].keys() == found[4].keys()
    for name, picture in found[1].items():
        tolerance = 2 if "heatmap" in name else 0  # steps of the colour map
        np.testing.assert_allclose(found[4][name].astype(int), picture, atol=tolerance)


def test_a_full_device_gets_fewer_images(model, monkeypatch, capfd):
    inputs = write_images([(20, 30)] * 9)
    segmenter = deeplab_jax.load(model)
    segmenter.predictor.max_batch = 4
    run, batches = Programs.__call__, []

    def limited(programs, function, variables, images, *rest):
        batches.append(len(images))
        if len(images) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return run(programs, function, variables, images, *rest)

    monkeypatch.setattr(Programs, "__call__", limited)
    results = list(pipeline.predict_images(segmenter, inputs))
    assert names(results) == [str(path) for path in inputs]
    assert not any(isinstance(one, UserError) for one in results)
    assert batches.count(4) <= 2  # the second was started before the first failed
    assert capfd.readouterr().err.count("memory is full: from here on, 2") == 1
    np.testing.assert_array_equal(
        np.asarray(Image.open(results[8].files["ids"])), segmenter.predict(results[8].path)
    )


def test_few_images_are_in_memory_at_once(loaded, monkeypatch):
    inputs = write_images([(20, 30)] * 120)
    read, alive, most = pipeline.read_image, [], []

    def watched(*arguments, **options):
        pixels = read(*arguments, **options)
        alive.append(arguments[0])
        weakref.finalize(pixels, alive.remove, arguments[0])
        return pixels

    monkeypatch.setattr(pipeline, "read_image", watched)
    for _ in pipeline.predict_images(loaded, inputs):
        most.append(len(alive))
    assert 2 <= max(most) <= 2 * pipeline.MAX_IMAGES + 2


def test_large_images_are_counted_by_their_pixels(loaded, monkeypatch):
    inputs = write_images([(20, 30)] * 12)
    monkeypatch.setattr(pipeline, "MAX_PIXELS", 2 * 20 * 30)
    started, seen = [], []
    read = pipeline.read_image

    def watched(*arguments, **options):
        started.append(arguments[0])
        return read(*arguments, **options)

    monkeypatch.setattr(pipeline, "read_image", watched)
    for _ in pipeline.predict_images(loaded, inputs):
        seen.append(len(started))
    assert seen[0] <= 5  # two are being read, one is predicted, two are being written


def test_closing_cancels_what_is_queued(loaded, monkeypatch):
    inputs = write_images([(20, 30)] * 60)
    written = []
    monkeypatch.setattr(pipeline, "write_png", lambda path, *_: written.append(time.sleep(0.02)))
    results = pipeline.predict_images(loaded, inputs)
    next(results)
    results.close()
    number = len(written)
    assert number < 2 * 60
    time.sleep(0.1)
    assert len(written) == number


def test_closing_before_the_programs_are_compiled_forgets_the_others(model, monkeypatch):
    monkeypatch.setattr("deeplab_jax.inference.predictor.CPU_PROGRAM_PIXELS", 0)
    inputs = write_images([(8 * (i + 1), 9) for i in range(40)])
    fresh = deeplab_jax.load(model)
    results = pipeline.predict_images(fresh, inputs)
    next(results)
    assert fresh.num_compilations == 40
    results.close()
    assert 1 <= fresh.num_compilations < 40
    last = list(inputs)[-1]
    assert fresh.predict(last).shape == (320, 9)


WORKER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
from deeplab_jax.inference import pipeline
write_png = pipeline.write_png
def slow(path, *picture):
    write_png(path, *picture)
    time.sleep(0.05)
pipeline.write_png = slow
from deeplab_jax.cli.main import main
sys.argv = ["deeplab-jax", "predict", sys.argv[1], "in", "--out", "out"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_without_half_files(model, number):
    write_images([(20, 30)] * 200)
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(model)], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(os.listdir("out") if os.path.isdir("out") else ()) < 12:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode not in (0, -number), err
    assert "Traceback" not in err
    done = pictures()  # each of which can be read
    assert 12 <= len(done) < 400
    assert not [path for path in os.listdir("out") if path.startswith(".")]
