"""Attention as sublayers take it: a backend's own, or PyTorch's where that does not serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gist_kernels.reference.sublayers import attention


def attention_by(kernels: Any) -> tuple[Callable[..., Any], Callable[..., None]]:
    """``attention_forward`` and ``attention_backward`` of a backend's ``SublayerKernels``, given a
    module with ``serves``, ``forward`` and ``backward``."""

    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        num_heads: int,
        scale: float | None,
        need_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        if not kernels.serves(q, k, num_heads):
            out, graph = _forward(q, k, v, num_heads, scale, need_grad)
            return out, None, graph
        return *kernels.forward(q, k, v, num_heads, _scale(q, num_heads, scale)), None

    def backward(
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor | None,
        graph: Any,
        num_heads: int,
        scale: float | None,
        *gradients: torch.Tensor,
    ) -> None:
        if lse is None:
            _backward(d_out, graph, *gradients)
            return
        scale = _scale(q, num_heads, scale)
        kernels.backward(d_out, q, k, v, lse, num_heads, scale, *gradients)

    return forward, backward


def _scale(q: torch.Tensor, num_heads: int, scale: float | None) -> float:
    return (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float | None,
    need_grad: bool,
) -> tuple[torch.Tensor, Any]:
    """PyTorch's, and for backward its graph, if that is needed."""
    if not need_grad:
        return attention(q, k, v, num_heads, scale), None
    # A graph of its own: which of PyTorch's kernels runs, and what it keeps, is not told outside.
    q, k, v = leaves = tuple(part.detach().requires_grad_() for part in (q, k, v))
    with torch.enable_grad():
        out = attention(q, k, v, num_heads, scale)
    return out.detach(), (out, leaves)


def _backward(d_out: torch.Tensor, graph: Any, *gradients: torch.Tensor) -> None:
    """Writes the ``gradients`` of the graph's queries, keys and values."""
    out, leaves = graph
    # Kept: a second backward of the node around it asks again.
    found = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    for gradient, place in zip(found, gradients, strict=True):
        place.copy_(gradient)
