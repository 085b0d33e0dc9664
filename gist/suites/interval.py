"""Confidence intervals of a mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


def t_quantile(p: float, dof: int) -> float:
    """Quantile of Student's t for an integer number of degrees of freedom.

    The distribution function is the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4;
    it is inverted by bisection of the angle ``atan(t / sqrt(dof))``, to about 1e-14.
    """
    if dof < 1:
        raise ValueError(f"dof must be at least 1; it is {dof}")
    if not 0 < p < 1:
        raise ValueError(f"p must be between 0 and 1; it is {p}")

    def central(angle: float) -> float:  # P(|T| < t)
        cos2, odd = math.cos(angle) ** 2, dof % 2
        term = total = math.cos(angle) if odd else 1.0
        for k in range(2 + odd, dof - 1, 2):
            term *= cos2 * (k - 1) / k
            total += term
        if odd:
            return 2 / math.pi * (angle + (math.sin(angle) * total if dof > 1 else 0))
        return math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < abs(2 * p - 1) else (low, middle)
    return math.copysign(math.sqrt(dof) * math.tan((low + high) / 2), p - 0.5)


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds with its 95 % interval; low and high are nan for one seed."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t over independent values."""
        n, centre = len(values), mean(values)
        if n < 2:
            return cls(centre, math.nan, math.nan, n)
        half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * stdev(values) / math.sqrt(n)
        return cls(centre, centre - half, centre + half, n)
