"""Reference of the loss family, built on log-softmax and differentiated by autograd.

Two conventions make it finite where the textbook form is not. A term with probability 0 is 0,
whatever its logarithm (0 * -inf = 0). The logits of an ignored row are never read, so neither they
nor a NaN in them reach the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gist_kernels import check
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.tracing import batched


def gist_loss(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    want_terms: bool = True,
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss and its unweighted, detached terms, (4,) or (4, B).

    See :func:`gist_kernels.gist_loss`, and :func:`gist_kernels.bidirectional_kl` without target.
    ``row_scale`` is as in :class:`~gist_kernels.kernels.protocols.LossKernels`.
    """
    cls, gist = _accumulate(cls_logits), _accumulate(gist_logits)
    rows, classes = cls.shape
    kept = torch.ones(rows, dtype=torch.bool, device=cls.device)
    count: torch.Tensor | int = rows
    expected = torch.zeros_like(cls)
    if target is not None and target.is_floating_point():
        expected = target.to(cls.dtype)
    elif target is not None:
        if cls.device.type == "cpu" and not (torch.compiler.is_compiling() or batched(target)):
            seen = target
            if row_scale is not None:
                seen = target.masked_fill(row_scale == 0, options.ignore_index)
            check.class_indices("target", seen, classes, options.ignore_index)
        kept = target != options.ignore_index
        count = kept.sum()
        expected = _one_hot(target.masked_fill(~kept, 0), cls)
    if row_scale is not None:
        kept = kept & (row_scale != 0)
    if target is not None and options.label_smoothing:
        smoothing = options.label_smoothing
        expected = expected * (1 - smoothing) + smoothing / classes
    dropped = ~kept[:, None]
    cls, gist = cls.masked_fill(dropped, 0), gist.masked_fill(dropped, 0)

    by_row = (
        cross_entropy_rows(cls, expected),
        cross_entropy_rows(gist, expected),
        *kl_rows(cls, gist, options.temperature, options.gist_scale, options.stop_gradient),
    )
    terms = [term.masked_fill(~kept, 0) for term in by_row]
    if row_scale is not None:
        terms = [term * row_scale for term in terms]
    loss = _reduce(_weighted_sum(terms, options[1:5]), options.reduction, count)
    if not want_terms:
        return loss, None
    return loss, torch.stack([_reduce(term.detach(), options.reduction, count) for term in terms])


def gist_loss_and_grad(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and both gradients. See :func:`gist_kernels.gist_loss_and_grad`."""
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or torch.compiler.is_compiling():  # both take no requires_grad_()
        if not transformed:
            cls_logits, gist_logits = cls_logits.detach(), gist_logits.detach()

        def summed(cls: torch.Tensor, gist: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss, _ = gist_loss(cls, gist, target, options, False, row_scale)
            return loss.sum(), loss

        both: Any = torch.func.grad(summed, argnums=(0, 1), has_aux=True)(cls_logits, gist_logits)
        (d_cls, d_gist), loss = both
        return loss, d_cls, d_gist
    # Autograd is needed whatever mode the caller is in, and takes no inference tensors.
    with torch.inference_mode(False), torch.enable_grad():
        cls, gist, target = (
            t.clone() if t.is_inference() else t.detach() for t in (cls_logits, gist_logits, target)
        )
        cls.requires_grad_()
        gist.requires_grad_()
        loss, _ = gist_loss(cls, gist, target, options, False, row_scale)
        d_cls, d_gist = torch.autograd.grad(loss.sum(), (cls, gist), materialize_grads=True)
        return loss.detach(), d_cls, d_gist


def kl_rows(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    temperature: float,
    scale_b: float = 1.0,
    stop_gradient: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``KL(p || q)`` and ``KL(q || p)`` of each row, p and q softmaxes at ``temperature`` and at
    ``temperature / scale_b``."""
    log_p = torch.log_softmax(logits_a / temperature, dim=-1)
    log_q = torch.log_softmax(logits_b / (temperature / scale_b), dim=-1)
    log_p = log_p.detach() if stop_gradient == "a" else log_p
    log_q = log_q.detach() if stop_gradient == "b" else log_q
    if stop_gradient == "targets":
        return _kl(log_p.detach(), log_q), _kl(log_q.detach(), log_p)
    return _kl(log_p, log_q), _kl(log_q, log_p)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    # Masked before the difference, not after the product: only so is the gradient finite too.
    empty = p == 0
    return (p * (log_p.masked_fill(empty, 0) - log_q.masked_fill(empty, 0))).sum(-1)


def cross_entropy_rows(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """``-sum(expected * log_softmax(logits))`` of each row."""
    log_p = torch.log_softmax(logits, dim=-1).masked_fill(expected == 0, 0)
    return -(expected * log_p).sum(-1)


def _one_hot(target: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows of 0 and 1; NaN for a class out of range, where the caller could not check (GPU)."""
    classes = like.shape[1]
    expected = (target[:, None] == torch.arange(classes, device=like.device)).to(like.dtype)
    outside = (target < 0) | (target >= classes)
    return expected.masked_fill(outside[:, None], torch.nan)


def _accumulate(logits: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else is computed in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _weighted_sum(terms: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """A weight of 0 leaves its term out: one direction may be infinite and unwanted."""
    total = torch.zeros_like(terms[0])
    for term, weight in zip(terms, weights, strict=True):
        if weight:
            total = total + weight * term
    return total


def _reduce(rows: torch.Tensor, reduction: str, count: torch.Tensor | int) -> torch.Tensor:
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / count
