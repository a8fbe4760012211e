"""`Predictor` on full images, several scales and windows, compared with NumPy loops."""

import functools
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeplab_jax.config import MeshConfig
from deeplab_jax.distributed.mesh import make_mesh, replicated
from deeplab_jax.inference.compilation import Programs
from deeplab_jax.inference.padding import bucket
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation
from deeplab_jax.inference.sliding_window import window_starts, window_weights
from deeplab_jax.inference.views import predict_ids, predict_probabilities, scaled_side
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel, normalize
from deeplab_jax.utils.errors import UserError
from random_modules import random_variables

CLASSES = 5
PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
PLAIN = TestTimeAugmentation()
ALL_VIEWS = TestTimeAugmentation(scales=(0.5, 1, 1.3), flip=True)


@functools.cache
def model_and_variables():
    model = FunctionalModel(architecture("paper_resnet18", num_classes=CLASSES, width=0.125))
    variables = random_variables(model)
    # Probabilities of each class, not of the highest alone.
    variables.params["classifier.logits.kernel"] *= 0.2
    return model, variables


@functools.cache
def inference(tta=PLAIN):
    """One of each augmentation for all tests, which thus share its programs."""
    return Predictor(*model_and_variables(), **PIXELS, tta=tta)


def random_image(height, width, seed=0):
    """Coarse patches under noise, so that neighbours differ and classes change."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 200, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
    noise = rng.integers(0, 56, (height, width, 3))
    return (patches[:height, :width] + noise).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, images):
    return model.apply(variables, images)[0]["out"]


def logits_alone(pixels):
    """The model's logits of one image, neither padded nor in a batch."""
    normalized = (pixels / 255 - PIXELS["mean"]) / PIXELS["std"]
    return np.asarray(run(*model_and_variables(), jnp.asarray(normalized[None], jnp.float32))[0])


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def resized(x, height, width):
    """Linear interpolation along one axis, then the other, between the pixels' centres."""
    for axis, size in enumerate((height, width)):
        old = np.arange(x.shape[axis]) + 0.5
        new = (np.arange(size) + 0.5) * x.shape[axis] / size
        x = np.apply_along_axis(lambda line, old=old, new=new: np.interp(new, old, line), axis, x)
    return x


def looped(image, scales, flip):
    """Mean over single predictions."""
    height, width = image.shape[:2]
    views = []
    for scale in scales:
        view = resized(image.astype(float), int(height * scale + 0.5), int(width * scale + 0.5))
        views.append(resized(softmax(logits_alone(view)), height, width))
        if flip:
            mirrored = softmax(logits_alone(view[:, ::-1]))[:, ::-1]
            views.append(resized(mirrored, height, width))
    return np.mean(views, axis=0)


# --- Whole images ------------------------------------------------------------------------------


def test_plain_prediction_is_the_models():
    image = random_image(41, 57)
    logits = logits_alone(image)
    ids = inference().ids(image)
    assert ids.dtype == np.uint8
    assert len(np.unique(ids)) > 2
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    np.testing.assert_allclose(inference().probabilities(image), softmax(logits), atol=1e-5)


def test_scales_and_mirror_images_equal_a_loop_over_single_predictions():
    """In a batch, among other images and whatever lies beyond this one."""
    image = random_image(41, 57)
    images = np.random.default_rng(1).integers(0, 256, (2, 65, 60, 3), np.uint8)
    images[1, :41, :57] = image
    sizes = jnp.asarray([(65, 3), (41, 57)])
    options = {"scales": ALL_VIEWS.scales, "flip": True}

    @jax.jit
    def predict(variables, images, sizes):
        pixels = normalize(images, **PIXELS)
        arguments = (model_and_variables()[0], variables, pixels, sizes)
        return predict_probabilities(*arguments, **options), predict_ids(*arguments, **options)[0]

    ours, ids = predict(model_and_variables()[1], jnp.asarray(images), sizes)
    expected = looped(image, ALL_VIEWS.scales, True)
    np.testing.assert_allclose(ours[1, :41, :57], expected, atol=1e-5)
    # Each of the views counts: one forgotten would be far beyond the tolerance.
    assert np.abs(expected - looped(image, ALL_VIEWS.scales, False)).max() > 1e-3
    assert np.abs(expected - looped(image, ALL_VIEWS.scales[:2], True)).max() > 1e-3
    np.testing.assert_array_equal(ids, ours.argmax(-1))


def test_all_views_of_one_image_equal_those_in_a_batch():
    image = random_image(41, 57)
    ours = inference(ALL_VIEWS).probabilities(image)
    np.testing.assert_allclose(ours, looped(image, ALL_VIEWS.scales, True), atol=1e-5)
    np.testing.assert_array_equal(inference(ALL_VIEWS).ids(image), ours.argmax(-1))


