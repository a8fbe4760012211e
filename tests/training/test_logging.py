"""metrics.jsonl and pictures."""

import json
import re
import sys
import types

import cv2
import numpy as np
import pytest

import tiny
from conftest import ROOT
from deeplab_jax.config import LOGGERS, Config, TrainConfig
from deeplab_jax.config.rules import validate
from deeplab_jax.data.labels import named
from deeplab_jax.evaluation.evaluator import Evaluation
from deeplab_jax.training.logging import MetricWriter
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("shared_steps")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scalars_are_lines_and_nan_is_null(tmp_path):
    with MetricWriter(tmp_path, Config(), 0, enabled=True) as writer:
        writer.write_scalars(1, {"loss": 2.5, "eval/iou/cat": float("nan")})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "eval/iou/cat": None}]
    assert any((tmp_path / "tensorboard").iterdir())


def test_resuming_from_a_step_drops_later_lines(tmp_path):
    with MetricWriter(tmp_path, Config(), 0, enabled=True) as writer:
        for step in range(1, 6):
            writer.write_scalars(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    with MetricWriter(tmp_path, Config(), 3, enabled=True) as writer:
        writer.write_scalars(4, {"loss": 40.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_pictures_are_rgb_and_no_temporary_files_remain(tmp_path):
    image = np.zeros((4, 5, 3), np.uint8)
    image[..., 0] = 200
    with MetricWriter(tmp_path, Config(), 0, enabled=True) as writer:
        path = writer.write_image(12, "predictions", image)
    assert path == tmp_path / "pictures" / "predictions_000012.png"
    np.testing.assert_array_equal(cv2.imread(str(path))[0, 0], [0, 0, 200])
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_only_one_process_writes(tmp_path):
    with MetricWriter(tmp_path, Config(), 0, enabled=False) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        assert writer.write_image(1, "predictions", np.zeros((1, 1, 3), np.uint8)) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "matrix", "expected"),
    [
        (("background", "crack"), [[5, 1], [2, 3]], {"precision": 3 / 4, "recall": 3 / 5}),
        (("crack", "bg"), [[3, 2], [1, 5]], {"precision": 3 / 4, "recall": 3 / 5}),
        (("background", "crack"), [[5, 0], [0, 0]], {"precision": None, "recall": None}),
        (("a", "b", "c"), np.eye(3), None),
    ],
)
def test_two_classes_have_precision_recall_and_f1(tmp_path, names, matrix, expected):
    evaluation = Evaluation(np.asarray(matrix, np.int64), 1, named(*names), [], None, None)
    with MetricWriter(tmp_path, Config(), 0, enabled=True) as writer:
        writer.write_evaluation(7, evaluation)
    (line,) = lines(tmp_path)
    if expected is None:
        assert not {"eval/precision", "eval/recall", "eval/f1"} & set(line)
    else:
        precision, recall = line["eval/precision"], line["eval/recall"]
        assert {"precision": precision, "recall": recall} == expected
        f1 = 2 * precision * recall / (precision + recall) if precision else None
        assert line["eval/f1"] == pytest.approx(f1)


class WandbStandIn(types.ModuleType):
    """What the adapter in docs/logging.md calls of Weights & Biases."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def Image(self, image):
        return image

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    stand_in = WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "logging.md").read_text(), re.S)[1]
    before = dict(LOGGERS)
    exec(code, {"__name__": "wandb_logger"})
    yield stand_in
    LOGGERS.clear()
    LOGGERS.update(before)


def short_run(*loggers):
    config = tiny.get_config()
    config.train = TrainConfig(
        steps=2, batch_size=8, log_every=1, eval_every=2, save_every=0, loggers=loggers
    )
    return config


def test_the_documented_adapter_logs_a_run(wandb, tmp_path):
    train(short_run("wandb"), tmp_path)
    (started,) = wandb.started
    assert started["config"]["train.steps"] == 2
    assert started["dir"] == tmp_path
    scalars = [(step, values) for step, values in wandb.logged if "predictions" not in values]
    assert [{"step": step} | values for step, values in scalars] == [
        {k: v for k, v in line.items() if v is not None} for line in lines(tmp_path)
    ]
    (picture,) = [values["predictions"] for _, values in wandb.logged if "predictions" in values]
    saved = cv2.imread(str(tmp_path / "pictures" / "predictions_000002.png"))
    np.testing.assert_array_equal(picture, saved[..., ::-1])
    assert wandb.finished == 1
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("method", ["init", "log"])
def test_a_logger_that_is_offline_is_left_out_with_one_warning(wandb, tmp_path, capfd, method):
    def offline(*_, **__):
        raise ConnectionError("no route to host")

    setattr(wandb, method, offline)
    assert train(short_run("wandb", "tensorboard"), tmp_path).step == 2
    assert capfd.readouterr().err.count("logger 'wandb' failed (ConnectionError: no route") == 1
    assert any((tmp_path / "tensorboard").iterdir())
    assert len(lines(tmp_path)) == 3


def test_a_run_resumes_with_other_loggers(tmp_path):
    config = short_run()
    assert train(config, tmp_path).step == 2
    config.train.loggers = ("tensorboard",)
    assert train(config, tmp_path).step == 2


def test_an_unknown_logger_names_the_nearest():
    with pytest.raises(UserError, match=r"train\.loggers.*tensorboard"):
        validate(Config(train=TrainConfig(loggers=("tensorbord",))))
