"""Reference of multi-head attention, by PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gist_kernels.reference.rotation import rotate
from gist_kernels.tracing import needs_dispatcher, transformed, under_transform
from gist_kernels.weights import Rotation


def prefix_attention(
    qkv: torch.Tensor,
    num_heads: int,
    num_queries: int | None,
    scale: float | None,
    rotation: Rotation | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a packed (B, N, 3 H Dh), see :func:`gist_kernels.prefix_attention`."""
    q, k, v = qkv.chunk(3, dim=-1)
    return attention(q[:, :num_queries], k, v, num_heads, scale, rotation, lengths)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float | None,
    rotation: Rotation | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention (B, Q, H Dh) of the first tokens' (B, Q, H Dh) queries over all tokens'
    (B, N, H Dh) keys and values, or over the first ``lengths`` of each row."""
    padding = mask = None
    if lengths is not None:
        padding = torch.arange(k.shape[1], device=k.device) >= lengths.unsqueeze(-1)
        mask = ~padding[:, None, None]
        # A masked score is no protection from a nan: 0 times a nan value is nan.
        q, k, v = (_without(part, padding) for part in (q, k, v))
    q, k, v = (part.unflatten(-1, (num_heads, -1)) for part in (q, k, v))
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if needs_dispatcher(q, k, v, mask):
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    elif under_transform():
        out = _formula(q, k, v, scale, mask)
    else:
        out = _Attention.apply(q, k, v, scale, mask, torch.is_grad_enabled())
    out = out.transpose(1, 2).flatten(2)
    return out if padding is None else _without(out, padding)


def _without(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """(B, T, D) with zeros for the tokens of (B, N) that are padding, as their gradients."""
    return x.masked_fill(padding[:, : x.shape[1], None], 0.0)


def _formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """``softmax(scale * q k^T) v`` of (B, H, N, Dh) in operators that have every derivative."""
    wide = torch.promote_types(q.dtype, torch.float32)
    weights, _ = _weights(q.to(wide), k.to(wide), scale, mask)
    return (weights @ v.to(wide)).to(q.dtype)


def _gradients(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Those of :func:`_formula`, in such operators too."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    d_out, q, k, v = (part.to(wide) for part in (d_out, q, k, v))
    weights, scale = _weights(q, k, scale, mask)
    of_weights = weights * (d_out @ v.mT)
    d_scores = scale * (of_weights - weights * of_weights.sum(-1, keepdim=True))
    found = d_scores @ k, d_scores.mT @ q, weights.mT @ d_out
    return tuple(part.to(dtype) for part in found)


def _weights(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q @ k.mT)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1), scale


class _Attention(torch.autograd.Function):
    """PyTorch's attention; gradients by the formula where more is asked than its kernels have."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        mask: torch.Tensor | None,
        need_grad: bool,
    ) -> torch.Tensor:
        if not need_grad:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, mask)
        ctx.leaves = q, k, v = tuple(part.detach().requires_grad_() for part in (q, k, v))
        with torch.enable_grad():
            ctx.out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed(d_out):
            return *_gradients(d_out, q, k, v, ctx.scale, mask), None, None, None
        # Kept: a second backward asks again.
        grads = torch.autograd.grad(ctx.out, ctx.leaves, d_out, retain_graph=True)
        return *grads, None, None, None
