"""`deeplab-jax evaluate`, as a user runs it, but within this process."""

import json
import re

import cv2
import numpy as np
import pytest

from deeplab_jax import config
from deeplab_jax import data as data_lib
from deeplab_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ShapesConfig,
)
from deeplab_jax.data import labels
from deeplab_jax.evaluation import setup
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model
from random_modules import random_variables

NAMES = ("background", "disc", "triangle", "ring", "cross")
MEAN, STD = (0.2, 0.9, 0.4), (0.1, 0.2, 0.3)  # the checkpoint's, which the data's config is not
DATA = DataConfig(name="shapes", shapes=ShapesConfig(size=33, num_train=4, num_eval=6))


@pytest.fixture(scope="module")
def network():
    model = FunctionalModel(architecture("paper_resnet18", num_classes=5, width=0.125))
    return model, random_variables(model)


def write(path, network, names=NAMES):
    model, variables = network
    info = saved_model.describe(
        model.architecture,
        labels.named(*names),
        mean=MEAN,
        std=STD,
        resize="none",
        size=(33, 33),
    )
    return saved_model.write_model(path, variables, info)


@pytest.fixture(scope="module")
def run(network, tmp_path_factory):
    """A workdir with one checkpoint, of a run on more devices than there are."""
    workdir = tmp_path_factory.mktemp("run")
    write(workdir / "checkpoints" / "7", network)
    trained = Config(data=DATA, eval=EvalConfig(size=33), mesh=MeshConfig(data=64))
    (workdir / "config.json").write_text(config.to_json(trained))
    return workdir


def test_it_scores_what_inference_predicts(run, network, command, tmp_path):
    code, out, err = command(
        *("evaluate", run, "--protocol", "native", "--batch-size", 4, "--output-stride", 8),
        *("--boundary", "--bootstrap", 50, "--json", tmp_path / "a" / "scores.json"),
        *("--confusion", tmp_path / "confusion.png"),
    )
    assert code == 0, err
    got = json.loads((tmp_path / "a" / "scores.json").read_text())

    model, variables = network
    model = FunctionalModel(model.architecture.at_output_stride(8))
    inference = Predictor(model, variables, mean=MEAN, std=STD, tta=TestTimeAugmentation())
    dataset = data_lib.load(DATA, "val")
    expected = np.zeros((5, 5), np.int64)
    for index in range(6):
        example = dataset.source[index]
        valid = example["label"] != labels.IGNORE
        ids = inference.ids(example["image"])
        np.add.at(expected, (example["label"][valid], ids[valid]), 1)
    assert np.abs(got["confusion_matrix"] - expected).sum() <= 4  # even classes turn by rounding
    assert (np.array(got["confusion_matrix"]).sum(0) > 0).sum() >= 3

    matrix = np.array(got["confusion_matrix"])
    right, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    known = union > 0
    assert got["miou"] == np.mean(right[known] / union[known])
    for index, name in enumerate(NAMES):
        iou = right[index] / union[index] if union[index] else None
        assert got["per_class_iou"][name] == iou
    assert got["pixel_accuracy"] == right.sum() / matrix.sum()
    low, high = got["miou_interval"]
    assert low < got["miou"] < high
    assert 0 <= got["boundary_miou"] <= 1
    facts = {"images": 6, "protocol": "native", "output_stride": 8, "num_compilations": 1}
    assert got.items() >= facts.items()

    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "class"
    assert [line.split()[0] for line in lines[1:6]] == list(NAMES)
    assert lines[2].split()[1] == f"{100 * got['per_class_iou']['disc']:.2f}"
    summary = dict(line.split(maxsplit=1) for line in lines if line.startswith(("mIoU", "images")))
    assert summary["images"] == "6 of shapes, val"
    assert f"{100 * got['miou']:.2f}  ({100 * low:.2f} to {100 * high:.2f}" in summary["mIoU"]
    assert "1 program compiled" in out
    assert "positive" not in out
    assert "\x1b" not in out
    assert cv2.imread(str(tmp_path / "confusion.png")).shape[0] > 5 * 72


def test_only_json_goes_to_stdout(run, command):
    """By windows, over scales and mirror images, on some of the images."""
    code, out, err = command(
        *("evaluate", run, "--data", "shapes", "--window", 32, "--overlap", 0.25),
        *("--scales", "0.5,1", "--flip", "--limit", 2, "--json", "-"),
    )
    assert code == 0, err
    got = json.loads(out)
    facts = {"protocol": "native", "window": 32, "overlap": 0.25, "scales": [0.5, 1], "flip": True}
    assert got.items() >= (facts | {"images": 2}).items()
    source = data_lib.load(DATA, "val").source
    valid = sum(np.sum(source[index]["label"] != labels.IGNORE) for index in range(2))
    assert np.sum(got["confusion_matrix"]) == valid
    assert got["miou_interval"] is got["binary"] is None
    assert "0.5, 1, and mirrored" in err
    assert "positive" not in err