def test_a_mirrored_image_gives_the_mirrored_probabilities():
    image = random_image(64, 99)
    straight = inference(ALL_VIEWS).probabilities(image)
    mirrored = inference(ALL_VIEWS).probabilities(image[:, ::-1])
    np.testing.assert_allclose(mirrored[:, ::-1], straight, atol=1e-5)
    assert np.abs(straight[:, ::-1] - straight).max() > 0.01


# --- Windows -----------------------------------------------------------------------------------


def looped_windows(image, window, overlap, tta):
    """Weighted mean over predictions of each window as an image of its own."""
    height, width = image.shape[:2]
    total, weight = np.zeros((height, width, CLASSES)), np.zeros((height, width, 1))
    sides = min(window, height), min(window, width)
    # A triangle along each axis, by counting up from both ends.
    triangles = [
        np.asarray([min(i + 1, side - i) for i in range(side)], float) / ((side + 1) // 2)
        for side in sides
    ]
    starts = [window_starts(side, window, overlap) for side in (height, width)]
    for top, left in itertools.product(*starts):
        place = slice(top, top + sides[0]), slice(left, left + sides[1])
        weights = np.outer(*triangles)[..., None]
        total[place] += inference(tta).probabilities(image[place]) * weights
        weight[place] += weights
    return total / weight


@pytest.mark.parametrize(("height", "width"), [(70, 93), (20, 80), (95, 1)])
def test_windows_equal_a_loop_over_single_windows(height, width):
    image = random_image(height, width)
    windows = TestTimeAugmentation(window=33)
    expected = looped_windows(image, 33, 0.5, PLAIN)
    ours = inference(windows).probabilities(image)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    ids = inference(windows).ids(image)
    np.testing.assert_array_equal(ids, ours.argmax(-1))
    assert (ids == expected.argmax(-1)).mean() > 0.999
    if min(height, width) > 33:  # a window sees less than the image, so this is no whole image
        assert np.abs(expected - inference().probabilities(image)).max() > 0.01


def test_windows_are_predicted_over_all_scales_and_directions():
    image = random_image(50, 60)
    tta = TestTimeAugmentation(ALL_VIEWS.scales, ALL_VIEWS.flip, window=33, overlap=0.2)
    expected = looped_windows(image, 33, 0.2, ALL_VIEWS)
    np.testing.assert_allclose(inference(tta).probabilities(image), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(65, 65), (1, 1), (30, 65)])
def test_an_image_that_a_window_holds_is_predicted_whole(size):
    image = random_image(*size)
    windows = inference(TestTimeAugmentation(window=65))
    np.testing.assert_array_equal(windows.ids(image), inference().ids(image))
    np.testing.assert_allclose(
        windows.probabilities(image), inference().probabilities(image), atol=1e-5
    )


@given(
    side=st.integers(1, 300), window=st.integers(1, 100), overlap=st.floats(0, 1, exclude_max=True)
)
def test_windows_cover_the_image_and_overlap(side, window, overlap):
    starts = window_starts(side, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, side - window)
    gaps = np.diff(starts)
    assert (gaps >= 1).all()
    # At least the share asked for, to a pixel's rounding; always touching.
    assert (gaps <= max(1, window * (1 - overlap) + 0.5)).all()
    assert (gaps <= window).all()
    # No fewer would do.
    step = max(1, window - round(window * overlap))
    assert len(starts) == 1 or (len(starts) - 2) * step < side - window


