"""Attention of packed queries, keys and values."""

from __future__ import annotations

import torch

from gist_kernels import autograd, check
from gist_kernels.autograd.tensors import negated
from gist_kernels.backend import BACKENDS, select, serving
from gist_kernels.tracing import needs_dispatcher, takes_operators

for _backend in BACKENDS:
    if _backend.attention is not None:
        autograd.register_attention(_backend.name, _backend.attention)


def prefix_attention(
    qkv: torch.Tensor,
    num_heads: int,
    *,
    num_queries: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Multi-head self-attention over a packed projection, for the first tokens or all.

    Args:
        qkv: (B, N, 3 H Dh): the features of the queries, then of the keys, then of the values;
            each is H heads of Dh features.
        num_heads: H.
        num_queries: compute the result for this many first tokens. Default: for all.
        scale: factor on the scores. Default: ``Dh ** -0.5``.

    Returns:
        (B, num_queries, H Dh), dense, in qkv's dtype.

    Raises:
        TypeError: not a floating-point tensor. ValueError: a wrong shape or value.
    """
    check.floating("qkv", qkv)
    check.shape("qkv", qkv, (None, None, None), "(B, N, 3 * num_heads * head_dim)")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer of at least 1; it is {num_heads!r}")
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            "qkv must have 3 * num_heads * head_dim features; it has "
            f"{qkv.shape[2]} and num_heads is {num_heads}"
        )
    check.token_count("num_queries", num_queries, qkv.shape[1])
    if scale is not None:
        check.finite("scale", scale)
    kernels = select("attention", qkv)
    if needs_dispatcher(qkv):
        width = qkv.shape[2] // 3
        if (
            kernels is None
            or not takes_operators(qkv)
            or not autograd.served(kernels, qkv, qkv.dtype, num_heads, width)
        ):
            from gist_kernels import reference

            return reference.prefix_attention(qkv, num_heads, num_queries, scale)
        backend = serving("attention", qkv.device.type, qkv.dtype)
        return autograd.prefix_attention_operator(backend, qkv, num_heads, num_queries, scale)
    if kernels is None or negated(qkv):
        from gist_kernels import reference

        return reference.prefix_attention(qkv, num_heads, num_queries, scale)
    return autograd.prefix_attention(kernels, qkv, num_heads, num_queries, scale)
