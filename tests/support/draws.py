"""What several random draws say together, where a single one is a matter of luck."""

from __future__ import annotations

from collections.abc import Callable

import torch


def geometric_mean(draws: torch.Tensor) -> torch.Tensor:
    """Over the first dimension: of errors, no draw makes up most of it."""
    return draws.log().mean(0).exp()


def assert_within_bounds(drawn: Callable[[int], dict[str, float]]) -> None:
    """Each tensor's error, as a share of what it may be, is at most 1 in the first draw, or else in
    the geometric mean over eight. ``drawn`` gives the shares of a seed."""
    first = drawn(0)
    if all(share <= 1 for share in first.values()):  # not where one is nan
        return
    every = [first, *(drawn(seed) for seed in range(1, 8))]
    for name in first:
        # A draw without any error does not make up for bad ones.
        mean = geometric_mean(torch.tensor([of[name] for of in every]).clamp_min(0.1))
        assert mean <= 1, (name, every)
