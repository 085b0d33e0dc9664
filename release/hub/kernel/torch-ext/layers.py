"""Layers without state: ``kernels.kernelize`` puts their ``forward`` into a model's own layers."""

from __future__ import annotations

import torch
from torch import nn

from .activations import Activation
from .functional.adapter import adapter
from .functional.divergence import bidirectional_kl, jensen_shannon
from .functional.loss import gist_loss


class GistLoss(nn.Module):
    """The GIST training loss (arXiv:2312.07255) with its published weights; a mean over rows.

    ``cls_logits`` and ``gist_logits`` are (..., C), ``target`` is (...) int64 class indices or
    (..., C) probabilities.
    """

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(
        self, cls_logits: torch.Tensor, gist_logits: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        return gist_loss(cls_logits, gist_logits, target)


class BidirectionalKL(nn.Module):
    """``KL(p || q) + KL(q || p)`` of two (..., C) logits' softmaxes; a mean over rows."""

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(self, logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
        return bidirectional_kl(logits_a, logits_b)


class JensenShannon(nn.Module):
    """The Jensen-Shannon divergence of two (..., C) logits' softmaxes; a mean over rows."""

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(self, logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
        return jensen_shannon(logits_a, logits_b)


class Adapter(nn.Module):
    """The bottleneck adapter ``scale * up(activation(down(x)))`` of (..., D).

    The adopting layer has the members that are annotated here.
    """

    can_torch_compile: bool = True
    has_backward: bool = True

    down: nn.Linear
    up: nn.Linear
    scale: float
    activation: Activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return adapter(
            x, self.down.weight, self.down.bias, self.up.weight, self.up.bias,
            scale=self.scale, activation=self.activation,
        )  # fmt: skip
