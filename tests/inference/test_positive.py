"""The positive class, its scores and the ids that a threshold gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.data import labels
from deeplab_jax.inference import positive
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation
from deeplab_jax.utils.errors import UserError

TWO, THREE = labels.named("background", "crack"), labels.named("road", "car", "tree")


def test_the_class_and_the_threshold():
    assert positive.resolve(TWO) == (1, None)
    assert positive.resolve(labels.named("crack", "BG"), threshold=0.0) == (0, 0.0)
    assert positive.resolve(TWO, "background", 1.0) == (0, 1.0)
    assert positive.resolve(THREE) is None
    assert positive.resolve(THREE, "Tree", 0.25) == (2, 0.25)
    assert positive.resolve(THREE, "0") == (0, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TWO, "", 1.5), r"--threshold must be a probability, 0 to 1, got 1.5"),
        ((TWO, "", 50.0), r"50 % is --threshold 0.5"),
        ((TWO, "", -0.1), r"0 to 1, got -0.1$"),
        ((TWO, "", float("nan")), "got nan"),
        (
            (THREE, "", 0.5),
            "--threshold needs --positive CLASS.* 3 classes: one of road, car, tree",
        ),
        ((THREE, "tre"), r"--positive: there is no class 'tre' \(did you mean 'tree'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        positive.resolve(*arguments)


@pytest.mark.parametrize("xp", [np, jnp])
def test_ids_from_a_threshold(xp):
    """Below it, the most probable other class; at it, positive."""
    ranked = xp.asarray([[[0.2, 0.5, 0.3], [0.5, 0.3, 0.2], [0.1, 0.25, 0.65]]], dtype="float32")

    def ids(*of):
        return positive.choose_ids(ranked, ranked[..., of[0]], PositiveClass(*of)).tolist()

    assert ids(1) == [[1, 0, 2]]
    assert ids(1, 0.5) == [[1, 0, 2]]
    assert ids(1, 0.25) == [[1, 1, 1]]
    assert ids(1, 0.3) == [[1, 1, 2]]  # float32 0.3, as the probability
    assert ids(1, 0.6) == [[2, 0, 2]]
    assert ids(2, 0.3) == [[2, 0, 2]]
    assert ids(0, 1.0) == [[1, 1, 2]]


@pytest.mark.parametrize(("window", "scales"), [(0, (1.0,)), (0, (0.5, 1.0)), (33, (0.5, 1.0))])
def test_ids_and_scores_follow_from_the_probabilities(loaded, window, scales):
    predictor = Predictor(
        loaded.model,
        loaded.variables,
        mean=loaded.mean,
        std=loaded.std,
        tta=TestTimeAugmentation(scales, window=window),
    )
    image = np.random.default_rng(0).integers(0, 256, (50, 45, 3), dtype=np.uint8)
    probabilities = predictor.probabilities(image)
    plain = predictor.ids(image)
    for index in range(3):
        ids, scores = predictor.ids_and_scores(image, PositiveClass(index))
        np.testing.assert_allclose(scores, probabilities[..., index], atol=1e-6)
        np.testing.assert_array_equal(ids, plain)
    before = predictor.num_compilations
    threshold = float(np.quantile(probabilities[..., 1], 0.3))
    for chosen in (threshold, 0.0, 1.0):
        ids, scores = predictor.ids_and_scores(image, PositiveClass(1, chosen))
        np.testing.assert_array_equal(ids == 1, scores >= np.float32(chosen))
        others = np.where(probabilities[..., 2] > probabilities[..., 0], 2, 0)
        assert np.mean(np.where(ids == 1, others, ids) != others) < 1e-3
    assert predictor.num_compilations <= before + 1  # one program for all thresholds
