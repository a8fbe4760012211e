"""`deeplab-jax predict`, run in this process as a user types it."""

import functools
import json
import os

import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from deeplab_jax.inference import pipeline, predictor, segmenter
from deeplab_jax.visualization import overlays


@pytest.fixture(scope="module")
def loaded(model):
    return deeplab_jax.load(model)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of images of three sizes; sizes of one padded size, so that little is compiled."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    (tmp_path / "photos").mkdir()
    for name, shape in {"a": (41, 57, 3), "b": (30, 100, 3), "c": (1, 1, 3)}.items():
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    return tmp_path


@pytest.fixture
def command(command):
    return functools.partial(command, "predict")


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_each_image_gets_its_ids_its_overlay_and_its_areas(command, model, loaded, here):
    code, out, _ = command(model, "photos", "--out", "out", "--json", "areas.json")
    assert code == 0
    expected = [f"{name}_{kind}.png" for name in "abc" for kind in ("ids", "overlay")]
    assert sorted(os.listdir("out")) == expected
    report = json.loads((here / "areas.json").read_text())
    total = np.zeros(3, int)
    for name, entry in zip("abc", report["images"], strict=True):
        ids = pixels_of(f"out/{name}_ids.png")
        np.testing.assert_array_equal(ids, loaded.predict(f"photos/{name}.png"))
        with Image.open(f"out/{name}_ids.png") as image:
            shown = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(shown, loaded.palette[ids])
        assert (entry["height"], entry["width"]) == ids.shape
        assert entry["files"]["ids"] == f"out/{name}_ids.png"
        for class_name, area in entry["classes"].items():
            assert loaded.classes[area["id"]] == class_name
            assert area["pixels"] == np.sum(ids == area["id"]) > 0
            assert area["share"] == pytest.approx(area["pixels"] / ids.size)
            total[area["id"]] += area["pixels"]
        assert sum(area["pixels"] for area in entry["classes"].values()) == ids.size
    assert {area["id"]: area["pixels"] for area in report["total"].values()} == {
        index: count for index, count in enumerate(total) if count
    }
    for index, count in enumerate(total):
        (row,) = [line.split() for line in out.splitlines() if loaded.classes[index] in line]
        assert f"{count:,}" in row
        assert "#" + bytes(loaded.palette[index]).hex() in row


def test_the_overlay_shows_the_image_and_the_colours(command, model, here):
    command(model, "photos/a.png", "--out", "out", "--opacity", "1")
    image, ids = pixels_of("photos/a.png"), pixels_of("out/a_ids.png")
    overlay = pixels_of("out/a_overlay.png")
    factor = overlay.shape[1] // 57
    small = overlay[: 41 * factor : factor, : 57 * factor : factor]
    np.testing.assert_array_equal(small[ids == 0], image[ids == 0])
    np.testing.assert_array_equal(small[ids == 1], np.tile((200, 0, 0), ((ids == 1).sum(), 1)))


def test_heat_maps_and_side_by_side(command, model, loaded):
    flags = ["--heatmap", "red fox", "--heatmap", "BLUEBIRD", "--heatmap", "1", "--side-by-side"]
    code, _, _ = command(model, "photos/a.png", "--out", "out", *flags)
    assert code == 0
    assert sorted(os.listdir("out")) == [
        "a_heatmap_bluebird.png",
        "a_heatmap_red_fox_1.png",
        "a_ids.png",
        "a_overlay.png",
        "a_side_by_side.png",
    ]
    beside = pixels_of("out/a_side_by_side.png")
    assert beside.shape[1] > 2 * 57
    probability = loaded.probabilities("photos/a.png")[..., 1]
    expected = overlays.heatmap(pixels_of("photos/a.png"), probability, "red fox")
    drawn = pixels_of("out/a_heatmap_red_fox_1.png")
    np.testing.assert_allclose(drawn, expected.astype(int), atol=2)  # another padded size
    assert (drawn != expected).mean() < 0.001


def test_earlier_outputs_are_replaced_and_no_temporary_files_remain(command, model, here):
    (here / "out").mkdir()
    (here / "out/a_ids.png").write_text("old")
    assert command(model, "photos/a.png", "--out", "out")[0] == 0
    assert pixels_of("out/a_ids.png").shape == (41, 57)
    assert sorted(os.listdir("out")) == ["a_ids.png", "a_overlay.png"]
    # The folder of outputs may be that of the images: outputs are no images the next time.
    for _ in range(2):
        _, out, _ = command(model, "photos", "--out", "photos")
        assert "3 images in photos" in out


