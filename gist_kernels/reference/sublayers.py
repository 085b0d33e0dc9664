"""Reference of a pre-norm transformer block's two sublayers with an adapter beside each
(arXiv:2312.07255)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gist_kernels.options import AdapterWeights, AttentionWeights, MlpWeights, NormWeights
from gist_kernels.reference.adapter import ACTIVATIONS
from gist_kernels.reference.adapter import adapter as bottleneck


def prefix_attention(
    qkv: torch.Tensor, num_heads: int, *, num_queries: int | None, scale: float | None
) -> torch.Tensor:
    """Attention of a packed (B, N, 3 H Dh), see :func:`gist_kernels.prefix_attention`."""
    q, k, v = qkv.chunk(3, dim=-1)
    return attention(q[:, :num_queries], k, v, num_heads, scale)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, scale: float | None
) -> torch.Tensor:
    """Of (B, Q, H Dh) queries over (B, N, H Dh) keys and values; returns (B, Q, H Dh)."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def adapter_attention(
    x: torch.Tensor,
    norm: NormWeights,
    weights: AttentionWeights,
    adapter: AdapterWeights | None,
    *,
    num_queries: int | None,
    drop_path: torch.Tensor | None,
    grad_tokens: tuple[int, int] | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_attention`."""
    if grad_tokens is not None:
        start, count = grad_tokens
        before, tokens, after = x.tensor_split((start, start + count), dim=1)
        x = torch.cat((before.detach(), tokens, after.detach()), dim=1)
    normed = F.layer_norm(x, x.shape[-1:], *norm)
    q, k, v = _projections(normed, weights, num_queries)
    out = attention(q, k, v, weights.num_heads, weights.scale)
    out = F.linear(out, weights.proj_weight, weights.proj_bias)
    return _join(x[:, :num_queries], out, weights.layer_scale, adapter, drop_path)


def adapter_mlp(
    x: torch.Tensor,
    norm: NormWeights,
    weights: MlpWeights,
    adapter: AdapterWeights | None,
    *,
    drop_path: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_mlp`."""
    normed = F.layer_norm(x, x.shape[-1:], *norm)
    hidden = ACTIVATIONS[weights.activation](F.linear(normed, weights.fc1_weight, weights.fc1_bias))
    out = F.linear(hidden, weights.fc2_weight, weights.fc2_bias)
    return _join(x, out, weights.layer_scale, adapter, drop_path)


def _projections(
    normed: torch.Tensor, weights: AttentionWeights, num_queries: int | None
) -> tuple[torch.Tensor, ...]:
    """Queries of the first tokens, keys and values of all."""
    weight, bias = weights.qkv_weight, weights.qkv_bias
    if num_queries is None:
        return F.linear(normed, weight, bias).chunk(3, dim=-1)
    inner = weight.shape[0] // 3
    of_queries, of_keys = (
        F.linear(part, weight[rows], None if bias is None else bias[rows])
        for part, rows in (
            (normed[:, :num_queries], slice(0, inner)),
            (normed, slice(inner, None)),
        )
    )
    return of_queries, *of_keys.chunk(2, dim=-1)


def _join(
    x: torch.Tensor,
    out: torch.Tensor,
    layer_scale: torch.Tensor | None,
    adapter: AdapterWeights | None,
    drop_path: torch.Tensor | None,
) -> torch.Tensor:
    """Residual, sublayer and adapter. Drop-path drops the sublayer, never the adapter."""
    for factor in (layer_scale, drop_path):
        out = out if factor is None else out * factor
    out = x + out
    if adapter is None:
        return out
    parameters: Any = (None if p is None else p.to(x.dtype) for p in adapter[:4])
    return bottleneck(
        x, *parameters, scale=adapter.scale, activation=adapter.activation, residual=out
    )
