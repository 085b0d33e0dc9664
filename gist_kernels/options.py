"""The loss's settings, as every backend takes them."""

from __future__ import annotations

from typing import NamedTuple


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
