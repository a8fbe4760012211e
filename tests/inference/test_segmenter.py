"""`deeplab_jax.load` and the `Segmenter` it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from deeplab_jax.inference import predictor
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.training.checkpoint import Checkpoints
from deeplab_jax.training.state import TrainState
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, saved_model, torch_file
from random_modules import random_variables
from small_checkpoint import CLASSES, MEAN, STD


def picture(height, width, channels=3):
    shape = (height, width, channels)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def normalized(image):
    return ((image / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)[None]


def test_repr_describes_the_model(loaded, saved):
    assert loaded.path == saved[0]
    assert loaded.classes == ("background", "red fox", "bluebird")
    assert loaded.labels == CLASSES
    assert loaded.palette.dtype == np.uint8
    np.testing.assert_array_equal(
        loaded.palette[[1, 2, 255]], [(200, 0, 0), (0, 0, 200), [255] * 3]
    )
    assert (loaded.mean, loaded.std) == (MEAN, STD)
    assert loaded.architecture == saved[1].architecture
    assert loaded.info["input_size"] == [33, 33]


def test_logits_probabilities_and_ids_are_the_models(loaded, saved):
    image = picture(41, 57)
    expected = jax.jit(saved[1].apply)(saved[2], jnp.asarray(normalized(image)))[0]["out"]
    logits = loaded.logits(normalized(image))
    assert (logits.shape, logits.dtype) == ((1, 41, 57, 3), np.float32)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    probabilities = loaded.probabilities(image)
    assert (probabilities.shape, probabilities.dtype) == ((41, 57, 3), np.float32)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(expected)[0], atol=1e-4)
    ids = loaded.predict(image)
    assert (ids.shape, ids.dtype) == ((41, 57), np.int32)
    assert np.mean(ids == np.argmax(expected[0], -1)) > 0.999
    assert len(np.unique(ids)) > 1


def test_a_path_gives_the_same_as_its_pixels(loaded, tmp_path):
    image = picture(30, 45)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    turned = np.rot90(image, -1)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(loaded.predict(path), loaded.predict(turned))
    assert loaded.predict(turned).shape == (45, 30)


def test_a_file_that_is_not_an_image_is_reported(loaded, tmp_path):
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(UserError, match=r"a\.jpg: is a text"):
        loaded.predict(tmp_path / "a.jpg")


def test_settings_reach_the_model(loaded, saved):
    image = picture(41, 57)
    plain = loaded.probabilities(image)
    for settings in ({"scales": (0.5, 1.0)}, {"flip": True}, {"output_stride": 8}, {"window": 33}):
        other = deeplab_jax.load(saved[0], **settings).probabilities(image)
        assert other.shape == plain.shape
        assert np.abs(other - plain).max() > 1e-4, settings
    stride_8 = deeplab_jax.load(saved[0], output_stride=8)
    assert stride_8.architecture.output_stride == 8
    assert stride_8.info["architecture"]["output_stride"] == 8
    assert stride_8.architecture.atrous_rates == (12, 24, 36)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": -1}, "window must be"),
        ({"output_stride": 12}, "output_stride must be 8, 16 or 32"),
    ],
)
def test_impossible_settings_are_refused(saved, settings, message):
    with pytest.raises(UserError, match=message):
        deeplab_jax.load(saved[0], **settings)


def test_large_images_are_segmented_by_windows(saved, monkeypatch):
    by_itself = deeplab_jax.load(saved[0]).tta
    assert by_itself.window_of(2000, 2000) == 0
    assert by_itself.window_of(2001, 2000) == predictor.DEFAULT_WINDOW
    assert deeplab_jax.load(saved[0], window=0).tta.window_of(3000, 4000) == 0
    given = deeplab_jax.load(saved[0], window=65).tta
    assert given.window_of(3000, 4000) == given.window_of(100, 100) == 65

    monkeypatch.setattr(predictor, "LARGE_IMAGE", 40 * 40)
    monkeypatch.setattr(predictor, "DEFAULT_WINDOW", 33)
    image = picture(41, 57)
    np.testing.assert_array_equal(
        deeplab_jax.load(saved[0]).probabilities(image),
        deeplab_jax.load(saved[0], window=33).probabilities(image),
    )


def test_a_workdir_gives_its_best_checkpoint(saved, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    folder = Checkpoints(tmp_path / "checkpoints", keep=2, log=print)
    info = saved_model.read(saved[0]).info
    for step, miou in ((1, 0.2), (2, 0.5), (3, 0.3)):
        params = {name: jnp.asarray(step * array) for name, array in saved[2].params.items()}
        variables = Variables(params, jax.tree.map(jnp.asarray, saved[2].batch_stats))
        state = TrainState(jnp.asarray(step), variables, opt_state=(), ema_params=None)
        folder.save(state, step, info, miou, wait=step == 3)
    folder.close()
    best = deeplab_jax.load(tmp_path)
    assert best.path == tmp_path / "checkpoints" / "2"
    name = "backbone.stem.0.conv.kernel"
    second = saved[1].fuse(
        variables._replace(params={n: 2 * p for n, p in saved[2].params.items()})
    )
    np.testing.assert_allclose(best.variables.params[name], second.params[name], rtol=1e-6)


def test_torchvisions_file_is_loaded_directly(tmp_path):
    model = FunctionalModel(architecture("torchvision_resnet18", num_classes=21))
    variables = random_variables(model)
    torch_file.write(tmp_path / "some.pth", families.from_model(variables, model.architecture))
    loaded = deeplab_jax.load(tmp_path / "some.pth")
    assert loaded.classes[15] == "person"
    assert loaded.architecture.output_stride == 8
    fused = model.fuse(jax.device_get(variables))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, fused)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "none is neither a weights file, nor a folder with a checkpoint"),
        (".", "no checkpoint at"),
        ("a.txt", "a.txt"),
    ],
)
def test_paths_without_a_model_are_reported(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=message):
        deeplab_jax.load(path)
