"""StableHLO export: the file gives the model's results, at any size and in another process."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.export import stablehlo
from deeplab_jax.export.program import Dimensions, Program
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.ops.depthwise_conv import depthwise_conv
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model
from random_modules import random_saved_model

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "export.md"


def logits_function(saved):
    """A function from uint8 images to a model's logits, with NumPy's normalization."""
    model = FunctionalModel(saved.architecture)
    apply = jax.jit(lambda pixels: model.apply(saved.variables, pixels)[0]["out"])
    mean, std = (np.array(saved.info[name]) for name in ("mean", "std"))
    return lambda images: np.asarray(apply(((images / 255 - mean) / std).astype(np.float32)))


@pytest.fixture(scope="module")
def logits_of(saved):
    return logits_function(saved_model.read(saved))


@pytest.fixture(scope="module")
def written(saved, tmp_path_factory):
    """A function that writes the model's program to a file and returns its path."""
    folder = tmp_path_factory.mktemp("programs")

    def write(output, dimensions=Dimensions()):  # noqa: B008
        path = folder / f"{output}{dimensions}"
        if not path.exists():
            # All platforms are tried only once, because each takes time to lower.
            platforms = stablehlo.PLATFORMS if output == "logits" else ("cpu",)
            program = Program(saved_model.read(saved), output, dimensions)
            path.write_bytes(stablehlo.serialize(program, platforms))
        return path

    return write


@pytest.fixture(scope="module")
def loaded(written):
    """A function that loads the model's program, cached so that it is compiled once."""
    return functools.cache(lambda *settings: stablehlo.load(written(*settings)))


def picture(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


def assert_near(result, logits, limit=1e-5):
    assert (result.shape, result.dtype) == (logits.shape, np.float32)
    assert np.abs(result - logits).max() <= limit * np.abs(logits).max()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 41), (5, 40, 33)], ids=str)
def test_one_file_gives_the_models_logits_at_each_batch_and_size(loaded, logits_of, shape):
    images = picture(*shape)
    assert_near(loaded("logits")(images), logits_of(images))


def test_a_fixed_size(loaded, logits_of):
    run = loaded("logits", Dimensions(height=33, width=41))
    images = picture(2, 33, 41)
    assert_near(run(images), logits_of(images))
    with pytest.raises(ValueError, match="33"):
        run(picture(2, 33, 40))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smpplus_resnet18", {"shortcut": "avg_pool", "stem": "deep128"}),
        ("tf_mobilenet_v2", {"decoder": "plus"}),  # SAME padding
    ],
)
def test_other_operations_take_any_size(tmp_path, name, options):
    """Separable convolutions, pools, aligned corners and SAME padding."""
    saved = random_saved_model(architecture(name, num_classes=5, width=0.125, **options))
    path = tmp_path / "program"
    path.write_bytes(stablehlo.serialize(Program(saved, "logits", Dimensions()), ("cpu",)))
    run, logits_of = stablehlo.load(path), logits_function(saved)
    for shape in ((1, 1, 1), (2, 33, 50)):
        assert_near(run(picture(*shape)), logits_of(picture(*shape)))


@pytest.mark.parametrize(("stride", "rate"), [(2, 1), (1, 2)])
def test_depthwise_convolutions_take_any_size(stride, rate):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(5, 5, 1, 8)), jnp.float32)
    convolve = functools.partial(
        depthwise_conv, kernel=kernel, strides=stride, kernel_dilation=rate
    )
    x = jnp.asarray(rng.normal(size=(2, 12, 9, 8)), jnp.float32)
    shape = jax.export.symbolic_shape("n, h, w, 8")
    exported = jax.export.export(jax.jit(lambda x: convolve(x)))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    assert_near(np.asarray(exported.call(x)), np.asarray(convolve(x, method="native")))


def test_probabilities_and_ids_are_those_of_the_logits(loaded, logits_of):
    images = picture(2, 33, 41)
    logits = logits_of(images)
    probabilities = loaded("probabilities")(images)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=2e-5)
    ids = loaded("ids")(images)
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    assert len(np.unique(ids)) > 1


def test_ids_on_photos(loaded, logits_of, shared_data):
    files = sorted((shared_data / "photos").iterdir())[-5:]
    crops = [np.asarray(Image.open(file).convert("RGB"))[::9, ::9][:40, :33] for file in files]
    images = np.stack(crops)
    logits = logits_of(images)
    assert_near(loaded("logits")(images), logits)
    ids = loaded("ids")(images)
    # Ids may differ only where two classes are equally likely up to rounding.
    best = np.sort(logits, axis=-1)
    clear = best[..., -1] - best[..., -2] > 2e-5 * np.abs(logits).max()
    np.testing.assert_array_equal(ids[clear], logits.argmax(-1)[clear])
    assert clear.mean() > 0.999
    assert len(np.unique(ids)) > 1


def test_the_loader_in_the_docs_runs_without_this_package(written, logits_of, tmp_path):
    (loader,) = re.findall(r"```python\n(.*?export\.deserialize.*?)```", DOCS.read_text(), re.S)
    assert len([line for line in loader.splitlines() if line]) <= 6
    images = picture(1, 33, 41)
    np.save(tmp_path / "images.npy", images)
    os.symlink(written("ids"), tmp_path / "voc.stablehlo")
    loader = loader.replace("np.zeros((1, 480, 640, 3), np.uint8)", "np.load('images.npy')")
    code = (
        "import sys\n"
        "for name in ('deeplab_jax', 'flax', 'orbax'): sys.modules[name] = None\n"
        f"{loader}\nnp.save('ids.npy', ids)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "ids.npy"), logits_of(images).argmax(-1))


def test_a_file_is_for_all_or_the_given_platforms(saved):
    program = Program(saved_model.read(saved), "ids", Dimensions())
    for platforms in (stablehlo.PLATFORMS, ("cpu", "tpu")):
        content = stablehlo.serialize(program, platforms)
        assert jax.export.deserialize(bytearray(content)).platforms == platforms


@pytest.mark.parametrize("platforms", [("tpu",), ("cpu", "gpu"), ()])
def test_invalid_platforms_are_refused(saved, platforms):
    with pytest.raises(UserError, match="platforms must be some of cpu, cuda, tpu"):
        stablehlo.serialize(Program(saved_model.read(saved), "ids", Dimensions()), platforms)


def test_sizes_that_could_overflow_are_refused(written):
    exported = jax.export.deserialize(bytearray(written("ids").read_bytes()))
    with pytest.raises(ValueError, match="refining shapes"):
        exported.call(picture(1, 32768, 1))