def test_bad_files_are_reported_at_the_end_and_the_others_predicted(command, model, here):
    (here / "photos/b.png").write_bytes((here / "photos/b.png").read_bytes()[:2000])
    (here / "photos/text.jpg").write_text("hello")
    code, out, err = command(model, "photos", "none.png", "--out", "out", "--json", "areas.json")
    assert code == 2
    assert "2 images in out" in out
    assert sorted(os.listdir("out")) == ["a_ids.png", "a_overlay.png", "c_ids.png", "c_overlay.png"]
    assert "error: 3 of 5 images could not be predicted: 3 problems" in err
    for message in ("b.png: is truncated", "text.jpg: is a text", "none.png: cannot be read"):
        assert message in err
    assert len(json.loads((here / "areas.json").read_text())["problems"]) == 3


def test_only_bad_files(command, model):
    code, out, err = command(model, "none.png", "--out", "out", "--json", "-")
    assert code == 2
    assert json.loads(out)["images"] == []
    assert "none.png: cannot be read" in err


def test_stdout_contains_only_json(command, model):
    code, out, err = command(model, "photos/c.png", "--out", "out", "--json", "-")
    assert code == 0
    assert json.loads(out)["images"][0]["width"] == 1
    assert "1 image in out" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos/a.png", "--out", "taken"], "--out taken cannot be written to"),
        (["photos/a.png", "--out", "taken/out"], "--out taken/out cannot be written to"),
        (["empty", "--out", "out"], "empty: the folder contains no image files"),
        (["*.tif", "--out", "out"], "no file matches the pattern"),
        (["photos/a.png", "--out", "out", "--json", "x.txt"], "--json must be a file that ends in"),
        (["photos/a.png", "--out", "out", "--scales", "1,a"], "--scales must be numbers"),
        (["photos/a.png", "--out", "out", "--window", "3"], "window must be 32 pixels or more"),
        (["photos/a.png", "--out", "out", "--heatmap", "red fix"], "did you mean 'red fox'"),
        (["photos/a.png", "--out", "out", "--output-stride", "12"], "must be 8, 16 or 32"),
        (["photos/a.png", "--out", "out", "--opacity", "2"], "opacity"),
    ],
)
def test_mistakes_are_reported_before_anything_is_predicted(
    command, model, here, monkeypatch, arguments, message
):
    (here / "taken").write_text("a file")
    (here / "empty").mkdir()
    monkeypatch.setattr(pipeline, "predict_images", None)
    code, _, err = command(model, *arguments)
    assert code == 2
    assert message in err


def test_an_invalid_checkpoint_is_reported(command, here):
    code, _, err = command("runs/none", "photos", "--out", "out")
    assert code == 2
    assert "runs/none is neither a weights file, nor a folder" in err


def test_an_unwritable_output_is_reported_when_the_others_are_done(command, model, here):
    (here / "out/a_ids.png").mkdir(parents=True)
    code, _, err = command(model, "photos", "--out", "out")
    assert code == 2
    assert "cannot write to out/a_ids.png: Is a directory" in err
    assert (here / "out/b_ids.png").exists()


def test_settings_reach_the_model(command, model, monkeypatch):
    settings = []

    class Watched(segmenter.Predictor):
        def __init__(self, model, variables, *, tta, **rest):
            settings.append((model.architecture.output_stride, tta))
            self.max_batch = 1

        def plan(self, *_):
            pass

        def cancel(self):
            pass

        def padded_shape(self, image):
            return None

        def start(self, function, images, *_):
            return lambda: [(np.zeros(image.shape[:2], np.uint8), None) for image in images]

    monkeypatch.setattr(segmenter, "Predictor", Watched)
    flags = ["--scales", "0.5,1", "--flip", "--window", "65", "--output-stride", "8"]
    flags += ["--overlap", "0.25"]
    assert command(model, "photos/a.png", "--out", "out", *flags)[0] == 0
    ((output_stride, tta),) = settings
    assert (output_stride, tta.scales, tta.flip, tta.window) == (8, (0.5, 1.0), True, 65)
    assert tta.overlap == 0.25


def test_windows_for_large_images_are_reported(command, model, monkeypatch):
    monkeypatch.setattr(predictor, "LARGE_IMAGE", 41 * 57 - 1)
    monkeypatch.setattr(predictor, "DEFAULT_WINDOW", 129)
    _, out, _ = command(model, "photos/a.png", "photos/c.png", "--out", "out")
    assert "1 of more than" in out
    assert "windows of 129" in out
    _, out, _ = command(model, "photos/a.png", "--out", "out", "--window", "0")
    assert "windows of" not in out


def test_help_shows_examples(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "deeplab-jax predict runs/voc photo.jpg --out predicted" in out
