"""What a list of predictions says: confusion, per-class scores, calibration, paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
CALIBRATION_BINS = 15
RESAMPLES = 10_000


def confusion(true: Array, predicted: Array, classes: int) -> Array:
    """(C, C) int64 numbers of images: true classes in rows, predicted ones in columns."""
    flat = np.bincount(true * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes)


@dataclass(frozen=True)
class ClassScores:
    """Scores of each class, (C,) float64; nan where a score is not defined.

    Attributes:
        precision: correct predictions of the class over all predictions of it.
        recall: correct predictions of the class over its images.
        f1: harmonic mean of both: 2 TP / (2 TP + FP + FN).
        support: images of the class, int64.
    """

    precision: Array
    recall: Array
    f1: Array
    support: Array

    @classmethod
    def of(cls, matrix: Array) -> ClassScores:
        """Scores from a matrix of :func:`confusion`."""
        right, support, said = np.diag(matrix), matrix.sum(1), matrix.sum(0)

        def ratio(above: Array, below: Array) -> Array:
            return np.where(below > 0, above / np.maximum(below, 1), np.nan)

        return cls(
            ratio(right, said), ratio(right, support), ratio(2 * right, said + support), support
        )

    def means(self) -> tuple[float, float, float]:
        """Unweighted means over the classes that have a score: precision, recall, F1."""
        scores = (self.precision, self.recall, self.f1)
        return tuple(  # type: ignore[return-value]
            float(np.nanmean(score)) if np.isfinite(score).any() else math.nan for score in scores
        )


class Confused(NamedTuple):
    """A pair of classes: how many images of ``true`` were predicted as ``predicted``."""

    true: int
    predicted: int
    images: int


def most_confused(matrix: Array, count: int = 10) -> list[Confused]:
    """The largest entries off the diagonal, largest first."""
    errors = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    pairs = (divmod(int(flat), len(matrix)) for flat in order)
    return [Confused(t, p, int(errors[t, p])) for t, p in pairs if errors[t, p]]


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram: bins of predictions by their probability.

    Attributes:
        edges: (M + 1,) float64, from 0 to 1.
        images: (M,) int64 predictions in each bin; a bin contains its upper edge.
        probability, accuracy: (M,) float64 means of each bin; nan in an empty one.
    """

    edges: Array
    images: Array
    probability: Array
    accuracy: Array

    @classmethod
    def of(cls, probability: Array, correct: Array, bins: int = CALIBRATION_BINS) -> Calibration:
        """Bins of equal width.

        Args:
            probability: (N,) probabilities of the predicted classes.
            correct: (N,) bool.
            bins: their number, M.
        """
        edges = np.linspace(0, 1, bins + 1)
        index = np.clip(np.searchsorted(edges, probability, side="left") - 1, 0, bins - 1)
        images = np.bincount(index, minlength=bins)

        def mean(values: Array) -> Array:
            totals = np.bincount(index, values.astype(np.float64), minlength=bins)
            return np.where(images > 0, totals / np.maximum(images, 1), np.nan)

        return cls(edges, images, mean(probability), mean(correct))

    @property
    def error(self) -> float:
        """Expected calibration error in [0, 1].

        ECE = sum over bins B of |B| / N * |accuracy(B) - mean probability(B)|: Guo et al., On
        Calibration of Modern Neural Networks, 2017 (arXiv:1706.04599), equation 3; defined by
        Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, 2015.
        """
        filled = self.images > 0
        gap = np.abs(self.accuracy - self.probability)[filled]
        return float((self.images[filled] * gap).sum() / self.images.sum())


@dataclass(frozen=True)
class PairedDifference:
    """Two runs on the same images.

    Attributes:
        images: N.
        only_first, only_second: images that only one of both predicts correctly.
        p_value: of :func:`mcnemar`.
        low, high: of :func:`bootstrap_interval`.
    """

    images: int
    only_first: int
    only_second: int
    p_value: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Array, second: Array) -> PairedDifference:
        """``first`` and ``second`` are (N,) bool: which images each run predicts correctly."""
        lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
        return cls(
            len(first),
            lost,
            gained,
            mcnemar(lost, gained),
            *bootstrap_interval(lost, gained, len(first)),
        )

    @property
    def difference(self) -> float:
        """The second accuracy minus the first."""
        return (self.only_second - self.only_first) / self.images


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test that both runs have the same accuracy.

    Among the n = b + c images that only one run predicts correctly, either run is then as likely:
    p = min(1, 2 sum over k <= min(b, c) of C(n, k) / 2^n). McNemar, Note on the sampling error of
    the difference between correlated proportions or percentages, 1947; the exact form as in
    Fagerland et al., The McNemar test for binary matched-pairs data, 2013, section "The exact
    conditional test". The test is of these two trained models, not of their methods: it does not
    know how another seed would differ.
    """
    n, few = only_first + only_second, min(only_first, only_second)
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(few + 1)
    )
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def bootstrap_interval(
    only_first: int,
    only_second: int,
    images: int,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the difference in accuracy, over resampled pairs.

    An image's pair of results is worth -1, 0 or 1. Drawing N of N pairs with replacement is one
    multinomial draw of how often each value comes. Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, section 13.3.

    Args:
        only_first, only_second: images that only one run predicts correctly.
        images: N.
        confidence: of the two-sided interval.
        resamples: draws.
        seed: of the draws.
    """
    shares = np.array([only_first, only_second, images - only_first - only_second]) / images
    drawn = np.random.default_rng(seed).multinomial(images, shares, size=resamples)
    outside = (1 - confidence) / 2
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / images, [outside, 1 - outside])
    return float(low), float(high)
