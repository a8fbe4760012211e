"""Binary scores against scikit-learn, exact and by histogram, and their bounds."""

import numpy as np
import pytest
from sklearn import metrics

from deeplab_jax.evaluation import binary

RNG = np.random.default_rng(0)


def sigmoid(x):
    return (1 / (1 + np.exp(-np.asarray(x, np.float64)))).astype(np.float32)


def noisy(num_pixels, spread, share=0.1):
    """Scores that follow the labels, like those of a trained model for a large spread."""
    label = RNG.random(num_pixels) < share
    return sigmoid(spread * (RNG.normal(size=num_pixels) + 2 * label - 1)), label


def inside_a_bin():
    """Scores that differ, of both labels, in few bins: the worst case for a histogram."""
    label = RNG.random(4000) < 0.3
    base = RNG.choice(np.float32([1e-30, 0.1, 0.5, 0.75]), len(label))
    steps = RNG.integers(0, 900, len(label)) * 2.0**-23
    return (base * (1 + steps)).astype(np.float32), label


SETS = {
    "random": (RNG.random(5000).astype(np.float32), RNG.random(5000) < 0.2),
    "good": noisy(20_000, 2),
    "saturated": noisy(20_000, 30),  # most scores are nearly, or exactly, 0 or 1
    "tied": (RNG.integers(0, 11, 3000).astype(np.float32) / 10, RNG.random(3000) < 0.5),
    "constant": (np.full(100, 0.3, np.float32), np.arange(100) < 20),
    "perfect": (np.linspace(0, 1, 50, dtype=np.float32), np.arange(50) >= 30),
    "reversed": (np.linspace(1, 0, 50, dtype=np.float32), np.arange(50) >= 30),
    "two pixels": (np.float32([0.2, 0.2]), np.array([True, False])),
    "inside a bin": inside_a_bin(),
    "smallest steps": (
        np.concatenate(
            [np.nextafter(np.float32(x), np.float32([0, x, 1])) for x in (0.25, 0.5, 1)]
        ),
        np.array([1, 0, 1, 1, 0, 0, 1, 0, 1], bool),
    ),
    "near zero": (np.float32([0, 1e-45, 1e-40, 1e-38, 2e-38, 1e-20]), np.arange(6) % 2 == 1),
}


def curves(scores, label, *, exact=True):
    counts = binary.ScoreCounts()
    for part in np.array_split(np.arange(len(scores)), 3):
        counts.add(scores[part], label[part])
    if not exact:
        counts._count_pending()
    return counts.curves()


@pytest.mark.parametrize("name", SETS)
def test_exact_results_are_scikit_learns(name):
    scores, label = SETS[name]
    ours = curves(scores, label)
    assert ours.auroc == (pytest.approx(metrics.roc_auc_score(label, scores), abs=1e-12), 0)
    expected = metrics.average_precision_score(label, scores)
    assert ours.average_precision == (pytest.approx(expected, abs=1e-12), 0)
    precision, recall, thresholds = metrics.precision_recall_curve(label, scores)
    np.testing.assert_array_equal(ours.thresholds, thresholds[::-1])
    tp, fp = ours.true_positives, ours.false_positives
    np.testing.assert_allclose(tp / (tp + fp), precision[-2::-1], rtol=1e-12)
    np.testing.assert_allclose(tp / label.sum(), recall[-2::-1], rtol=1e-12)
    f1 = [metrics.f1_score(label, scores >= threshold) for threshold in np.unique(scores)[-50:]]
    best, threshold, error = ours.best_f1
    assert best >= max(f1) - 1e-12
    assert best == pytest.approx(metrics.f1_score(label, scores >= threshold), abs=1e-12)
    assert error == 0


@pytest.mark.parametrize("name", SETS)
def test_a_histograms_results_are_within_their_bounds(name):
    scores, label = SETS[name]
    exact, ours = curves(scores, label), curves(scores, label, exact=False)
    for (value, error), truth in (
        (ours.auroc, metrics.roc_auc_score(label, scores)),
        (ours.average_precision, metrics.average_precision_score(label, scores)),
    ):
        assert abs(value - truth) <= error + 1e-12
    best, threshold, error = ours.best_f1
    assert best - 1e-12 <= exact.best_f1[0] <= best + error + 1e-12
    # Each point is exact: bins are closed at their thresholds.
    assert best == pytest.approx(metrics.f1_score(label, scores >= threshold), abs=1e-12)
    for index in RNG.integers(0, len(ours.thresholds), 20):
        predicted = scores >= ours.thresholds[index]
        assert ours.true_positives[index] == np.sum(predicted & label)
        assert ours.false_positives[index] == np.sum(predicted & ~label)
    if name == "inside a bin":
        assert ours.auroc[1] > 0.05  # the bound says that nothing is known
    elif name in ("random", "good", "saturated", "perfect", "reversed"):
        assert ours.auroc[1] < 2e-5
        assert ours.average_precision[1] < 2e-4


