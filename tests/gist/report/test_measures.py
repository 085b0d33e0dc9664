"""Figures of a report: those of scikit-learn, of SciPy's binomial test, and sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gist.report.measures import (
    Calibration,
    ClassScores,
    Confused,
    PairedDifference,
    bootstrap_interval,
    confusion,
    mcnemar,
    most_confused,
)

CLASSES = 5


@pytest.fixture
def labels() -> tuple[np.ndarray, np.ndarray]:
    """True and predicted classes; class 3 is never predicted, class 4 never true."""
    random = np.random.default_rng(0)
    true = random.integers(0, 4, 200)
    predicted = np.where(random.random(200) < 0.6, true, random.integers(0, 5, 200))
    return true, np.where(predicted == 3, 4, predicted)


def test_confusion_and_scores_are_those_of_scikit_learn(labels):
    metrics = pytest.importorskip("sklearn.metrics")
    matrix = confusion(*labels, CLASSES)
    every = list(range(CLASSES))
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(*labels, labels=every))
    scores = ClassScores.of(matrix)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        *labels, labels=every, zero_division=np.nan
    )
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    np.testing.assert_array_equal(scores.support, support)
    assert math.isnan(scores.precision[3])
    assert math.isnan(scores.recall[4])
    assert scores.means() == pytest.approx([np.nanmean(x) for x in (precision, recall, f1)])


def test_the_most_confused_pairs_come_first():
    matrix = np.array([[9, 2, 0], [5, 1, 0], [2, 0, 3]])
    assert most_confused(matrix, 2) == [Confused(1, 0, 5), Confused(0, 1, 2)]
    assert most_confused(np.eye(3, dtype=int)) == []


def test_calibration_by_hand():
    probability = np.array([0.5, 0.25, 0.3, 0.9, 1.0, 0.8])  # an upper edge is within its bin
    correct = np.array([True, False, True, True, False, True])
    found = Calibration.of(probability, correct, bins=4)
    assert found.images.tolist() == [1, 2, 0, 3]
    assert found.accuracy[[0, 1, 3]] == pytest.approx([0, 1, 2 / 3])
    assert found.probability[[0, 1, 3]] == pytest.approx([0.25, 0.4, 0.9])
    assert math.isnan(found.accuracy[2])
    assert found.error == pytest.approx((0.25 + 2 * 0.6 + 3 * abs(2 / 3 - 0.9)) / 6)


def test_calibration_is_that_of_a_loop():
    random = np.random.default_rng(1)
    probability = random.random(500)
    correct = random.random(500) < probability**2
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (probability > low) & (probability <= low + 1 / 15)
        if inside.any():
            gap = abs(correct[inside].mean() - probability[inside].mean())
            error += inside.mean() * gap
    assert Calibration.of(probability, correct).error == pytest.approx(error)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 7), (9, 9), (11, 16), (400, 460)])
def test_mcnemar_is_the_binomial_test(b, c):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_that_of_resampled_images():
    random = np.random.default_rng(2)
    first, second = random.random(300) < 0.7, random.random(300) < 0.8
    found = PairedDifference.of(first, second)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert (found.only_first, found.only_second) == (
        (first & ~second).sum(), (second & ~first).sum(),
    )  # fmt: skip
    change = second.astype(int) - first
    drawn = change[random.integers(0, 300, (4000, 300))].mean(1)
    # Quantiles of two samples of draws, whose own spread is about a twentieth of the interval.
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.008)
    assert found.low < found.difference < found.high
    assert bootstrap_interval(0, 0, 10) == (0, 0)
