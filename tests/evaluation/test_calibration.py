"""Temperatures, calibration errors and the rule for unsure pixels, on data of known truth."""

import types

import numpy as np
import pytest
from sklearn.metrics import log_loss

from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.labels import IGNORE, named
from deeplab_jax.evaluation import calibration as calibration_lib
from deeplab_jax.evaluation.calibration import THRESHOLDS, Reliability, RiskCurve
from deeplab_jax.inference.calibration import FORMAT, Calibration
from deeplab_jax.inference.predictor import TestTimeAugmentation
from deeplab_jax.utils.errors import UserError

CLASSES = 5
NAMES = ("background", "disc", "triangle", "ring", "cross")


def softmax(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def draw(rng, shape, temperature=1.0, spread=2.5):
    """Logits of a model that is overconfident by a temperature, and labels that are drawn."""
    logits = spread * rng.normal(size=(*shape, CLASSES))
    chances = softmax(logits).cumsum(axis=-1)
    labels = (chances > rng.random((*shape, 1))).argmax(axis=-1)
    return (temperature * logits).astype(np.float32), labels.astype(np.uint8)


def rule(temperatures=(1.0,) * CLASSES, of=None, threshold=0.0):
    return Calibration(FORMAT, NAMES, {}, 1.0, tuple(temperatures), threshold, 0.1, of, {})


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature):
    rng = np.random.default_rng(0)
    logits, labels = draw(rng, (200_000,), temperature)
    assert calibration_lib.fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.01)
    # Pixels of weight 0 do not count.
    weights = np.ones(400_000)
    weights[200_000:] = 0
    twice = np.concatenate([logits, -logits]), np.concatenate([labels, labels])
    found = calibration_lib.fit_temperature(*twice, weights)
    assert found == pytest.approx(calibration_lib.fit_temperature(logits, labels), rel=1e-6)


def test_pixels_that_are_all_right_or_all_wrong_have_the_ends():
    logits = np.eye(CLASSES, dtype=np.float32)
    assert calibration_lib.fit_temperature(logits, np.arange(CLASSES)) == 0.05
    assert calibration_lib.fit_temperature(logits, np.roll(np.arange(CLASSES), 1)) == 20


def test_the_fallback_stays_where_the_data_do_not_support_another():
    rng = np.random.default_rng(1)
    logits, labels = draw(rng, (4000,), 2.0)
    weights = np.ones(4000)
    check = calibration_lib.checked_temperature
    assert check(logits, labels, weights, np.arange(4000) % 9, 1.0) == 1  # few images
    images = np.arange(4000) % 40
    assert check(logits, labels, weights, images, 1.0) == pytest.approx(2, rel=0.1)
    # Images that differ: half of them are overconfident, half of them too little.
    logits[images % 2 == 0] /= 4
    assert check(logits, labels, weights, images, 1.0) == 1


@pytest.fixture(scope="module")
def pixels():
    logits, labels = draw(np.random.default_rng(2), (20_000,), 1.7)
    return softmax(logits).astype(np.float32), labels


@pytest.fixture(scope="module")
def measured(pixels):
    probabilities, labels = pixels
    result = Reliability(CLASSES)
    for part in (slice(0, 7000), slice(7000, None)):
        result.add(probabilities[part], labels[part])
    return result


def test_ece_is_that_of_torchmetrics(pixels):
    from torch_reference import torch  # torchmetrics imports torchvision, which needs its help

    metrics = pytest.importorskip("torchmetrics.classification")
    error = metrics.MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1")
    result, few = Reliability(CLASSES), [x[:2000] for x in pixels]  # its sums are float32
    result.add(*few)
    probabilities, labels = map(torch.tensor, few)
    expected = float(error(probabilities, labels.long()))
    assert expected > 0.02
    assert result.numbers()["ece"] == pytest.approx(expected, abs=1e-6)


