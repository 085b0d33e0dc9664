"""The training loss as a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gist_kernels
from gist.model import GistOutput


class GistLoss(nn.Module):
    """:func:`gist_kernels.gist_loss` of a :class:`gist.GistOutput`; cross-entropy of plain logits.

    So the same loop trains with GIST and without. Defaults are the published ones
    (arXiv:2312.07255); the arguments are those of :func:`gist_kernels.gist_loss`.
    """

    def __init__(
        self,
        *,
        temperature: float = 3.0,
        cls_weight: float = 1.0,
        gist_weight: float = 0.5,
        kl_weights: tuple[float, float] = (0.75, 0.75),
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.cls_weight = cls_weight
        self.gist_weight = gist_weight
        self.kl_weights = kl_weights
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, cls_weight={self.cls_weight}, "
            f"gist_weight={self.gist_weight}, kl_weights={self.kl_weights}, "
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}"
        )

    def forward(self, output: torch.Tensor | GistOutput, target: torch.Tensor) -> torch.Tensor:
        """Mean loss of (B, C) logits, or a GistOutput of two, against (B,) int64 class indices or
        (B, C) probabilities."""
        if isinstance(output, torch.Tensor):
            return F.cross_entropy(
                output,
                target,
                label_smoothing=self.label_smoothing,
                ignore_index=self.ignore_index,
            )
        return gist_kernels.gist_loss(
            output.cls_logits, output.gist_logits, target, **self._options()
        )

    def with_terms(
        self, output: GistOutput, target: torch.Tensor
    ) -> tuple[torch.Tensor, gist_kernels.GistLossTerms]:
        """The loss of a GistOutput, and its four terms, unweighted and without gradient."""
        return gist_kernels.gist_loss(
            output.cls_logits, output.gist_logits, target, return_terms=True, **self._options()
        )

    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "cls_weight": self.cls_weight,
            "gist_weight": self.gist_weight,
            "kl_weights": self.kl_weights,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
        }
