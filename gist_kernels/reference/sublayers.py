"""Reference of a transformer block's two sublayers with an adapter beside each
(arXiv:2312.07255)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gist_kernels.activations import ACTIVATIONS
from gist_kernels.quantised import QuantisedWeight
from gist_kernels.reference.adapter import adapter as bottleneck
from gist_kernels.reference.attention import attention
from gist_kernels.weights import (
    AdapterWeights,
    AttentionWeights,
    LinearUpdate,
    MlpWeights,
    NormWeights,
)


def adapter_attention(
    x: torch.Tensor,
    norm: NormWeights | None,
    weights: AttentionWeights,
    adapter: AdapterWeights | None,
    num_queries: int | None,
    drop_path: torch.Tensor | None,
    grad_tokens: tuple[int, int] | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_attention`."""
    if grad_tokens is not None:
        x = constant_outside(x, *grad_tokens)
    normed = x if norm is None else _normed(x, norm)
    q, k, v = _projections(normed, weights, num_queries)
    out = attention(q, k, v, weights.num_heads, weights.scale, weights.rotation, lengths)
    if weights.norm is not None:
        out = _normed(out, weights.norm, x.dtype)
    out = linear(out, weights.proj_weight, weights.proj_bias, weights.proj_update)
    return _join(x[:, :num_queries], out, weights.layer_scale, adapter, drop_path)


def constant_outside(x: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """x, of which only the given tokens get a gradient."""
    before, tokens, after = x.tensor_split((start, start + count), dim=1)
    return torch.cat((before.detach(), tokens, after.detach()), dim=1)


def adapter_mlp(
    x: torch.Tensor,
    norm: NormWeights | None,
    weights: MlpWeights,
    adapter: AdapterWeights | None,
    drop_path: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_mlp`."""
    normed = x if norm is None else _normed(x, norm)
    u = linear(normed, weights.fc1_weight, weights.fc1_bias, weights.fc1_update)
    activate = ACTIVATIONS[weights.activation]
    if weights.gated:
        gate, value = u.chunk(2, dim=-1)
        hidden = activate(gate) * value
    else:
        hidden = activate(u)
    if weights.norm is not None:
        hidden = _normed(hidden, weights.norm, x.dtype)
    out = linear(hidden, weights.fc2_weight, weights.fc2_bias, weights.fc2_update)
    return _join(x, out, weights.layer_scale, adapter, drop_path)


def _normed(x: torch.Tensor, norm: NormWeights, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``dtype``: that of weight and bias where autocast converts x; None for x's."""
    weight, bias = (None if t is None else t.to(dtype or x.dtype) for t in norm[:2])
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantisedWeight,
    bias: torch.Tensor | None,
    update: LinearUpdate | None,
) -> torch.Tensor:
    """A linear layer with what is trained beside it."""
    bias = None if bias is None else bias.to(weight.dtype)
    if update is None:
        return _matmul(x, weight, bias)
    scale, down, up = (None if t is None else t.to(x.dtype) for t in update)
    if scale is None:
        out = _matmul(x, weight, bias)
    else:
        out = _matmul(x, weight, None) * scale
        out = out if bias is None else out + bias
    return out if down is None or up is None else out + F.linear(F.linear(x, down), up)


def _matmul(
    x: torch.Tensor, weight: torch.Tensor | QuantisedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(weight, QuantisedWeight):
        return weight.linear(x, bias)
    return F.linear(x, weight, bias)


def _projections(
    normed: torch.Tensor, weights: AttentionWeights, num_queries: int | None
) -> tuple[torch.Tensor, ...]:
    """Queries for the first tokens, keys and values for all."""
    qkv = weights.qkv_weight, weights.qkv_bias, weights.qkv_update
    if num_queries is None:
        return linear(normed, *qkv).chunk(3, dim=-1)
    inner = weights.qkv_weight.shape[0] // 3
    of_queries = linear(normed[:, :num_queries], *some_rows(*qkv, slice(0, inner)))
    of_keys = linear(normed, *some_rows(*qkv, slice(inner, None)))
    return of_queries, *of_keys.chunk(2, dim=-1)


def some_rows(
    weight: Any, bias: torch.Tensor | None, update: LinearUpdate | None, rows: slice
) -> tuple[Any, torch.Tensor | None, LinearUpdate | None]:
    """The part of a layer that computes some of its outputs."""
    if update is not None:
        scale, down, up = update
        update = LinearUpdate(
            None if scale is None else scale[rows], down, None if up is None else up[rows]
        )
    return weight[rows], None if bias is None else bias[rows], update


def _join(
    x: torch.Tensor,
    out: torch.Tensor,
    layer_scale: torch.Tensor | None,
    adapter: AdapterWeights | None,
    drop_path: torch.Tensor | None,
) -> torch.Tensor:
    """Residual plus sublayer plus adapter. Drop-path drops the sublayer, never the adapter."""
    for factor in (layer_scale, drop_path):
        out = out if factor is None else out * factor
    out = x + out
    if adapter is None:
        return out
    parameters: Any = (None if p is None else p.to(x.dtype) for p in adapter[:4])
    return bottleneck(
        x, *parameters, scale=adapter.scale, activation=adapter.activation, residual=out
    )