def test_other_errors_are_their_definitions(pixels, measured):
    probabilities, labels = pixels
    numbers = measured.numbers()
    assert numbers["nll"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    one_hot = np.eye(CLASSES)[labels]
    brier = ((probabilities - one_hot) ** 2).sum(axis=1).mean()
    assert numbers["brier"] == pytest.approx(brier, rel=1e-6)
    static = 0.0
    for index in range(CLASSES):
        for low in range(15):
            p = probabilities[:, index].astype(np.float64)
            inside = (p >= low / 15) & (p < (low + 1) / 15)
            if inside.any():
                gap = abs((labels[inside] == index).mean() - p[inside].mean())
                static += inside.mean() * gap / CLASSES
    assert numbers["sce"] == pytest.approx(static, rel=1e-4)


def test_sureness_is_the_calibrated_probability(pixels):
    probabilities = pixels[0][:3000].reshape(50, 60, CLASSES)
    ids = probabilities.argmax(axis=-1)
    temperatures = np.array([1.0, 0.5, 2.0, 3.0, 1.5])
    exact = softmax(np.log(probabilities.astype(np.float64)) / temperatures[ids][..., None])
    got = rule(temperatures).sureness(probabilities, ids)
    np.testing.assert_allclose(got, exact.max(axis=-1), rtol=1e-5)
    got = rule(temperatures, of=2).sureness(probabilities, ids)
    np.testing.assert_allclose(got[ids != 2], 1 - exact[ids != 2][:, 2], atol=1e-6)
    assert np.isinf(got[ids == 2]).all()
    # A probability of 0, as float32 may give it, is no NaN.
    certain = np.float32([[1, 0, 0, 0, 0]])
    assert rule(temperatures).sureness(certain, np.array([0])) == 1


@pytest.mark.parametrize("of", [None, 1])
def test_losses_of_an_image_are_counts_at_each_threshold(pixels, of):
    probabilities, labels = (x[:2000] for x in pixels)
    ids, calibration = probabilities.argmax(axis=1), rule(of=of)
    curve = RiskCurve()
    curve.add(calibration, probabilities, labels)
    sureness = calibration.sureness(probabilities, ids)
    for index in [0, 700, 1000, 1500, len(THRESHOLDS) - 1]:
        unsure = sureness < THRESHOLDS[index]
        bad = (ids != labels) & ~unsure
        loss = bad.mean() if of is None else (bad & (labels == of)).sum() / (labels == of).sum()
        found = curve.at(float(THRESHOLDS[index]))
        assert found["risk"] == pytest.approx(loss)
        assert found["coverage"] == pytest.approx(1 - unsure.mean())
        if not unsure.all():
            assert found["wrong_of_sure"] == pytest.approx(bad.sum() / (~unsure).sum())
    assert (np.diff(curve.losses) <= 0).all()
    shares = [point["coverage"] for point in curve.points()]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    if of is None:  # all are unsure at the last threshold
        assert shares[0] == curve.losses[-1] == 0


@pytest.mark.parametrize(("of", "risk"), [(None, 0.1), (None, 0.2), (1, 0.15)])
def test_the_risk_of_new_images_is_what_was_stated(of, risk):
    """Over 200 random splits, with 40 images that set the rule and 200 new ones each."""
    rng = np.random.default_rng(3)
    losses = []
    for _ in range(240):  # images differ in how hard they are, as photos do
        logits, labels = draw(rng, (300,), rng.uniform(0.5, 3), spread=rng.uniform(0.5, 4))
        curve = RiskCurve()
        curve.add(rule(of=of), softmax(logits).astype(np.float32), labels)
        losses.append(curve.losses)
    losses = np.array(losses)
    assert losses[:, 0].mean() > 1.5 * risk  # without the rule
    found = []
    for _ in range(200):
        order = rng.permutation(240)
        index = calibration_lib.choose_threshold(losses[order[:40]].mean(axis=0), 40, risk)
        found.append(losses[order[40:], index].mean())
    assert np.mean(found) <= risk
    assert np.mean(found) >= risk - 2 / 41 - 0.01  # theorem 2: not much less either


def test_the_threshold_is_the_smallest_that_the_bound_allows():
    losses = np.array([0.5, 0.2, 0.06, 0.04, 0.0])
    for risk in (0.051, 0.06, 0.1, 0.3, 0.6):
        expected = next(i for i, loss in enumerate(losses) if (99 * loss + 1) / 100 <= risk)
        assert calibration_lib.choose_threshold(losses, 99, risk) == expected
    assert calibration_lib.choose_threshold(np.zeros(1), 19, 0.05) == 0
    with pytest.raises(UserError, match=r"^18 images are too few .* 19 are needed .* 0\.0526$"):
        calibration_lib.choose_threshold(np.zeros(1), 18, 0.05)


class Known:
    """In a model's place: the probabilities of images that are known by the number in a pixel."""

    classes = NAMES
    tta = TestTimeAugmentation()
    architecture = types.SimpleNamespace(output_stride=16)

    def __init__(self, probabilities):
        self._probabilities = probabilities

    def probabilities(self, image):
        return self._probabilities[image[0, 0, 0]]


def images_of(logits, labels):
    """The model and the split of given logits and labels."""
    height, width = labels.shape[1:]
    source = [
        {"image": np.full((height, width, 3), i, np.uint8), "label": label, "name": f"image {i}"}
        for i, label in enumerate(labels)
    ]
    return Known(softmax(logits).astype(np.float32)), Dataset(source, named(*NAMES))


def test_a_split_gives_temperatures_by_class_errors_and_a_rule():
    rng = np.random.default_rng(4)
    logits, labels = draw(rng, (80, 20, 25))
    true = np.array([1.0, 2.0, 0.5, 3.0, 1.0])
    logits *= true[logits.argmax(axis=-1)][..., None]  # overconfident where they predict a class
    labels[rng.random(labels.shape) < 0.1] = IGNORE
    labels[5] = IGNORE  # a whole image
    done = calibration_lib.calibrate(*images_of(logits, labels), risk=0.1)
    found, report = done.calibration, done.calibration.report
    np.testing.assert_allclose(found.temperatures, true, rtol=0.12)
    assert report["before"]["ece"] > 0.03
    assert report["after"]["ece"] < report["before"]["ece"] / 2
    assert report["after"]["nll"] < report["before"]["nll"]
    assert report["absent"] == []
    assert report["images_of_rule"] in (39, 40)
    assert 0.05 < report["rule"]["risk"] <= 0.1
    assert found.threshold == report["rule"]["threshold"]
    again = calibration_lib.calibrate(*images_of(logits, labels), risk=0.1)
    assert again.calibration == found


def test_a_class_that_is_absent_is_listed_and_has_the_common_temperature():
    rng = np.random.default_rng(5)
    logits, labels = draw(rng, (40, 10, 10), 2.0)
    logits[..., 3] = -20
    labels[labels == 3] = IGNORE
    found = calibration_lib.calibrate(*images_of(logits, labels), risk=0.2).calibration
    assert found.report["absent"] == ["ring"]
    assert found.temperatures[3] == found.temperature == pytest.approx(2, rel=0.1)
    model, dataset = images_of(logits, labels)
    with pytest.raises(UserError, match=r"^0 images with ring, in half of the split, are too few"):
        calibration_lib.calibrate(model, dataset, risk=0.2, of=3)


def test_what_cannot_be_calibrated_is_an_error():
    logits, labels = draw(np.random.default_rng(6), (40, 4, 4))
    model, dataset = images_of(logits, np.full_like(labels, IGNORE))
    with pytest.raises(UserError, match="every pixel of these images has the ignore label"):
        calibration_lib.calibrate(model, dataset, risk=0.1)
    model, dataset = images_of(logits[:1], labels[:1])
    with pytest.raises(UserError, match=r"^0 images are too few for --risk 0.05: 19 are needed"):
        calibration_lib.calibrate(model, dataset, risk=0.05)
