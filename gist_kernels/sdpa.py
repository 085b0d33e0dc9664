"""Attention by PyTorch's own kernels, in the form that sublayers take it."""

from __future__ import annotations

from typing import Any

import torch

from gist_kernels.reference.sublayers import attention


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float | None,
    need_grad: bool,
) -> tuple[torch.Tensor, None, Any]:
    """``(out, None, graph)`` of (B, Q, H Dh) queries over (B, N, H Dh) keys and values."""
    if not need_grad:
        return attention(q, k, v, num_heads, scale), None, None
    # A graph of its own: which of PyTorch's kernels runs, and what it keeps, is not told outside.
    q, k, v = leaves = tuple(part.detach().requires_grad_() for part in (q, k, v))
    with torch.enable_grad():
        out = attention(q, k, v, num_heads, scale)
    return out.detach(), None, (out, leaves)


def backward(d_out: torch.Tensor, graph: Any, *gradients: torch.Tensor) -> None:
    """Writes the ``gradients`` of the graph's queries, keys and values."""
    out, leaves = graph
    # Kept: a second backward of the node around it asks again.
    found = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    for gradient, place in zip(found, gradients, strict=True):
        place.copy_(gradient)