def test_a_folder_of_ones_own_through_a_config_file(network, command, tmp_path):
    """Classes that never occur or take everything are said."""
    for name in ("images", "masks"):
        (tmp_path / "data" / name / "val").mkdir(parents=True)
    for index, size in enumerate([(40, 50), (33, 60), (65, 20)]):
        cv2.imwrite(
            str(tmp_path / f"data/images/val/{index}.png"), np.full((*size, 3), 90, np.uint8)
        )
        mask = np.full(size, 9 if index else 1, np.uint8)
        mask[:5] = 0
        cv2.imwrite(str(tmp_path / f"data/masks/val/{index}.png"), mask)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(NAMES))
    (tmp_path / "mine.py").write_text(
        "from deeplab_jax.config import Config, DataConfig\n"
        "def get_config():\n"
        "    return Config(data=DataConfig(name='folder', root='nowhere', ignore_label=9))\n"
    )
    model, variables = network
    bias = {"classifier.logits.bias": np.float32([0, 0, 1000, 0, 0])}
    assert bias.keys() <= variables.params.keys()
    model_of_triangles = model, variables._replace(params=variables.params | bias)
    path = write(tmp_path / "model", model_of_triangles)
    code, out, err = command(
        *("evaluate", path, "--data", tmp_path / "mine.py", "--root", tmp_path / "data"),
        *("--size", 65, "--json", tmp_path / "scores.json"),
    )
    assert code == 0, err
    got = json.loads((tmp_path / "scores.json").read_text())
    assert np.sum(got["confusion_matrix"]) == 40 * 50 + 5 * 60 + 5 * 20
    assert got["per_class_iou"] == {"background": 0, "disc": 0, "triangle": 0} | dict.fromkeys(
        ("ring", "cross")
    )
    lines = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert lines[0].startswith("warning: 100.0 % of the pixels are predicted as triangle, which is")
    assert lines[1:] == [
        "warning: in no label of these images: triangle, ring, cross",
        "warning: never predicted, though labelled: background, disc",
    ]
    assert ["ring", "-", "-", "0.00", "0.00"] in [line.split() for line in out.splitlines()]


BAD = {
    "a protocol": (["--protocol", "nativ"], r"--protocol must be .*did you mean 'native'"),
    "a window of whole images": (
        ["--protocol", "paper", "--window", "64"],
        r"--window must be 0 under --protocol = paper",
    ),
    "a scale": (["--scales", "1,x"], r"--scales must be numbers such as 0.5,1,1.5, got '1,x'"),
    "scale 0": (["--scales", "0"], "--scales must be one or more numbers above 0"),
    "an output stride": (["--output-stride", "12"], r"--output-stride must be 8, 16 or 32"),
    "a batch of nothing": (["--batch-size", "0"], "--batch-size must be 1 or more"),
    "a data set": (["--data", "shape"], r"unknown data set 'shape' \(did you mean 'shapes'"),
    "a split": (["--split", "vall"], r"split of data set shapes must be .*did you mean 'val'"),
    "a config file": (["--data", "nowhere.py"], "there is no config file nowhere.py"),
    "a name of JSON": (["--json", "scores.txt"], "--json must be a file that ends in .json"),
    "a name of a picture": (["--confusion", "c.jpg"], "--confusion must be a file that ends in"),
    "a folder that is a file": (
        ["--json", "{run}/config.json/s.json"],
        "--json: .*: the folder .* cannot be written to",
    ),
    "a limit": (["--limit", "-1"], "--limit"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes_are_one_message(run, command, kind):
    options, message = BAD[kind]
    code, out, err = command("evaluate", run, *(option.format(run=run) for option in options))
    assert code == 2
    assert not out
    assert re.search(message, err), err
    assert "Traceback" not in err


def test_a_checkpoint_without_a_run_needs_the_data_option(network, command, tmp_path):
    path = write(tmp_path / "model", network)
    code, _, err = command("evaluate", path)
    assert code == 2
    assert "belongs to no run of train.py" in err
    assert "give --data" in err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("background", "triangle", "disc", "ring", "cross"), "the same names in another order"),
        (NAMES[:4], "checkpoint, 4: background, disc, triangle, ring\n  data set, 5: background"),
    ],
)
def test_other_classes_are_refused_with_both_lists(network, names, message):
    with pytest.raises(UserError, match=message):
        setup.check_compatible(labels.named(*names), 3, data_lib.load(DATA, "val"))


def test_different_class_names_are_reported():
    """It may be a matter of spelling."""
    model = labels.named("background", "disk", *NAMES[2:])
    assert setup.check_compatible(model, 3, data_lib.load(DATA, "val")) == [
        "class names differ: 1 is disk in the checkpoint, disc in the data"
    ]


def test_other_channels_are_refused_and_numbered_classes_pass():
    dataset = data_lib.load(DATA, "val")
    with pytest.raises(UserError, match=r"takes images of 4 channels.* have 3"):
        setup.check_compatible(dataset.labels, 4, dataset)
    numbered = labels.named(*(f"class {index}" for index in range(5)))
    assert setup.check_compatible(numbered, 3, dataset) == []
