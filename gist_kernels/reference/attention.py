"""Reference of multi-head attention, by PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def prefix_attention(
    qkv: torch.Tensor, num_heads: int, num_queries: int | None, scale: float | None
) -> torch.Tensor:
    """Attention over a packed (B, N, 3 H Dh), see :func:`gist_kernels.prefix_attention`."""
    q, k, v = qkv.chunk(3, dim=-1)
    return attention(q[:, :num_queries], k, v, num_heads, scale)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, scale: float | None
) -> torch.Tensor:
    """Attention (B, Q, H Dh) of (B, Q, H Dh) queries over (B, N, H Dh) keys and values."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
