"""Attention in tiles of queries and keys: Triton kernels for heads that no program can hold whole.

``forward`` takes a tile of a head's queries per program, and goes over the keys with a running
maximum and sum (FlashAttention, https://arxiv.org/abs/2205.14135). ``backward`` is one launch in
which each program takes one head, as in attention.py, but in two passes: first the queries'
gradients, a tile of queries after the other, then those of keys and values, a tile of keys after
the other. So no more than two tiles' gradients are in registers, and nothing but a number for each
query goes from pass to pass. Only the first accesses of a tensor reach the GPU's memory; a head's
rows then come from the second-level cache.

That number is the mean of the gradients of a query's probabilities, weighted by these. Where values
are alike, the mean nearly cancels the gradients, so that the rounded output would give too inexact
a mean. The first pass has a running mean m of the keys so far. It sums (p (d_p - m)) K, and when m
changes, corrects the sum by the change times the sum of p K.

No size of a tile depends on the tensors' sizes, so that a row's bits don't depend on padding.
Rotary positions are applied before and undone after these kernels.

Shapes: as in attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gist_kernels.kernels.triton import launch
from gist_kernels.kernels.triton.attention_rows import (
    LOG2_E,
    load_rows,
    own_tokens,
    product,
    store_rows,
    strides_of,
)
from gist_kernels.kernels.triton.heuristics import AttentionTiles

_SIZES = (
    "queries", "keys", "heads", "q_batch", "q_row", "k_batch", "k_row", "v_batch", "v_row",
    "out_batch", "out_row", "d_out_batch", "d_out_row", "d_q_batch", "d_q_row", "d_k_batch",
    "d_k_row", "d_v_batch", "d_v_row",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _forward_tiles_kernel(
    q,  # (B, Q, H Dh)
    k,  # (B, N, H Dh)
    v,  # (B, N, H Dh)
    out,  # written: (B, Q, H Dh)
    lse,  # written: (B, H, Q) float32
    queries,
    keys,
    heads,
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    out_batch,
    out_row,
    scale,
    lengths,  # (B,) int32 or int64; None for rows of N tokens
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention for ROWS of one head's queries, over BLOCK keys at a time."""
    tiles = tl.cdiv(queries, ROWS)
    index = tl.program_id(0).to(tl.int64) // tiles
    batch, head = index // heads, index % heads
    first = tl.program_id(0) % tiles * ROWS
    query = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    step = scale * LOG2_E
    own = queries
    if lengths is not None:
        own, keys = own_tokens(lengths, batch, queries, keys)
        keys = tl.where(first < own, keys, 0)  # nothing to go over for padding
    q_rows = load_rows(q, batch, head, q_batch, q_row, query, own, column, ALIGN, HEAD_DIM)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    rows = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, keys, BLOCK):
        key = start + tl.arange(0, BLOCK)
        k_rows = load_rows(k, batch, head, k_batch, k_row, key, keys, column, ALIGN, HEAD_DIM)
        v_rows = load_rows(v, batch, head, v_batch, v_row, key, keys, column, ALIGN, HEAD_DIM)
        # In powers of 2. No tile is without a key, so that the maximum is finite.
        scores = step * product(q_rows, tl.trans(k_rows))
        scores = tl.where((key < keys)[None, :], scores, float("-inf"))
        more = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores - more[:, None])
        shrink = tl.exp2(most - more)
        total = total * shrink + tl.sum(p, 1)
        rows = rows * shrink[:, None] + product(p.to(v_rows.dtype), v_rows)
        most = more
    logs = most / LOG2_E + tl.log(total)
    if lengths is not None:
        logs = tl.where(query < own, logs, 0.0)
        total = tl.where(query < own, total, float("inf"))
    rows *= (1 / total)[:, None]
    store_rows(out, rows, batch, head, out_batch, out_row, query, queries, column, ALIGN, HEAD_DIM)
    tl.store(lse + index * queries + query, logs, query < queries)


