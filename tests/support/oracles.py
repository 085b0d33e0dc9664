"""Independent transcriptions of the published equations, in float64, for the tests to hold to.

They share no code with the packages: each follows the text of the method, not an implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F


def released_loss(
    cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor, temperature: float = 3.0
) -> torch.Tensor:
    """The loss as released: logarithms of softmaxes, NaN once a probability underflows."""
    p, q = (cls / temperature).softmax(1), (gist / temperature).softmax(1)
    kl = F.kl_div(q.log(), p, reduction="batchmean") + F.kl_div(p.log(), q, reduction="batchmean")
    return F.cross_entropy(cls, target) + 0.5 * F.cross_entropy(gist, target) + 0.75 * kl


def log_softmax_terms(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    temperature: float,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """The four terms of each row in PyTorch's own log-softmax operators, for finite logits."""
    log_p = F.log_softmax(cls / temperature, 1)
    log_q = F.log_softmax(gist / temperature, 1)
    kl_pq = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    kl_qp = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    if target is None:
        return torch.zeros_like(kl_pq), torch.zeros_like(kl_pq), kl_pq, kl_qp
    cross_entropies = (
        F.cross_entropy(side, target, reduction="none", label_smoothing=label_smoothing)
        for side in (cls, gist)
    )
    return *cross_entropies, kl_pq, kl_qp


def kl_by_definition(a: Sequence[float], b: Sequence[float], temperature: float) -> float:
    """KL(softmax(a / T) || softmax(b / T)) of one row in Python floats; 0 * log 0 is 0."""

    def log_probabilities(logits: Sequence[float]) -> list[float]:
        scaled = [x / temperature for x in logits]
        top = max(scaled)
        log_sum = math.log(sum(math.exp(x - top) for x in scaled))
        return [x - top - log_sum for x in scaled]

    terms = (
        math.exp(lp) * (lp - lq)
        for lp, lq in zip(log_probabilities(a), log_probabilities(b), strict=True)
        if math.exp(lp) > 0
    )
    return math.fsum(terms)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "identity": lambda x: x * 1,
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "silu": lambda x: x * torch.sigmoid(x),
}


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    scale: float,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scale * (act(z) Wu^T + bu)`` and ``z = x Wd^T + bd``."""
    z = x @ down_weight.T
    z = z if down_bias is None else z + down_bias
    up = ACTIVATIONS[activation](z) @ up_weight.T
    return scale * (up if up_bias is None else up + up_bias), z


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v of each head, and log sum exp(scale q k^T), (B, H, Q)."""
    head_dim = q.shape[-1] // num_heads
    q, k, v = (x.unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for x in (q, k, v))
    scores = scale * (q @ k.mT)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1)


def rotation_matrices(rotation: Any, num_heads: int, tokens: int) -> torch.Tensor:
    """The (H, N, Dh, Dh) matrices that rotary positions multiply each token's head by: the identity
    outside the rotated tokens."""
    sin, cos = (t.double().expand(num_heads, *t.shape[-2:]) for t in (rotation.sin, rotation.cos))
    head_dim = sin.shape[-1]
    matrices = torch.eye(head_dim).to(sin).repeat(num_heads, tokens, 1, 1)
    own = matrices[:, rotation.start : rotation.start + sin.shape[1]]
    for pair in range(head_dim // 2):
        i, j = (pair, pair + head_dim // 2) if rotation.half else (2 * pair, 2 * pair + 1)
        own[..., i, i], own[..., i, j] = cos[..., i], -sin[..., i]
        own[..., j, i], own[..., j, j] = sin[..., j], cos[..., j]
    return matrices


def rotated(x: torch.Tensor, num_heads: int, rotation: Any) -> torch.Tensor:
    """Rotary positions of (B, T, H Dh) from the first token on, in x's dtype."""
    count = max(x.shape[1], rotation.start + rotation.sin.shape[-2])
    matrices = rotation_matrices(rotation, num_heads, count)[:, : x.shape[1]].to(x)
    return torch.einsum("htij,bthj->bthi", matrices, x.unflatten(-1, (num_heads, -1))).flatten(2)


def reduced(
    rows: torch.Tensor,
    reduction: str,
    mask: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    divisor: float | torch.Tensor | None,
) -> torch.Tensor:
    """Rows' losses to the loss: masked rows out, weights on, a mean over the rows that count."""
    counts = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask
    weighted = rows if row_weight is None else rows * row_weight.double()
    weighted = torch.where(counts, weighted, 0.0)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    return weighted.sum() / (max(int(counts.sum()), 1) if divisor is None else divisor)


def kl_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    temperatures: tuple[float, float],
    weights: tuple[float, float],
    stop_gradient: str | None,
) -> torch.Tensor:
    """weights[0] KL(p || q) + weights[1] KL(q || p) over the last dimension, from log-softmaxes."""
    log_p, log_q = (F.log_softmax(x / t, -1) for x, t in zip((a, b), temperatures, strict=True))
    log_p = log_p.detach() if stop_gradient == "a" else log_p
    log_q = log_q.detach() if stop_gradient == "b" else log_q
    p, q = (x.detach() if stop_gradient == "targets" else x for x in (log_p, log_q))
    kl_pq = (p.exp() * (p - log_q)).sum(-1)
    kl_qp = (q.exp() * (q - log_p)).sum(-1)
    return weights[0] * kl_pq + weights[1] * kl_qp


def jensen_shannon_rows(
    sides: Sequence[torch.Tensor], weights: Sequence[float], temperatures: Sequence[float]
) -> torch.Tensor:
    """sum_k w_k KL(p_k || sum_j w_j p_j) over the last dimension, for finite logits."""
    logs = [F.log_softmax(x / t, -1) for x, t in zip(sides, temperatures, strict=True)]
    mixture = torch.stack([x + math.log(w) for x, w in zip(logs, weights, strict=True)])
    mixture = mixture.logsumexp(0)
    return sum(w * (x.exp() * (x - mixture)).sum(-1) for x, w in zip(logs, weights, strict=True))
