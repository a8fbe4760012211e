"""`evaluate`, `predict` and `load` without options do what the run did at its own evaluations."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import deeplab_jax
import small_checkpoint
import tiny
from deeplab_jax.config import Config, DataConfig, EvalConfig, resolve_eval, to_json
from deeplab_jax.evaluation.setup import eval_config
from deeplab_jax.inference import predictor
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError

SIZES = ((40, 70), (30, 33), (65, 40), (33, 90), (50, 50))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of noise in patches, and masks of three classes in which some pixels are ignored."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, sizes in {"train": SIZES[:2], "val": SIZES}.items():
        for index, (height, width) in enumerate(sizes):
            patches = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            mask = rng.choice([0, 1, 2, 255], patches.shape[:2]).astype(np.uint8)
            for kind, array in (("images", patches), ("masks", mask)):
                path = root / kind / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = array.repeat(8, 0).repeat(8, 1)[:height, :width]
                Image.fromarray(pixels).save(path)
    (root / "classes.txt").write_text("background\nred fox\nbluebird\n")
    small_checkpoint.write(root / "model")
    return root


def train_run(data, workdir, **settings):
    """Trains one step, which hardly changes the weights; returns the workdir."""
    config = tiny.get_config()
    config.data = dataclasses.replace(
        config.data, name="folder", root=str(data), mean=small_checkpoint.MEAN
    )
    config.init.path = str(data / "model")
    config.optimizer.learning_rate = 1e-6
    config.train = dataclasses.replace(config.train, steps=1, batch_size=2, freeze_bn=True)
    config.eval = dataclasses.replace(config.eval, **settings)
    train(config, workdir)
    return workdir


def logged_miou(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["eval/miou"] for line in lines if "eval/miou" in line][-1]


def matrix_of_predictions(data, folder):
    """Counts pixels by true and predicted class, of the masks and of the files of `predict`."""
    matrix = np.zeros((3, 3), int)
    for index in range(len(SIZES)):
        mask = np.asarray(Image.open(data / f"masks/val/{index}.png"))
        ids = np.asarray(Image.open(folder / f"{index}_ids.png"))
        np.add.at(matrix, (mask[mask != 255], ids[mask != 255]), 1)
    return matrix


EVERYTHING = {"scales": (0.5, 1.0), "flip": True, "window": 33, "overlap": 0.25}


@pytest.mark.usefixtures("shared_steps")
@pytest.mark.parametrize(
    ("settings", "large"),
    [
        ({}, None),
        ({"scales": (0.75, 1.25), "flip": True, "output_stride": 8}, None),
        (EVERYTHING, None),
        ({"overlap": 0.25}, 40 * 50),  # images of more pixels are cut into windows by default
    ],
    ids=str,
)
def test_training_evaluate_and_predict_agree(data, tmp_path, command, monkeypatch, settings, large):
    if large:
        monkeypatch.setattr(predictor, "LARGE_IMAGE", large)
        monkeypatch.setattr(predictor, "DEFAULT_WINDOW", 33)
    run = train_run(data, tmp_path / "run", **settings)
    code, _, err = command("evaluate", run, "--json", tmp_path / "scores.json")
    assert code == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["miou"] == logged_miou(run)
    assert scores["protocol"] == "native"

    code, out, err = command("predict", run, data / "images" / "val", "--out", tmp_path / "out")
    assert code == 0, err
    matrix = matrix_of_predictions(data, tmp_path / "out")
    assert (matrix.sum(0) > 50).sum() >= 2  # of the classes, predicted
    np.testing.assert_array_equal(scores["confusion_matrix"], matrix)
    if settings == EVERYTHING:
        assert "output stride 16, scales 0.5, 1, and mirrored, windows of 33 pixels, over" in out
        by_hand = deeplab_jax.load(run).predict(data / "images" / "val" / "0.png")
        np.testing.assert_array_equal(by_hand, Image.open(tmp_path / "out" / "0_ids.png"))
    assert ("4 of more than" in out) == (large is not None)


@pytest.fixture
def run(data, tmp_path):
    """A workdir that looks like that of a run which was evaluated in many ways."""
    config = Config(data=DataConfig(name="folder", root=str(data)), eval=EvalConfig(**EVERYTHING))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    shutil.copytree(data / "model", tmp_path / "run" / "checkpoints" / "7")
    return tmp_path / "run"


OFF = ["--no-flip", "--scales", "1", "--window", "0"]


def test_options_override_one_by_one_and_switch_off(data, run, command, tmp_path):
    def evaluate(*options):
        code, out, err = command("evaluate", run, *options, "--json", tmp_path / "scores.json")
        assert code == 0, err
        scores = json.loads((tmp_path / "scores.json").read_text())
        names = ("protocol", "scales", "flip", "window", "overlap", "output_stride")
        return tuple(scores[name] for name in names), scores["confusion_matrix"], out

    facts, _, out = evaluate("--flip", "--overlap", "0.5", "--limit", "1")
    assert facts == ("native", [0.5, 1], True, 33, 0.5, 16)
    assert "33 pixels, overlap 0.5" in out
    facts, _, _ = evaluate("--scales", "1", "--no-flip", "--limit", "1")
    assert facts == ("native", [1], False, 33, 0.25, 16)
    facts, matrix, _ = evaluate(*OFF, "--output-stride", "8")
    assert facts == ("native", [1], False, 0, None, 8)
    options = [*OFF, "--output-stride", "8", "--out", tmp_path / "out"]
    code, out, err = command("predict", run, data / "images" / "val", *options)
    assert code == 0, err
    assert "output stride 8, scales 1\n" in out
    np.testing.assert_array_equal(matrix, matrix_of_predictions(data, tmp_path / "out"))


def test_where_a_model_belongs_to_a_run_its_settings_hold(data, run, tmp_path, monkeypatch):
    expected = predictor.TestTimeAugmentation((0.5, 1.0), True, 33, 0.25)
    (tmp_path / "link").symlink_to(run / "checkpoints" / "7")
    for path in (run, run / "checkpoints", run / "checkpoints" / "7", tmp_path / "link"):
        assert deeplab_jax.load(path).tta == expected
    # A model that merely lies in a workdir, or a checkpoint outside of one, has the defaults.
    shutil.copytree(data / "model", run / "converted")
    monkeypatch.chdir(run)
    for path in ("converted", data / "model"):
        assert deeplab_jax.load(path).tta == predictor.TestTimeAugmentation()
    given = deeplab_jax.load(run, scales=(1.0,), flip=False, window=0).tta
    assert given == predictor.TestTimeAugmentation((1.0,), False, 0, 0.25)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as a config"):
        deeplab_jax.load(run)


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({}, None),
        ({"protocol": "paper", "window": 0}, None),  # whole images belong to that protocol
        ({"protocol": "native", "window": 0}, 0),
        ({"protocol": "torchvision", "window": 65}, 65),
    ],
)
def test_prediction_takes_windows_and_no_padding_from_the_protocol(data, run, settings, window):
    (run / "config.json").write_text(to_json(Config(eval=EvalConfig(**settings))))
    assert deeplab_jax.load(run).tta.window == window


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("voc", {}, ("paper", 0)),
        ("shapes", {"window": 0}, ("paper", 0)),
        ("voc", {"window": 65}, ("native", 65)),
        ("folder", {}, ("native", None)),
        ("folder", {"window": 0}, ("native", 0)),
        ("folder", {"protocol": "paper"}, ("paper", 0)),
        ("folder", {"protocol": "torchvision"}, ("torchvision", 0)),
        ("voc", {"protocol": "native"}, ("native", None)),
    ],
)
def test_the_protocol_follows_from_the_data_and_the_window(name, fields, expected):
    settings = resolve_eval(Config(data=DataConfig(name=name), eval=EvalConfig(**fields)))
    assert (settings.protocol, settings.window) == expected


@pytest.mark.parametrize(
    ("of_run", "options", "expected"),
    [
        ({"protocol": "paper", "window": 0}, {"window": 65}, ("native", 65)),
        ({"window": 65}, {"protocol": "paper"}, ("paper", 0)),
        ({"window": 65}, {"protocol": "torchvision"}, ("torchvision", 65)),
        ({"window": 65}, {"window": 0}, ("paper", 0)),
        ({"protocol": "native"}, {}, ("native", None)),
    ],
)
def test_a_window_and_the_papers_protocol_replace_each_other(run, of_run, options, expected):
    config = Config(eval=EvalConfig(batch_size=3, **of_run))
    (run / "config.json").write_text(to_json(config))
    config.eval = eval_config(str(run), Config(), options)
    settings = resolve_eval(config)
    assert (settings.protocol, settings.window) == expected
    assert (settings.batch_size, settings.num_pictures) == (3, 0)
