"""A class against the rest: `evaluate` and `predict` with --positive, --threshold and --curves."""

import functools
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

import deeplab_jax
from deeplab_jax import config
from deeplab_jax.config import Config, DataConfig
from deeplab_jax.data import labels
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.weights import saved_model
from random_modules import random_variables

SIZES = [(40, 50), (65, 33), (50, 61)]


def write_data(root, names, mask_of):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind / "val").mkdir(parents=True)
    for index, size in enumerate(SIZES):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f"images/val/{index}.png"), pixels)
        mask = mask_of(cv2.resize(pixels, size[::-1])[..., 1] // 100)  # 0 to 2
        mask[:4] = 255
        cv2.imwrite(str(root / f"masks/val/{index}.png"), mask)
    (root / "classes.txt").write_text("\n".join(names))


def write_run(folder, names, mask_of):
    """A run with a random model whose probabilities are spread, and its data."""
    write_data(folder / "data", names, mask_of)
    arch = architecture("paper_resnet18", num_classes=len(names), width=0.125)
    variables = random_variables(FunctionalModel(arch), seed=5 - len(names))
    # With this seed, and logits near each other, each class wins somewhere.
    for name in ("classifier.logits.kernel", "classifier.logits.bias"):
        variables.params[name] = np.asarray(0.05 * variables.params[name])
    info = saved_model.describe(
        arch, labels.named(*names), mean=(0.5,) * 3, std=(0.2,) * 3, resize="none", size=(33, 33)
    )
    saved_model.write_model(folder / "run" / "checkpoints" / "1", variables, info)
    trained = Config(data=DataConfig(name="folder", root=str(folder / "data")))
    (folder / "run" / "config.json").write_text(config.to_json(trained))
    return folder


@pytest.fixture(scope="module")
def cracks(tmp_path_factory):
    names = ("background", "crack")
    return write_run(tmp_path_factory.mktemp("cracks"), names, lambda x: np.minimum(x, 1))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("three"), ("road", "car", "tree"), lambda x: x)


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


@functools.cache
def probabilities(folder):
    """Returns the probabilities of each image by `Segmenter.probabilities`."""
    loaded, images = deeplab_jax.load(folder / "run"), folder / "data/images/val"
    return [loaded.probabilities(images / f"{index}.png") for index in range(len(SIZES))]


def scored(folder, class_id):
    """Returns the labels and probabilities of all pixels that are not ignored."""
    true, scores = [], []
    for index, probability in enumerate(probabilities(folder)):
        mask = pixels_of(folder / f"data/masks/val/{index}.png")
        true.append(mask[mask != 255] == class_id)
        scores.append(probability[..., class_id][mask != 255])
    return np.concatenate(true), np.concatenate(scores)


def predicted_matrix(folder, out, num_classes):
    matrix = np.zeros((num_classes, num_classes), int)
    for index in range(len(SIZES)):
        mask = pixels_of(folder / f"data/masks/val/{index}.png")
        ids = pixels_of(out / f"{index}_ids.png")
        np.add.at(matrix, (mask[mask != 255], ids[mask != 255]), 1)
    return matrix


def check_numbers(binary, matrix, true, scores, class_id):
    right = matrix[class_id][class_id]
    precision, recall = right / sum(row[class_id] for row in matrix), right / sum(matrix[class_id])
    assert binary["precision"] == pytest.approx(precision)
    assert binary["recall"] == pytest.approx(recall)
    assert binary["f1"] == pytest.approx(2 / (1 / precision + 1 / recall))
    assert binary["iou"] == pytest.approx(1 / (1 / precision + 1 / recall - 1))
    assert binary["auroc"] == pytest.approx(metrics.roc_auc_score(true, scores), abs=1e-5)
    average = metrics.average_precision_score(true, scores)
    assert binary["average_precision"] == pytest.approx(average, abs=1e-5)
    assert binary["auroc_error"] == binary["average_precision_error"] == 0
    assert (binary["positive_pixels"], binary["negative_pixels"]) == (sum(true), sum(~true))
    best = metrics.f1_score(true, scores >= binary["best_threshold"])
    assert binary["best_f1"] == pytest.approx(best, abs=1e-3)
    assert binary["best_f1"] >= binary["f1"]


