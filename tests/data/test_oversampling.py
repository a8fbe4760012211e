"""Images of hard classes appear several times in an epoch, the others once."""

import collections

import jax
import numpy as np
import pytest

import tiny
from deeplab_jax.config import Config, DataConfig
from deeplab_jax.config.io import with_fields
from deeplab_jax.config.rules import validate
from deeplab_jax.data import labels, oversampling, pipeline
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.training import class_weights
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError

SIDE = 5
HARD = {1, 4, 6}  # images of the fixture that hold a chair or a sofa


class Numbered:
    """Images filled with their index; one pixel of each label is of a given class."""

    def __init__(self, *classes):
        self.classes = classes

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        label = np.zeros((SIDE, SIDE), np.uint8)
        label[2, 3] = self.classes[index]
        image = np.full((SIDE, SIDE, 3), index, np.uint8)
        return {"image": image, "label": label, "name": str(index)}


CHAIR, SOFA, CAT = (labels.VOC.names.index(name) for name in ("chair", "sofa", "cat"))


@pytest.fixture
def dataset():
    return Dataset(Numbered(0, CHAIR, CAT, 255, SOFA, 0, CHAIR), labels.VOC)


def config(**fields):
    fields = {"duplicate_classes": ("chair", "sofa"), "duplicates": 3} | fields
    plain = {"crop_size": (SIDE,), "scale_range": (1.0, 1.0), "flip": False, "num_workers": 0}
    return DataConfig(**plain | fields)


def shown(dataset, steps, *, settings=None, **kwargs):
    """Index of each image of the first batches."""
    settings = settings or config()
    kwargs = {"batch_size": 4, "seed": 5, "start_step": 0} | kwargs
    with pipeline.train_batches(dataset, settings, **kwargs) as batches:
        return np.concatenate([next(batches)["image"][:, 2, 2, 0] for _ in range(steps)])


def test_an_epoch_shows_hard_images_so_many_times_and_others_once(dataset):
    """7 images, of which 3 come thrice: epochs of 13, which batches of 13 lay bare."""
    duplicated = oversampling.apply(config(), dataset, quiet=True)
    epochs = shown(duplicated, 3, batch_size=13).reshape(3, 13)
    for epoch in epochs:
        times = collections.Counter(epoch.tolist())
        assert times == {index: 3 if index in HARD else 1 for index in range(7)}
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    assert len(duplicated.source) == 13


def test_each_time_is_augmented_by_itself(dataset):
    duplicated = oversampling.apply(config(duplicates=8), dataset, quiet=True)
    settings = config(scale_range=(0.5, 2.0), flip=True, crop_size=(9,))
    with pipeline.train_batches(
        duplicated, settings, batch_size=28, seed=0, start_step=0
    ) as batches:
        batch_labels = next(batches)["label"]
    sofas = [label.tobytes() for label in batch_labels if (label == SOFA).any()]
    assert len(sofas) == 8
    assert len(set(sofas)) > 4


def test_without_classes_the_split_is_unchanged_and_not_read():
    unreadable = Dataset(Numbered(*[99] * 3), labels.VOC)  # 99 is no class
    for settings in (config(duplicate_classes=()), config(duplicates=1)):
        assert oversampling.apply(settings, unreadable) is unreadable
    with pytest.raises(UserError, match="the label holds id 99"):
        oversampling.apply(config(), unreadable, quiet=True)


def test_the_number_of_duplicates_is_reported_unless_quiet(dataset, capfd):
    oversampling.apply(config(duplicate_classes=("sofa", "chair")), dataset)
    said = "oversampling: 3 of 7 images contain chair, sofa; they appear 3 times in an epoch of 13"
    assert said in capfd.readouterr().err
    oversampling.apply(config(), dataset, quiet=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("chair", "table"), r"no class 'table' \(did you mean 'diningtable'"),
        (("potted plant",), r"no class 'potted plant' \(did you mean 'pottedplant'"),
        (("chair,sopha",), r"no class 'sopha' \(did you mean 'sofa'"),
        (("zzz",), r"no class 'zzz'\. The classes are background, aeroplane"),
    ],
)
def test_an_unknown_class_is_named_with_the_nearest(dataset, classes, message):
    with pytest.raises(UserError, match=rf"config\.data\.duplicate_classes: .*{message}"):
        oversampling.apply(config(duplicate_classes=classes), dataset)


def parsed(text):
    """The field after a flag of the command line."""
    parsed = with_fields(Config(), {"data.duplicate_classes": text}, parse=True)
    validate(parsed)
    return parsed.data.duplicate_classes


@pytest.mark.parametrize(
    ("text", "ids"),
    [("sofa,chair", [9, 18]), ("chair", [9]), ("'sofa', 'chair'", [9, 18]), ("", []), ("()", [])],
)
def test_the_command_line_takes_names(text, ids):
    assert oversampling.class_ids(parsed(text), labels.VOC.names) == ids


def test_names_may_hold_blanks_and_commas():
    names = ("sky", "traffic light", "door, open")
    assert oversampling.class_ids(("door, open", "traffic light,sky"), names) == [0, 1, 2]


def test_wrong_settings_are_reported():
    with pytest.raises(UserError, match=r"config\.data\.duplicates must be 1 or more, got 0"):
        validate(Config(data=DataConfig(duplicates=0)))
    with pytest.raises(UserError, match=r"duplicate_classes must be names \(a,b,\.\.\.\), got \(3"):
        validate(Config(data=DataConfig(duplicate_classes=(3,))))


@pytest.mark.parametrize("process", [0, 1])
def test_a_run_trains_on_them_and_one_process_reports_it(tmp_path, capfd, monkeypatch, process):
    class Stop(Exception):
        pass

    def resolve(loss, dataset, *, quiet):
        assert len(dataset.source) > 24
        raise Stop

    monkeypatch.setattr(class_weights, "resolve", resolve)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    settings = tiny.get_config()
    settings.data.duplicate_classes = ("disc",)
    with pytest.raises(Stop):
        train(settings, tmp_path)
    said = "of 24 images contain disc; they appear 2 times in an epoch of"
    assert (said in capfd.readouterr().err) == (process == 0)