@pytest.mark.parametrize("side", [1, 2, 5, 32])
def test_weights_favour_the_middle_and_are_never_zero(side):
    weights = window_weights(side)
    assert weights.min() > 0
    assert weights.max() == 1
    np.testing.assert_array_equal(weights, weights[::-1])
    assert (np.diff(weights[: (side + 1) // 2]) > 0).all()


def test_memory_does_not_grow_with_the_number_of_rows(monkeypatch):
    windows = Predictor(*model_and_variables(), **PIXELS, tta=TestTimeAugmentation(window=33))
    run, on_the_device = Programs.__call__, []

    def watched(*arguments):
        result = run(*arguments)
        on_the_device.append(sum(array.nbytes for array in jax.live_arrays()))
        return result

    def peaks(height):
        image = random_image(height, 40)
        on_the_device.clear()
        tracemalloc.start()
        windows.ids(image)
        on_the_host = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return max(on_the_device), on_the_host

    monkeypatch.setattr(Programs, "__call__", watched)
    peaks(50)  # compiles
    programs = windows.num_compilations
    (few_on_device, few_on_host), (many_on_device, many_on_host) = peaks(100), peaks(400)
    assert many_on_device == few_on_device
    assert windows.num_compilations == programs
    # Bytes; the ids themselves are 1 a pixel, the probabilities 20.
    assert many_on_host - few_on_host < 2 * 300 * 40


# --- Sizes and programs ------------------------------------------------------------------------


@pytest.mark.parametrize("tta", [PLAIN, ALL_VIEWS, TestTimeAugmentation(window=33)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1)])
def test_images_of_one_pixel_and_of_one_row(tta, size):
    image = random_image(*size)
    ids, shares = inference(tta).ids(image), inference(tta).probabilities(image)
    assert ids.shape == size
    assert shares.shape == (*size, CLASSES)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(ids, shares.argmax(-1))


def test_one_program_serves_a_bucket_of_sizes():
    """From variables that lie on several devices, too."""
    model, variables = model_and_variables()
    everywhere = jax.device_put(variables, replicated(make_mesh(MeshConfig(data=2))))
    fresh = Predictor(model, everywhere, **PIXELS)
    placed = set().union(*(leaf.devices() for leaf in jax.tree.leaves(fresh._variables)))
    assert placed == {jax.devices()[0]}  # the default one
    assert fresh.num_compilations == 0
    for size in [(1, 1), (129, 60), (7, 129), (128, 128)]:
        fresh.ids(random_image(*size))
    assert fresh.num_compilations == 1
    fresh.ids(random_image(130, 5))
    assert fresh.num_compilations == 2


def test_windows_need_the_network_once_and_once_for_what_one_window_holds():
    windows = Predictor(*model_and_variables(), **PIXELS, tta=TestTimeAugmentation(window=33))
    for size in [(34, 34), (90, 33), (70, 93), (1, 129)]:
        windows.ids(random_image(*size))
    # The network, and of a bucket of widths: adding a window, taking ids.
    assert windows.num_compilations == 3
    windows.ids(random_image(40, 130))
    assert windows.num_compilations == 3 + 2
    for size in [(1, 1), (33, 20), (33, 33)]:
        windows.ids(random_image(*size))
    assert windows.num_compilations == 3 + 2 + 1


@given(st.integers(1, 5000))
def test_buckets(side):
    padded = bucket(side)
    assert padded % 128 == 1
    assert side <= padded
    assert padded == 129 or padded - 128 < side
    assert bucket(padded) == padded


@given(st.integers(1, 5000), st.floats(0.01, 4))
def test_a_scaled_side_fits_into_the_scaled_bucket(side, scale):
    scaled = scaled_side(side, scale)
    assert 1 <= scaled <= scaled_side(bucket(side), scale)
    assert abs(scaled - max(1, side * scale)) <= 0.5


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "one or more numbers above 0"),
        ({"scales": (1, 0)}, r"above 0, got \(1, 0\)"),
        ({"scales": (float("nan"),)}, "numbers above 0"),
        ({"scales": (float("inf"),)}, "numbers above 0"),
        ({"window": 31}, "window must be 32 pixels or more, or 0 for whole images, got 31"),
        ({"window": 65, "overlap": 1.0}, "overlap must be 0 or more and below 1, got 1.0"),
        ({"overlap": -0.1}, "overlap"),
    ],
)
def test_impossible_modes(options, message):
    with pytest.raises(UserError, match=message):
        TestTimeAugmentation(**options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 1), np.uint8), r"uint8 \[height, width, 3\], got uint8 \[4, 4, 1\]"),
        (np.zeros((4, 4), np.uint8), r"got uint8 \[4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \[0, 4, 3\], which has no pixels"),
        (np.zeros((4, 4, 3), np.float32), "got float32"),
        (np.broadcast_to(np.uint8(0), (40_000, 1, 3)), "40000x1 pixels is too large.*use windows"),
    ],
)
def test_invalid_images(image, message):
    for predict in (inference().ids, inference().probabilities):
        with pytest.raises(UserError, match=message):
            predict(image)


@pytest.mark.parametrize("window", [None, 33])
def test_a_full_device_is_reported(monkeypatch, window):
    full = Predictor(*model_and_variables(), **PIXELS, tta=TestTimeAugmentation(window=window))

    def run(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(Programs, "__call__", run)
    with pytest.raises(UserError, match="80x90 pixels does not fit in the device's memory: use"):
        full.ids(random_image(80, 90))


def test_models_with_padding_same_see_sides_of_a_multiple_of_the_stride_plus_one():
    """Enlarged with the mean colour, as TensorFlow's own evaluation does."""
    model = FunctionalModel(architecture("tf_mobilenet_v2", num_classes=4, width=0.25))
    variables = random_variables(model)
    images = np.random.default_rng(0).integers(0, 256, (2, 50, 36, 3), np.uint8)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    predictor, apply = Predictor(model, variables, mean=mean, std=std), jax.jit(model.apply)
    for image, (height, width) in zip(images, ((50, 36), (33, 20)), strict=True):
        image = image[:height, :width]
        rows, columns = ({50: 65, 33: 33}[height], {36: 49, 20: 33}[width])
        padded = np.zeros((1, rows, columns, 3), np.float32)
        padded[0, :height, :width] = (image / 255 - 0.5) / 0.25
        logits = apply(variables, jnp.asarray(padded))[0]["out"][0, :height, :width]
        np.testing.assert_allclose(
            predictor.probabilities(image), jax.nn.softmax(logits, axis=-1), atol=2e-5
        )