def test_two_classes_need_no_option(cracks, command, tmp_path):
    plots = [tmp_path / "new" / f"curves.{suffix}" for suffix in ("svg", "png")]
    arguments = ("--json", tmp_path / "scores.json", "--curves", plots[0])
    code, out, err = command("evaluate", cracks / "run", *arguments)
    assert code == 0, err
    assert "<svg" in plots[0].read_text()
    got = json.loads((tmp_path / "scores.json").read_text())
    true, scores = scored(cracks, 1)
    assert 0.02 < np.mean(scores > 0.5) < 0.98
    check_numbers(got["binary"], got["confusion_matrix"], true, scores, 1)
    assert (got["binary"]["positive"], got["binary"]["threshold"]) == ("crack", None)
    lines = {line[:24].strip(): line[24:] for line in out.splitlines()}
    assert lines["positive class"] == f"crack, {100 * true.mean():.2f} % of the pixels"
    assert lines["F1 (Dice) %"] == f"{100 * got['binary']['f1']:.2f}"
    assert lines["AUROC"] == f"{got['binary']['auroc']:.5f}  (exact)"
    threshold = lines["best F1 %"].split("--threshold ")[1]
    assert np.float32(threshold) == np.float32(got["binary"]["best_threshold"])
    assert len(threshold) <= 13

    arguments = ("--threshold", threshold, "--json", "-", "--curves", plots[1])
    code, out, err = command("evaluate", cracks / "run", *arguments)
    assert code == 0, err
    again = json.loads(out)["binary"]
    assert again["f1"] == pytest.approx(got["binary"]["best_f1"], abs=1e-3)
    assert (pixels_of(plots[1]) == (0, 114, 178)).all(-1).sum() > 500  # the lines' blue


@pytest.mark.parametrize("options", [[], ["--window", 33], ["--scales", "0.5,1", "--flip"]])
@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_evaluate_scores_what_predict_draws(cracks, command, tmp_path, threshold, options):
    options = ["--threshold", threshold, *options]
    images, out = cracks / "data/images/val", tmp_path / "out"
    code, said, err = command("predict", cracks / "run", images, "--out", out, *options)
    assert code == 0, err
    assert f"crack: from probability {threshold} on" in said
    code, said, err = command("evaluate", cracks / "run", "--json", "-", *options)
    assert code == 0, err
    got = json.loads(said)
    expected = predicted_matrix(cracks, out, 2)
    np.testing.assert_array_equal(got["confusion_matrix"], expected)
    assert got["binary"]["recall"] == pytest.approx(expected[1, 1] / expected[1].sum())
    assert got["binary"]["threshold"] == threshold
    assert f"from probability {threshold} on" in err


def test_one_class_of_three_against_the_rest(three, command, tmp_path):
    options, images = ["--positive", "car", "--threshold", 0.15], three / "data/images/val"
    out, areas = tmp_path / "out", tmp_path / "areas.json"
    arguments = ("--out", out, "--json", areas, "--heatmap", "car")
    code, _, err = command("predict", three / "run", images, *arguments, *options)
    assert code == 0, err
    report = json.loads(areas.read_text())
    assert (report["positive"], report["threshold"]) == ("car", 0.15)
    for index, probability in enumerate(probabilities(three)):
        others = np.where(probability[..., 2] > probability[..., 0], 2, 0)
        expected = np.where(probability[..., 1] >= 0.15, 1, others)
        np.testing.assert_array_equal(pixels_of(out / f"{index}_ids.png"), expected)
    code, said, err = command("evaluate", three / "run", "--json", "-", *options)
    assert code == 0, err
    got = json.loads(said)
    matrix = predicted_matrix(three, out, 3)
    assert np.abs(got["confusion_matrix"] - matrix).sum() <= 4  # even classes turn by rounding
    check_numbers(got["binary"], got["confusion_matrix"], *scored(three, 1), 1)


