"""Reference of the loss family, built on log-softmax and differentiated by autograd.

Two conventions make it finite where the textbook form is not: a term with probability 0 is 0
whatever its logarithm (0 * -inf = 0), and an ignored row's logits are never looked at, so that
neither they nor a NaN in them reach the gradients.
"""

from __future__ import annotations

import torch

# The public functions define the type of what these return; they import this module's package.
Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def bidirectional_kl(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    *,
    temperature: float,
    weights: tuple[float, float],
    reduction: str,
) -> torch.Tensor:
    """See :func:`gist_kernels.bidirectional_kl`."""
    kl_ab, kl_ba = kl_rows(_accumulate(logits_a), _accumulate(logits_b), temperature)
    rows = _weighted_sum((kl_ab, kl_ba), weights)
    return _reduce(rows, reduction, rows.shape[0])


def gist_loss(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float,
    cls_weight: float,
    gist_weight: float,
    kl_weights: tuple[float, float],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, Terms]:
    """The loss and its four unweighted, detached terms. See :func:`gist_kernels.gist_loss`."""
    cls, gist = _accumulate(cls_logits), _accumulate(gist_logits)
    if target.is_floating_point():
        kept = torch.ones(cls.shape[0], dtype=torch.bool, device=cls.device)
        expected = target.to(cls.dtype)
        count: torch.Tensor | int = cls.shape[0]
    else:
        kept = target != ignore_index
        expected = _one_hot(target.masked_fill(~kept, 0), cls)
        count = kept.sum()
    if label_smoothing:
        expected = expected * (1 - label_smoothing) + label_smoothing / cls.shape[1]
    dropped = ~kept[:, None]
    cls, gist = cls.masked_fill(dropped, 0), gist.masked_fill(dropped, 0)

    all_rows = (
        cross_entropy_rows(cls, expected),
        cross_entropy_rows(gist, expected),
        *kl_rows(cls, gist, temperature),
    )
    rows = tuple(row.masked_fill(~kept, 0) for row in all_rows)
    loss = _weighted_sum(rows, (cls_weight, gist_weight, *kl_weights))
    cls_ce, gist_ce, kl_cls_gist, kl_gist_cls = (
        _reduce(row.detach(), reduction, count) for row in rows
    )
    return _reduce(loss, reduction, count), (cls_ce, gist_ce, kl_cls_gist, kl_gist_cls)


def gist_loss_and_grad(
    cls_logits: torch.Tensor, gist_logits: torch.Tensor, target: torch.Tensor, **options: object
) -> tuple[torch.Tensor, Terms, torch.Tensor, torch.Tensor]:
    """Loss, terms and both gradients. See :func:`gist_kernels.gist_loss_and_grad`."""
    # Autograd is needed whatever mode the caller is in, and takes no inference tensors.
    with torch.inference_mode(False), torch.enable_grad():
        cls, gist, target = (
            t.clone() if t.is_inference() else t.detach() for t in (cls_logits, gist_logits, target)
        )
        cls.requires_grad_()
        gist.requires_grad_()
        loss, terms = gist_loss(cls, gist, target, **options)  # type: ignore[arg-type]
        d_cls, d_gist = torch.autograd.grad(loss.sum(), (cls, gist))
        return loss.detach(), terms, d_cls, d_gist


def kl_rows(
    logits_a: torch.Tensor, logits_b: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``KL(p || q)`` and ``KL(q || p)`` of each row, p and q softmaxes at ``temperature``."""
    log_p = torch.log_softmax(logits_a / temperature, dim=-1)
    log_q = torch.log_softmax(logits_b / temperature, dim=-1)
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
    expected = torch.zeros_like(like).scatter_(1, target.clamp(0, classes - 1)[:, None], 1)
    outside = (target < 0) | (target >= classes)
    return expected.masked_fill(outside[:, None], torch.nan)


def _accumulate(logits: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else is computed in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _weighted_sum(terms: tuple[torch.Tensor, ...], weights: tuple[float, ...]) -> torch.Tensor:
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
