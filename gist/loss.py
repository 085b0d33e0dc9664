"""The training loss as a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import gist_kernels
from gist.model import GistOutput


class GistLoss(nn.Module):
    """:func:`gist_kernels.gist_loss` of a :class:`gist.GistOutput`; cross-entropy of plain logits.

    So the same loop trains with GIST and without. Defaults are the published ones
    (arXiv:2312.07255); the arguments are those of :func:`gist_kernels.gist_loss`, and

    Args:
        detach: "cls" or "gist", the side that the KL terms don't train; None trains both, as
            released. Either side's cross-entropy trains it in any case.
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
        detach: str | None = None,
    ) -> None:
        super().__init__()
        if detach not in (None, "cls", "gist"):
            raise ValueError(f"detach must be 'cls', 'gist' or None; it is {detach!r}")
        self.temperature = temperature
        self.cls_weight = cls_weight
        self.gist_weight = gist_weight
        self.kl_weights = kl_weights
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.detach = detach

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, cls_weight={self.cls_weight}, "
            f"gist_weight={self.gist_weight}, kl_weights={self.kl_weights}, "
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"detach={self.detach!r}"
        )

    def forward(self, output: torch.Tensor | GistOutput, target: torch.Tensor) -> torch.Tensor:
        """Mean loss of (B, C) logits, or a GistOutput of two, against (B,) int64 class indices or
        (B, C) probabilities."""
        if isinstance(output, torch.Tensor):
            return self._cross_entropy(output, target)
        cls_logits, gist_logits = output
        weights, alone = [self.cls_weight, self.gist_weight], None
        if self.detach == "cls":
            weights[0], alone = 0.0, self.cls_weight * self._cross_entropy(cls_logits, target)
            cls_logits = cls_logits.detach()
        elif self.detach == "gist":
            weights[1], alone = 0.0, self.gist_weight * self._cross_entropy(gist_logits, target)
            gist_logits = gist_logits.detach()
        loss = gist_kernels.gist_loss(
            cls_logits,
            gist_logits,
            target,
            temperature=self.temperature,
            cls_weight=weights[0],
            gist_weight=weights[1],
            kl_weights=self.kl_weights,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
        return loss if alone is None else loss + alone

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            logits.float() if self.detach else logits,
            target,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