@triton.jit(do_not_specialize=_SIZES)
def _backward_tiles_kernel(
    d_out,  # (B, Q, H Dh)
    q,  # (B, Q, H Dh)
    k,  # (B, N, H Dh)
    v,  # (B, N, H Dh)
    lse,  # (B, H, Q) float32
    means,  # written, then read: (B, H, Q) float32
    d_q,  # written: (B, Q, H Dh)
    d_k,  # written: (B, N, H Dh)
    d_v,  # written: (B, N, H Dh)
    queries,
    keys,
    heads,
    d_out_batch,
    d_out_row,
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    d_q_batch,
    d_q_row,
    d_k_batch,
    d_k_row,
    d_v_batch,
    d_v_row,
    scale,
    lengths,  # (B,) int32 or int64; None for rows of N tokens
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients of one head: ROWS of queries, then of keys, over BLOCK of the others."""
    index = tl.program_id(0).to(tl.int64)
    batch, head = index // heads, index % heads
    column = tl.arange(0, COLUMNS)
    lse += index * queries
    means += index * queries
    step = scale * LOG2_E
    own_queries, own_keys = queries, keys
    if lengths is not None:
        own_queries, own_keys = own_tokens(lengths, batch, queries, keys)
    for first in tl.range(0, queries, ROWS, num_stages=1):
        query = first + tl.arange(0, ROWS)
        q_rows = load_rows(
            q, batch, head, q_batch, q_row, query, own_queries, column, ALIGN, HEAD_DIM
        )
        d_rows = load_rows(
            d_out, batch, head, d_out_batch, d_out_row, query, own_queries, column, ALIGN, HEAD_DIM
        )
        total = tl.load(lse + query, query < own_queries, 0.0) * LOG2_E
        mean = tl.zeros([ROWS], tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        of_q = tl.zeros([ROWS, COLUMNS], tl.float32)
        of_p = tl.zeros([ROWS, COLUMNS], tl.float32)
        # Padding's gradients are 0 as its rows are.
        end = own_keys
        if lengths is not None:
            end = tl.where(first < own_queries, own_keys, 0)
        for start in tl.range(0, end, BLOCK):
            key = start + tl.arange(0, BLOCK)
            k_rows = load_rows(k, batch, head, k_batch, k_row, key, end, column, ALIGN, HEAD_DIM)
            v_rows = load_rows(v, batch, head, v_batch, v_row, key, end, column, ALIGN, HEAD_DIM)
            p = tl.exp2(tl.fma(product(q_rows, tl.trans(k_rows)), step, -total[:, None]))
            p = tl.where((key < end)[None, :], p, 0.0)
            d_p = product(d_rows, tl.trans(v_rows))
            here = tl.sum(p, 1)
            weight += here
            # A weight of 0 has no mean yet.
            change = (tl.sum(p * d_p, 1) - mean * here) / tl.maximum(weight, 1e-30)
            mean += change
            of_q = tl.fma(-change[:, None], of_p, of_q)
            of_q += product((p * (d_p - mean[:, None])).to(k_rows.dtype), k_rows)
            of_p += product(p.to(k_rows.dtype), k_rows)
        tl.store(means + query, mean, query < queries)
        store_rows(
            *(d_q, scale * of_q, batch, head, d_q_batch, d_q_row, query, queries, column),
            *(ALIGN, HEAD_DIM),
        )
    # Other threads read the means than wrote them.
    tl.debug_barrier()
    for first in tl.range(0, keys, ROWS, num_stages=1):
        key = first + tl.arange(0, ROWS)
        k_rows = load_rows(k, batch, head, k_batch, k_row, key, own_keys, column, ALIGN, HEAD_DIM)
        v_rows = load_rows(v, batch, head, v_batch, v_row, key, own_keys, column, ALIGN, HEAD_DIM)
        of_k = tl.zeros([ROWS, COLUMNS], tl.float32)
        of_v = tl.zeros([ROWS, COLUMNS], tl.float32)
        end = own_queries
        if lengths is not None:
            end = tl.where(first < own_keys, own_queries, 0)
        for start in tl.range(0, end, BLOCK):
            query = start + tl.arange(0, BLOCK)
            q_rows = load_rows(q, batch, head, q_batch, q_row, query, end, column, ALIGN, HEAD_DIM)
            d_rows = load_rows(
                d_out, batch, head, d_out_batch, d_out_row, query, end, column, ALIGN, HEAD_DIM
            )
            total = tl.load(lse + query, query < end, 0.0) * LOG2_E
            mean = tl.load(means + query, query < end, 0.0)
            # Keys past the last, of which any may become, are rows of their own, not stored.
            p = tl.exp2(tl.fma(product(k_rows, tl.trans(q_rows)), step, -total[None, :]))
            of_v += product(p.to(d_rows.dtype), d_rows)
            d_p = product(v_rows, tl.trans(d_rows))
            of_k += product((p * (d_p - mean[None, :])).to(q_rows.dtype), q_rows)
        if lengths is not None:
            of_k = tl.where((key < own_keys)[:, None], of_k, 0.0)
            of_v = tl.where((key < own_keys)[:, None], of_v, 0.0)
        store_rows(
            *(d_k, scale * of_k, batch, head, d_k_batch, d_k_row, key, keys, column),
            *(ALIGN, HEAD_DIM),
        )
        store_rows(d_v, of_v, batch, head, d_v_batch, d_v_row, key, keys, column, ALIGN, HEAD_DIM)


def forward(
    tiles: AttentionTiles,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write attention into ``out``, and the scores' log-sum-exps into ``lse``."""
    batch, queries, width = q.shape
    align, strides = strides_of(width // num_heads, q, k, v, out)
    with launch.on(q.device):
        _forward_tiles_kernel[(batch * num_heads * tiles.programs(queries),)](
            *(q, k, v, out, lse, queries, k.shape[1], num_heads, *strides, scale, lengths),
            ALIGN=align,
            HEAD_DIM=width // num_heads,
            **tiles.meta(),
        )


def backward(
    tiles: AttentionTiles,
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    d_v: torch.Tensor,
    lengths: torch.Tensor | None,
) -> None:
    """Write the gradients of ``q``, ``k`` and ``v`` into ``d_q``, ``d_k`` and ``d_v``."""
    batch, queries, width = q.shape
    align, strides = strides_of(width // num_heads, d_out, q, k, v, d_q, d_k, d_v)
    with launch.on(q.device):
        _backward_tiles_kernel[(batch * num_heads,)](
            *(d_out, q, k, v, lse, torch.empty_like(lse), d_q, d_k, d_v),
            *(queries, k.shape[1], num_heads, *strides, scale, lengths),
            ALIGN=align,
            HEAD_DIM=width // num_heads,
            **tiles.backward().meta(),
        )
