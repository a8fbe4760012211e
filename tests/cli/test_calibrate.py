"""`deeplab-jax calibrate`, and the calibration in `predict` and `evaluate`."""

import dataclasses
import json
import math

import cv2
import numpy as np
import pytest
from PIL import Image

import deeplab_jax as dl
import small_checkpoint
from deeplab_jax import config
from deeplab_jax import data as data_lib
from deeplab_jax.config import Config, DataConfig, EvalConfig, ShapesConfig
from deeplab_jax.data.labels import named
from deeplab_jax.inference.calibration import Calibration
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model
from random_modules import random_variables

NAMES = ("background", "disc", "triangle", "ring", "cross")
DATA = DataConfig(name="shapes", shapes=ShapesConfig(size=33, num_train=6, num_eval=40))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose model was not trained, and is sometimes right nevertheless."""
    workdir = tmp_path_factory.mktemp("run")
    model = FunctionalModel(architecture("paper_resnet18", num_classes=5, width=0.125))
    variables = random_variables(model)
    # Few pixels are certain, and most are background, as in the labels.
    kernel, bias = "classifier.logits.kernel", "classifier.logits.bias"
    changed = {kernel: 0.05 * variables.params[kernel], bias: np.float32([2, 0, 0, 0, 0])}
    params = variables.params | changed
    info = saved_model.describe(
        model.architecture,
        named(*NAMES),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        resize="none",
        size=(33, 33),
    )
    saved_model.write_model(workdir / "checkpoints" / "7", variables._replace(params=params), info)
    trained = Config(data=DATA, eval=EvalConfig(size=33))
    (workdir / "config.json").write_text(config.to_json(trained))
    return workdir


@pytest.fixture
def file(run):
    """Of the calibration beside the checkpoint, which a test may write."""
    path = run / "checkpoints" / "7" / "calibration.json"
    yield path
    path.unlink(missing_ok=True)


def test_it_is_kept_in_the_checkpoint_and_predict_and_evaluate_use_it(run, command, file, tmp_path):
    report, plot = tmp_path / "new" / "report.json", tmp_path / "reliability.png"
    code, out, err = command("calibrate", run, "--risk", 0.2, "--json", report, "--plot", plot)
    assert code == 0, err
    assert err == "warning: more than half of the pixels are unsure: a higher --risk leaves fewer\n"
    kept = json.loads(file.read_text())
    assert kept.items() <= json.loads(report.read_text()).items()
    assert kept["risk"] == 0.2
    assert kept["report"]["images"] == 40
    assert kept["report"]["split"] == "val"
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line.strip())
    assert lines["before"].split()[0] == f"{kept['report']['before']['ece']:.5f}"
    assert "on average at most 20 % of the pixels of an image are wrong" in lines["promise"]
    assert cv2.imread(str(plot)).shape[0] > 500
    segmenter = dl.load(run)  # which a resumed run could read too: the checkpoint has one file more
    threshold = segmenter.calibration.threshold
    assert threshold == kept["threshold"]

    dataset = data_lib.load(DATA, "val")
    sure = wrong = total = 0
    for index in range(40):
        example = dataset.source[index]
        probabilities = segmenter.probabilities(example["image"]).astype(np.float64)
        ids = probabilities.argmax(-1)
        powers = probabilities ** (1 / np.array(kept["temperatures"])[ids][..., None])
        is_sure = (powers / powers.sum(-1, keepdims=True)).max(-1) >= threshold
        valid = example["label"] != 255
        total += valid.sum()
        sure += (is_sure & valid).sum()
        wrong += (is_sure & valid & (ids != example["label"])).sum()
        if index == 3:
            Image.fromarray(example["image"]).save(tmp_path / "photo.png")
            expected = ~is_sure
    assert 0 < sure < total

    scores = tmp_path / "scores.json"
    code, out, err = command("evaluate", run, "--unsure", "--json", scores)
    assert code == 0, err
    found = json.loads(scores.read_text())["unsure"]
    assert found["coverage"] == pytest.approx(sure / total, abs=2e-4)
    assert found["wrong_of_sure"] == pytest.approx(wrong / sure, abs=1e-3)
    assert found["stated_risk"] == 0.2
    assert found["points"][-1]["coverage"] == 1
    assert f"unsure                  {100 * (1 - found['coverage']):.2f} % of the pixels" in out

    areas = tmp_path / "areas.json"
    arguments = ("--out", tmp_path / "out", "--unsure", "--side-by-side", "--json", areas)
    code, out, err = command("predict", run, tmp_path / "photo.png", *arguments)
    assert code == 0, err
    mask = np.asarray(Image.open(tmp_path / "out" / "photo_unsure.png").convert("L"))
    assert set(np.unique(mask)) <= {0, 255}
    assert ((mask == 255) != expected).mean() < 0.005  # rounding
    (entry,) = json.loads(areas.read_text())["images"]
    assert entry["unsure"]["pixels"] == (mask == 255).sum() > 0
    assert entry["unsure"]["share"] == (mask == 255).mean()
    assert entry["files"]["unsure"].endswith("photo_unsure.png")
    assert "hatched" in out
    ids = np.asarray(Image.open(tmp_path / "out" / "photo_ids.png"))
    np.testing.assert_array_equal(ids, segmenter.predict(tmp_path / "photo.png"))
    # Its pictures are not images to segment the next time.
    code, out, _ = command("predict", run, tmp_path / "out", "--out", tmp_path / "out")
    assert code == 2


def test_a_model_in_a_file_has_its_calibration_in_another(run, command, tmp_path):
    small_checkpoint.write(tmp_path / "fox")
    dl.convert(run, tmp_path / "model.pth")
    classes = tmp_path / "model.calibration.json"
    code, _, err = command("calibrate", tmp_path / "model.pth", "--data", "shapes")
    assert code == 2
    assert "give --out FILE.json, and later predict --calibration FILE.json" in err
    code, _, err = command("calibrate", run, "--risk", 0.3, "--of", "disc", "--out", classes)
    assert code == 0, err
    assert dl.load(run).calibration is None
    found = dl.load(run, calibration=classes).calibration
    assert (found.of, found.risk) == (1, 0.3)
    image = np.zeros((9, 9, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    arguments = (tmp_path / "photo.png", "--out", tmp_path / "out", "--unsure")
    code, out, err = command("predict", run, *arguments, "--calibration", classes, "--flip")
    assert code == 0, err
    assert "unsure where the calibrated probability of disc is above" in out
    assert "the calibration was made with flip False, now True: its risk may not hold" in err
    for options, message in {
        (run, *arguments): "has no calibration: run deeplab-jax calibrate",
        (tmp_path / "fox", *arguments, "--calibration", classes): "the calibration of another mod",
    }.items():
        code, _, err = command("predict", *options)
        assert code == 2
        assert message in err


def test_the_split_of_the_training_is_warned_about(run, command, tmp_path):
    out = tmp_path / "calibration.json"
    code, _, err = command("calibrate", run, "--split", "train", "--risk", 0.3, "--out", out)
    assert code == 0
    assert "warning: the model was trained on the split train" in err


BAD = {
    "a risk in percent": (
        ["--risk", "5"],
        "--risk must be above 0 and below 1, got 5: 0.05 is 5 %",
    ),
    "few images": (["--risk", "0.01"], "20 images are too few for --risk 0.01: 99 are needed"),
    "one image": (["--limit", "1"], "0 images are too few for --risk 0.05: 19 are needed"),
    "a class": (["--of", "disk"], r"--of: there is no class 'disk' (did you mean 'disc'?)"),
    "a picture": (["--plot", "x.jpg"], "--plot must be a file that ends in"),
    "a file": (["--out", "x.txt"], "--out must be a file that ends in .json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes_are_one_message(run, command, kind):
    options, message = BAD[kind]
    code, out, err = command("calibrate", run, *options)
    assert code == 2
    assert not out
    assert message in err, err
    assert "Traceback" not in err


BAD_VALUES = (
    {"risk": math.nan},
    {"temperatures": [1, 1, 1, 1, math.inf]},
    {"threshold": 3.0},
    {"of": "disc"},
)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9}', *BAD_VALUES])
def test_a_damaged_calibration_is_an_error_where_it_is_used(run, file, text):
    if isinstance(text, dict):
        good = Calibration(1, NAMES, {}, 1.0, (1.0,) * 5, 0.5, 0.1, None, {})
        text = json.dumps(dataclasses.asdict(good) | text)
    file.write_text(text)
    message = r"calibration\.json cannot be read as a calibration"
    segmenter = dl.load(run)
    segmenter.predict(np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(UserError, match=message):
        _ = segmenter.calibration
    with pytest.raises(UserError, match=message):
        dl.load(run, calibration=file)


def test_a_damaged_calibration_is_replaced(run, command, file):
    file.write_text("{")
    code, _, err = command("calibrate", run, "--risk", 0.3)
    assert code == 0, err
    assert dl.load(run).calibration.risk == 0.3


def test_a_threshold_of_a_class_and_a_video_have_no_unsure_pixels(run, command, tmp_path):
    for arguments in (
        ("predict", run, "x.png", "--out", tmp_path, "--positive", "disc"),
        ("evaluate", run, "--positive", "disc"),
    ):
        code, _, err = command(*arguments, "--threshold", 0.5, "--unsure")
        assert code == 2
        assert "--unsure is about the most probable class: leave --threshold out" in err
    for arguments in (("predict", run, "x.png", "--out", tmp_path), ("evaluate", run)):
        code, _, err = command(*arguments, "--calibration", "x.json")
        assert code == 2
        assert "--calibration is for --unsure" in err