def test_the_bound_holds_for_the_worst_order_within_bins():
    """Positives first and negatives first in one bin: the bound's two ends."""
    low = (np.float32(0.1) * (1 + np.arange(60) * 2.0**-23)).astype(np.float32)
    assert len(np.unique(binary.score_keys(low) >> 11)) == 1
    for label in (np.arange(60) < 25, np.arange(60) >= 35):
        ours = curves(low, label, exact=False)
        truth = metrics.roc_auc_score(label, low)
        assert abs(ours.auroc[0] - truth) == ours.auroc[1] == 0.5
        value, error = ours.average_precision
        truth = metrics.average_precision_score(label, low)
        assert abs(value - truth) <= error + 1e-12 < 0.5


def test_many_pixels_are_counted_in_a_histogram(monkeypatch):
    monkeypatch.setattr(binary, "MAX_EXACT", 10_000)
    scores, label = noisy(100_000, 3)
    counts = binary.ScoreCounts()
    for part in np.array_split(np.arange(len(scores)), 30):
        counts.add(scores[part], label[part])
        assert counts._num_pending <= 10_000
    ours = counts.curves()
    value, error = ours.auroc
    assert 0 < error < 1e-5
    assert abs(value - metrics.roc_auc_score(label, scores)) <= error
    value, error = ours.average_precision
    assert 0 < error < 1e-4
    assert abs(value - metrics.average_precision_score(label, scores)) <= error


def test_keys_are_in_the_order_of_scores_and_can_be_reversed():
    scores = np.unique(np.concatenate([*(pair[0] for pair in SETS.values()), noisy(10**5, 9)[0]]))
    keys = binary.score_keys(scores)
    assert np.all(np.diff(keys.astype(np.int64)) > 0)
    np.testing.assert_array_equal(binary.smallest_scores(keys), scores)
    # Between scores, the next one above: p >= smallest(key) exactly where its key is not smaller.
    between = keys[:-1] + np.diff(keys) // 2 + 1
    between = between[between < keys[1:]]
    smallest = binary.smallest_scores(between)
    assert np.all(binary.score_keys(smallest) >= between)
    assert np.all(binary.score_keys(np.nextafter(smallest, np.float32(0))) < between)


def test_scores_out_of_range_and_nan_are_moved_into_it():
    """Averages of probabilities may round to more than 1."""
    got = binary.score_keys(np.float32([np.nan, -0.0, -1e-9, 1.0000001, np.inf]))
    expected = binary.score_keys(np.float32([0, 0, 0, 1, 1]))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("exact", [True, False])
def test_one_label_only(exact):
    scores = np.float32([0.1, 0.9, 0.9])
    none = curves(scores, np.zeros(3, bool), exact=exact)
    for value in (*none.auroc, *none.average_precision, *none.best_f1):
        assert np.isnan(value)
    assert (none.num_positives, none.num_negatives) == (0, 3)
    every = curves(scores, np.ones(3, bool), exact=exact)
    assert np.isnan(every.auroc[0])
    assert every.average_precision[0] == every.best_f1[0] == 1
    empty = curves(scores[:0], np.zeros(0, bool), exact=exact)
    assert np.isnan(empty.auroc[0])
    assert empty.num_negatives == 0


@pytest.mark.parametrize("exact", [True, False])
def test_thinned_points_are_points_of_the_curve(exact):
    scores, label = noisy(50_000, 3)
    ours = curves(scores, label, exact=exact)
    points = ours.points(200)
    assert 100 < len(points["recall"]) <= 402
    index = np.searchsorted(-ours.thresholds, -points["threshold"].astype(np.float32))
    np.testing.assert_array_equal(points["recall"], ours.true_positives[index] / label.sum())
    assert points["recall"][-1] == points["false_positive_rate"][-1] == 1
    assert ours.best_f1[1] in points["threshold"]
    # No gap is longer than a step, unless it is one point's.
    area = np.trapezoid(points["recall"], points["false_positive_rate"])
    assert area == pytest.approx(ours.auroc[0], abs=2e-3)
