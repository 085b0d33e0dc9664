"""The training loss, as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gist_kernels
from gist.model.wrapped import GistOutput


class GistLoss(nn.Module):
    """:func:`gist_kernels.gist_loss` of a :class:`gist.GistOutput`; cross-entropy of plain logits.

    One loop thus trains with GIST and without. Defaults are the published values
    (arXiv:2312.07255). The arguments are those of :func:`gist_kernels.gist_loss`, and:

    Args:
        detach: "cls" or "gist", the side that the KL terms don't train; None trains both, as
            released. The cross-entropies train both sides in any case.
        class_weights: of each class, a positive factor on all terms of its images. The mean still
            divides by the number of images, so that parts of a batch add up to the whole. Class
            probabilities have their mean weight. None: 1 for every class.

    Attributes:
        kl_scale: factor on both KL terms; 1, unless a schedule sets it at each step.
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
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if class_weights is not None and not all(0 < w < math.inf for w in class_weights):
            raise ValueError(f"class_weights must be positive numbers; they are {class_weights}")
        if detach not in (None, "cls", "gist"):
            raise ValueError(f"detach must be 'cls', 'gist' or None; it is {detach!r}")
        self.temperature = temperature
        self.cls_weight = cls_weight
        self.gist_weight = gist_weight
        self.kl_weights = kl_weights
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.detach = detach
        self.kl_scale = 1.0
        weights = None if class_weights is None else torch.tensor(class_weights).float()
        self.class_weights: torch.Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

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
        return self._of_both(output, target, return_terms=False)

    def with_terms(
        self, output: GistOutput, target: torch.Tensor
    ) -> tuple[torch.Tensor, gist_kernels.GistLossTerms]:
        """The loss of a GistOutput, and its four terms, unweighted and without gradient."""
        return self._of_both(output, target, return_terms=True)

    def _of_both(self, output: GistOutput, target: torch.Tensor, *, return_terms: bool) -> Any:
        cls_logits, gist_logits = output
        cls_weight, gist_weight, apart = self.cls_weight, self.gist_weight, None
        if self.detach == "cls":
            apart, cls_weight = cls_weight * self._cross_entropy(cls_logits, target), 0.0
            cls_logits = cls_logits.detach()
        elif self.detach == "gist":
            apart, gist_weight = gist_weight * self._cross_entropy(gist_logits, target), 0.0
            gist_logits = gist_logits.detach()
        gist_loss: Any = gist_kernels.gist_loss
        result = gist_loss(
            cls_logits,
            gist_logits,
            target,
            temperature=self.temperature,
            cls_weight=cls_weight,
            gist_weight=gist_weight,
            kl_weights=tuple(self.kl_scale * weight for weight in self.kl_weights),
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            row_weight=self._row_weight(cls_logits, target),
            return_terms=return_terms,
        )
        if apart is None:
            return result
        return (result[0] + apart, result[1]) if return_terms else result + apart

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = self._row_weight(logits, target)
        loss = F.cross_entropy(
            logits.float() if self.detach and logits.dtype.itemsize < 4 else logits,
            target,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction="mean" if weights is None else "none",
        )
        if weights is None:
            return loss
        images = len(target) if target.is_floating_point() else (target != self.ignore_index).sum()
        return (weights * loss).sum() / images

    def _row_weight(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        """(B,) float32, the weight of each image."""
        if self.class_weights is None:
            return None
        if len(self.class_weights) != logits.shape[-1]:
            raise ValueError(
                f"class_weights must have one number per class, {logits.shape[-1]}; they have "
                f"{len(self.class_weights)}"
            )
        if self.class_weights.device != target.device:
            self.class_weights = self.class_weights.to(target.device)
        if target.is_floating_point():
            return target.float() @ self.class_weights
        return self.class_weights[target.masked_fill(target == self.ignore_index, 0)]
