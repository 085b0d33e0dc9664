"""Settings and weights of the operations, as every backend takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LossOptions(NamedTuple):
    """Checked arguments of :func:`gist_kernels.gist_loss`, under the names kernels use.

    ``bidirectional_kl`` is a ``gist_loss`` without target.
    """

    temperature: float
    cls_weight: float
    gist_weight: float
    kl_cls_gist_weight: float
    kl_gist_cls_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: str
    """"mean", "sum" or "none"; "batchmean" is "mean"."""


class Norm(NamedTuple):
    """A frozen LayerNorm over D features."""

    weight: torch.Tensor | None
    """(D,), or None for 1."""
    bias: torch.Tensor | None
    """(D,), or None for 0."""
    eps: float


class Adapter(NamedTuple):
    """A bottleneck ``scale * (act(x Wd^T + bd) Wu^T + bu)`` of rank r on D features."""

    down_weight: torch.Tensor
    """(r, D), Wd."""
    down_bias: torch.Tensor | None
    """(r,), bd."""
    up_weight: torch.Tensor
    """(D, r), Wu."""
    up_bias: torch.Tensor | None
    """(D,), bu."""
    scale: float
    activation: str
    """A key of ``reference.adapter.ACTIVATIONS``."""
