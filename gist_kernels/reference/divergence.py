"""Reference of the Jensen-Shannon divergence, on log-softmax, differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def jensen_shannon(
    sides: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    temperatures: tuple[float, ...],
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row's divergence (B,). See :func:`gist_kernels.jensen_shannon`."""
    sides = [side if side.dtype == torch.float64 else side.float() for side in sides]
    if row_scale is not None:
        sides = [side.masked_fill((row_scale == 0)[:, None], 0) for side in sides]
    logs = [
        torch.log_softmax(side / t, dim=-1) for side, t in zip(sides, temperatures, strict=True)
    ]
    # Absent everywhere, a class is left out: the logarithm of its mixture has no gradient.
    absent = torch.stack([log.exp() == 0 for log in logs]).all(0)
    logs = [log.masked_fill(absent, 0) for log in logs]
    scaled = [log + math.log(w) for log, w in zip(logs, weights, strict=True)]
    mixture = torch.logsumexp(torch.stack(scaled), dim=0)
    rows = torch.zeros_like(mixture[:, 0])
    for log, weight in zip(logs, weights, strict=True):
        # Probability 0 adds 0, and its logarithm must not reach the gradient.
        nothing = absent | (log.exp() == 0)
        difference = log.masked_fill(nothing, 0) - mixture.masked_fill(nothing, 0)
        p = log.masked_fill(nothing, -torch.inf).exp()
        rows = rows + weight * (p * difference).sum(-1)
    if row_scale is None:
        return rows
    return rows.masked_fill(row_scale == 0, 0) * row_scale