def test_curves(three, command, tmp_path):
    arguments = ("--positive", "2", "--curves", tmp_path / "curves.json")
    code, _, err = command("evaluate", three / "run", *arguments)
    assert code == 0, err
    got = json.loads((tmp_path / "curves.json").read_text())
    assert (got["positive"], got["split"]) == ("tree", "val")
    points = {name: np.array(values) for name, values in got["points"].items()}
    true, scores = scored(three, 2)
    for index in range(0, len(points["threshold"]), 50):
        predicted = scores >= points["threshold"][index]
        assert points["recall"][index] == pytest.approx(predicted[true].mean(), abs=2e-3)
        rate = predicted[~true].mean()
        assert points["false_positive_rate"][index] == pytest.approx(rate, abs=2e-3)
    area = np.trapezoid(points["recall"], points["false_positive_rate"])
    assert area == pytest.approx(got["auroc"], abs=2e-3)


def test_a_split_without_positive_pixels(cracks, command, tmp_path):
    write_data(tmp_path / "data", ("background", "crack"), np.zeros_like)
    for index, size in enumerate(SIZES):
        cv2.imwrite(str(tmp_path / f"data/masks/val/{index}.png"), np.zeros(size, np.uint8))
    curves = tmp_path / "curves.png"
    arguments = ("--root", tmp_path / "data", "--json", "-", "--curves", curves)
    code, out, err = command("evaluate", cracks / "run", *arguments)
    assert code == 0, err
    binary = json.loads(out)["binary"]
    undefined = ("recall", "auroc", "average_precision", "best_f1", "best_threshold")
    assert [binary[name] for name in undefined] == [None] * 5
    assert binary["precision"] == binary["positive_pixels"] == 0
    assert "AUROC, average precision and the ROC curve are undefined: no pixel" in err
    assert curves.exists()


BAD = {
    "above 1": ("cracks", ["--threshold", "35"], "0 to 1, got 35; 35 % is --threshold 0.35"),
    "below 0": ("cracks", ["--threshold", "-0.5"], "--threshold must be a probability, 0 to 1"),
    "no number": ("cracks", ["--threshold", "half"], "Invalid value"),
    "three classes": ("three", ["--threshold", "0.5"], "needs --positive CLASS"),
    "a class": ("three", ["--positive", "tre", "--threshold", "0.5"], "did you mean 'tree'"),
}


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
@pytest.mark.parametrize("kind", BAD)
def test_mistakes_are_one_message(request, command, tmp_path, verb, kind):
    name, options, message = BAD[kind]
    folder = request.getfixturevalue(name)
    images = [] if verb == "evaluate" else [folder / "data/images/val", "--out", tmp_path / "out"]
    code, out, err = command(verb, folder / "run", *images, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_options_that_need_another(three, command, tmp_path):
    code, _, err = command("evaluate", three / "run", "--curves", tmp_path / "c.png")
    assert code == 2
    assert "--curves needs --positive CLASS" in err
    code, _, err = command("evaluate", three / "run", "--curves", tmp_path / "c.jpg")
    assert code == 2
    assert "--curves must be a file that ends in .png or .svg or .pdf or .json" in err
    same = tmp_path / "c.json"
    code, _, err = command("evaluate", three / "run", "--curves", same, "--json", same)
    assert code == 2
    assert "--curves needs a file of its own" in err
    arguments = (three / "data/images/val", "--out", tmp_path / "out", "--positive", "car")
    code, _, err = command("predict", three / "run", *arguments)
    assert code == 2
    assert "--positive needs --threshold" in err
