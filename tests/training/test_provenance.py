"""Runs that resume with other versions or images than their checkpoints."""

import json
import shutil
from unittest import mock

import cv2
import numpy as np
import pytest

import tiny
from deeplab_jax import data as data_lib
from deeplab_jax.config import SecondStageConfig
from deeplab_jax.data import pipeline
from deeplab_jax.training import provenance as versions
from deeplab_jax.training.provenance import provenance
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model

pytestmark = pytest.mark.usefixtures("shared_steps")
HEADLINE = "the run resumes with other versions or images than those of checkpoint"


@pytest.fixture(scope="module", autouse=True)
def unedited():
    """The source files count as unchanged, even if one is edited while the tests run."""
    with mock.patch.object(versions, "source_digest", return_value="unedited"):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train(tiny.short_config(), workdir)
    return workdir


@pytest.fixture
def killed(finished, tmp_path):
    """A workdir as of a run that was killed after step 2."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    return tmp_path / "run"


def other_warp(image, *arguments, true_warp=cv2.warpAffine):
    """Brightens a pixel by 1, as another OpenCV may."""
    warped = true_warp(image, *arguments)
    warped.flat[0] ^= 1
    return warped


def strict(config):
    config.train.strict_resume = True
    return config


def test_the_same_versions_resume_without_a_word(killed, finished, capfd):
    assert train(strict(tiny.short_config()), killed).step == 4
    assert HEADLINE not in capfd.readouterr().err
    one, other = tiny.saved_state(killed), tiny.saved_state(finished)
    assert all(np.array_equal(one[name], other[name]) for name in other)


def test_versions_that_make_the_same_images_are_a_warning_once(killed, capfd, monkeypatch):
    real = cv2.__version__
    monkeypatch.setattr(cv2, "__version__", "4.13.0")
    monkeypatch.setattr(versions, "source_digest", lambda: "edited")
    config = tiny.short_config()
    with pytest.raises(UserError, match=r"leave out config\.train"):
        train(strict(tiny.short_config()), killed)
    assert train(config, killed).step == 4
    said = capfd.readouterr().err
    assert f"{HEADLINE} 2:" in said
    assert f"  opencv: {real} (" in said
    assert "-> 4.13.0 (" in said
    assert "which can change images or augmentation" in said
    assert "deeplab_jax source: unedited -> edited, which can change any of it" in said
    assert "numpy:" not in said
    image = pipeline.train_index(24, config.seed, 0)
    name = data_lib.load(config.data, "train").source[image]["name"]
    assert f"the first training crop, of image {name}, has the same bytes" in said
    shutil.rmtree(killed / "checkpoints" / "2")  # the checkpoint of step 4 has the new versions
    made_with = saved_model.read(killed).info["made_with"]
    assert made_with["versions"]["opencv"].startswith("4.13.0 (")
    assert made_with["first crop"]


def test_other_images_are_noticed_though_versions_are_equal(killed, capfd, monkeypatch):
    monkeypatch.setattr(cv2, "warpAffine", other_warp)
    with pytest.raises(UserError, match=f"(?s){HEADLINE} 2:\n  the first .* has OTHER BYTES"):
        train(strict(tiny.short_config()), killed)
    assert train(tiny.short_config(), killed).step == 4
    assert "has OTHER BYTES than then" in capfd.readouterr().err


def test_a_finished_run_is_not_warned_about(finished, capfd, monkeypatch):
    monkeypatch.setattr(cv2, "__version__", "4.13.0")
    train(strict(tiny.short_config()), finished)
    assert HEADLINE not in capfd.readouterr().err


def test_an_older_checkpoint_says_nothing(killed, capfd):
    path = killed / "checkpoints" / "2" / "info" / "data.json"
    info = json.loads(path.read_text())
    del info["made_with"]
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match="checkpoint 2 does not say with which versions"):
        train(strict(tiny.short_config()), killed)
    assert train(tiny.short_config(), killed).step == 4
    assert HEADLINE not in capfd.readouterr().err


def test_the_second_of_two_stages_is_guarded_too(tmp_path, capfd, monkeypatch):
    config = tiny.short_config()
    config.train.steps = 2
    config.second_stage = SecondStageConfig(steps=3)
    config.train.save_every = 1
    train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    monkeypatch.setattr(cv2, "__version__", "4.13.0")
    train(config, tmp_path)
    assert capfd.readouterr().err.count(HEADLINE) == 1


def test_the_crop_is_row_0_of_batch_0(monkeypatch):
    """Also with oversampling and several workers, whatever hosts have which rows."""
    config = tiny.short_config()
    dataset = data_lib.load(config.data, "train")
    arguments = {"batch_size": config.train.batch_size, "seed": config.seed}
    with pipeline.train_batches(dataset, config.data, **arguments, start_step=0) as batches:
        first = next(batches)
    row = pipeline.train_batch(dataset, config.data, **arguments, step=0, rows=(0,))
    np.testing.assert_array_equal(row["image"][0], first["image"][0])
    np.testing.assert_array_equal(row["label"][0], first["label"][0])
    before = provenance(config, dataset)
    assert provenance(config, dataset) == before
    monkeypatch.setattr(cv2, "warpAffine", other_warp)
    assert provenance(config, dataset).crop != before.crop


def test_versions_are_those_of_what_is_imported(monkeypatch):
    found = versions.byte_versions()
    assert found["opencv"].startswith(f"{cv2.__version__} (opencv")
    assert found["numpy"] == np.__version__
    assert set(found) <= set(versions.EFFECTS)
    # A distribution that is installed elsewhere is not the library that is imported.
    monkeypatch.setattr(cv2, "__file__", "/usr/lib/python3/dist-packages/cv2.so")
    assert versions.byte_versions()["opencv"] == f"{cv2.__version__} (no wheel)"
