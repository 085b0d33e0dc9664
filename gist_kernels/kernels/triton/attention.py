"""Multi-head attention of short sequences on GPUs: Triton kernels and their launches.

Up to about 256 keys, a head's keys and values fit into one multiprocessor, and their gradients into
its registers. So ``backward`` is one launch in which each program takes one head of one image. The
program walks through the queries once; every tensor is read once and written once. The kernels read
queries, keys and values in place, usually slices of one packed tensor, and write the gradients in
place too. No copy or permutation surrounds them. ``python bench/traffic.py`` counts the bytes, and
those of PyTorch's attention.

Where a multiprocessor holds fewer keys, and up to 320 keys, the kernels of attention_tiles.py take
tiles. PyTorch's attention serves longer sequences, and float32, which tensor cores would round: see
:func:`serves`.

Score tiles are keys by queries. The first dimension of a tensor-core matmul should be the larger
one, and there are more keys. With queries first, some targets run out of registers.

Rotary positions are applied in registers, where queries and keys are loaded and before their
gradients are stored. Only the tables are read beside what is read without them.

Lengths are read in the kernels, never by the host. A program loads and multiplies the tiles of
queries that hold a token of its row, and writes 0 to the others. Its only tile of keys keeps its
size: keys past the length are masked, neither loaded nor counted.

Shapes: B images, Q queries, N keys, H heads, Dh features per head. The features of a row are
contiguous; its batch and row strides come in units of ALIGN elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gist_kernels.kernels.triton import attention_tiles, heuristics, launch
from gist_kernels.kernels.triton.attention_rows import (
    LOG2_E,
    inside,
    load_rows,
    own_tokens,
    pointers,
    product,
    store_rows,
    strides_of,
)
from gist_kernels.weights import Rotation

DTYPES = (torch.bfloat16, torch.float16)

_SIZES = (
    "queries", "keys", "heads", "q_batch", "q_row", "k_batch", "k_row", "v_batch", "v_row",
    "out_batch", "out_row", "d_out_batch", "d_out_row", "d_q_batch", "d_q_row", "d_k_batch",
    "d_k_row", "d_v_batch", "d_v_row", "parts", "each", "start", "count", "table_step",
)  # fmt: skip


@triton.jit
def _clear(
    tensor,  # (B, rows, H Dh)
    batch,
    head,
    batch_step,
    row_step,
    first,
    rows,
    column,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store 0 in a head's rows from ``first`` on."""
    zeros = tl.zeros([BLOCK, column.shape[0]], tensor.dtype.element_ty)
    for block in tl.range(first // BLOCK, tl.cdiv(rows, BLOCK)):
        row = block * BLOCK + tl.arange(0, BLOCK)
        at = pointers(tensor, batch, head, batch_step, row_step, row, column, ALIGN, HEAD_DIM)
        mask = inside(row, rows, column, HEAD_DIM) & (row >= first)[:, None]
        tl.store(at, zeros, mask)


@triton.jit
def _partners(x, HALF: tl.constexpr):
    """(-b, a) for each pair (a, b) of a row's columns."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if HALF:
        a, b = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
        swapped = tl.permute(tl.join(-b, a), [0, 2, 1])
    else:
        a, b = tl.split(tl.reshape(x, [ROWS, COLUMNS // 2, 2]))
        swapped = tl.join(-b, a)
    return tl.reshape(swapped, [ROWS, COLUMNS])


@triton.jit
def _load_table(
    table,  # (R, Dh) or (H, R, Dh) float32
    head,
    start,
    count,
    table_step,
    row,
    column,
    outside,
    HEAD_DIM: tl.constexpr,
):
    """Load some tokens' rows of a table, ``outside`` for tokens that are not in it."""
    at = table + head * table_step + (row - start)[:, None] * HEAD_DIM + column[None, :]
    return tl.load(at, ((row >= start) & (row < start + count))[:, None], outside)


@triton.jit
def _load_rotated(
    tensor,  # (B, rows, H Dh)
    batch,
    head,
    batch_step,
    row_step,
    row,
    rows,
    column,
    sin,
    cos,
    start,
    count,
    table_step,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """Load some rows of a head, rotated and rounded."""
    x = load_rows(tensor, batch, head, batch_step, row_step, row, rows, column, ALIGN, HEAD_DIM)
    if HALF:
        # From the cache once more: no exchange between threads.
        other = (column + HEAD_DIM // 2) % HEAD_DIM
        y = load_rows(tensor, batch, head, batch_step, row_step, row, rows, other, ALIGN, HEAD_DIM)
        y = y.to(tl.float32)
        y = tl.where(column[None, :] < HEAD_DIM // 2, -y, y)
        x = x.to(tl.float32)
    else:
        x = x.to(tl.float32)
        y = _partners(x, HALF)
    x *= _load_table(cos, head, start, count, table_step, row, column, 1.0, HEAD_DIM)
    y *= _load_table(sin, head, start, count, table_step, row, column, 0.0, HEAD_DIM)
    return (x + y).to(tensor.dtype.element_ty)


@triton.jit
def _rotated_back(
    d,  # (len(row), Dh)
    head,
    row,
    column,
    sin,
    cos,
    start,
    count,
    table_step,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient of some rows from that of the rotated ones."""
    y = d * _load_table(sin, head, start, count, table_step, row, column, 0.0, HEAD_DIM)
    x = d * _load_table(cos, head, start, count, table_step, row, column, 1.0, HEAD_DIM)
    return x - _partners(y, HALF)


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
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
    parts,
    each,
    sin,  # (R, Dh) or (H, R, Dh) float32; None for no rotation, as the next four
    cos,
    start,
    count,
    table_step,
    lengths,  # (B,) int32 or int64; None for rows of N tokens
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Attention for ``each`` blocks of one head's queries, over all of its keys at once."""
    index = tl.program_id(0).to(tl.int64) // parts
    batch, head = index // heads, index % heads
    column = tl.arange(0, COLUMNS)
    key = tl.arange(0, KEYS)
    first = tl.program_id(0) % parts * each
    last = tl.minimum(first + each, tl.cdiv(queries, QUERIES))
    lse += index * queries
    if lengths is not None:
        end = tl.minimum(last * QUERIES, queries)
        queries, keys = own_tokens(lengths, batch, end, keys)
        padding = tl.maximum(queries, first * QUERIES)
        _clear(
            *(out, batch, head, out_batch, out_row, padding, end, column),
            *(ALIGN, HEAD_DIM, QUERIES),
        )
        for block in tl.range(padding // QUERIES, last):
            query = block * QUERIES + tl.arange(0, QUERIES)
            tl.store(lse + query, 0.0, (query >= padding) & (query < end))
        last = tl.minimum(last, tl.cdiv(queries, QUERIES))
        if last <= first:
            return
    if sin is None:
        all_k = load_rows(k, batch, head, k_batch, k_row, key, keys, column, ALIGN, HEAD_DIM)
    else:
        all_k = _load_rotated(
            *(k, batch, head, k_batch, k_row, key, keys, column),
            *(sin, cos, start, count, table_step, ALIGN, HEAD_DIM, HALF),
        )
    all_v = load_rows(v, batch, head, v_batch, v_row, key, keys, column, ALIGN, HEAD_DIM)
    absent = tl.where(key < keys, 0.0, float("-inf"))
    for block in tl.range(first, last):
        query = block * QUERIES + tl.arange(0, QUERIES)
        if sin is None:
            q_rows = load_rows(
                q, batch, head, q_batch, q_row, query, queries, column, ALIGN, HEAD_DIM
            )
        else:
            q_rows = _load_rotated(
                *(q, batch, head, q_batch, q_row, query, queries, column),
                *(sin, cos, start, count, table_step, ALIGN, HEAD_DIM, HALF),
            )
        scores = scale * product(all_k, tl.trans(q_rows)) + absent[:, None]
        most = tl.max(scores, 0)
        p = tl.exp2((scores - most[None, :]) * LOG2_E)
        total = tl.sum(p, 0)
        rows = tl.trans(product(tl.trans(all_v), p.to(all_v.dtype)) / total[None, :])
        store_rows(
            out, rows, batch, head, out_batch, out_row, query, queries, column, ALIGN, HEAD_DIM
        )
        tl.store(lse + query, most + tl.log(total), query < queries)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    d_out,  # (B, Q, H Dh)
    q,  # (B, Q, H Dh)
    k,  # (B, N, H Dh)
    v,  # (B, N, H Dh)
    lse,  # (B, H, Q) float32
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
    sin,  # (R, Dh) or (H, R, Dh) float32; None for no rotation, as the next four
    cos,
    start,
    count,
    table_step,
    lengths,  # (B,) int32 or int64; None for rows of N tokens
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """All gradients of one head."""
    index = tl.program_id(0).to(tl.int64)
    batch, head = index // heads, index % heads
    column = tl.arange(0, COLUMNS)
    key = tl.arange(0, KEYS)
    lse += index * queries
    if lengths is not None:
        all_queries, all_keys = queries, keys
        queries, keys = own_tokens(lengths, batch, queries, keys)
        _clear(
            *(d_q, batch, head, d_q_batch, d_q_row, queries, all_queries, column),
            *(ALIGN, HEAD_DIM, QUERIES),
        )
        _clear(
            *(d_k, batch, head, d_k_batch, d_k_row, keys, all_keys, column),
            *(ALIGN, HEAD_DIM, QUERIES),
        )
        _clear(
            *(d_v, batch, head, d_v_batch, d_v_row, keys, all_keys, column),
            *(ALIGN, HEAD_DIM, QUERIES),
        )
    if sin is None:
        all_k = load_rows(k, batch, head, k_batch, k_row, key, keys, column, ALIGN, HEAD_DIM)
    else:
        all_k = _load_rotated(
            *(k, batch, head, k_batch, k_row, key, keys, column),
            *(sin, cos, start, count, table_step, ALIGN, HEAD_DIM, HALF),
        )
    all_v = load_rows(v, batch, head, v_batch, v_row, key, keys, column, ALIGN, HEAD_DIM)
    absent = tl.where(key < keys, 0.0, float("-inf"))
    of_k = tl.zeros([KEYS, COLUMNS], tl.float32)
    of_v = tl.zeros([KEYS, COLUMNS], tl.float32)
    for block in tl.range(0, tl.cdiv(queries, QUERIES)):
        query = block * QUERIES + tl.arange(0, QUERIES)
        if sin is None:
            q_rows = load_rows(
                q, batch, head, q_batch, q_row, query, queries, column, ALIGN, HEAD_DIM
            )
        else:
            q_rows = _load_rotated(
                *(q, batch, head, q_batch, q_row, query, queries, column),
                *(sin, cos, start, count, table_step, ALIGN, HEAD_DIM, HALF),
            )
        d_rows = load_rows(
            d_out, batch, head, d_out_batch, d_out_row, query, queries, column, ALIGN, HEAD_DIM
        )
        total = tl.load(lse + query, query < queries, 0.0)
        scores = scale * product(all_k, tl.trans(q_rows)) + absent[:, None]
        p = tl.exp2((scores - total[None, :]) * LOG2_E)
        of_v += product(p.to(d_rows.dtype), d_rows)
        d_p = product(all_v, tl.trans(d_rows))
        # Where all values are alike, the mean nearly cancels d_p. Computed from the rounded output,
        # it would be too inexact.
        mean = tl.sum(p * d_p, 0)
        d_scores = (p * (d_p - mean[None, :])).to(q_rows.dtype)
        of_k += product(d_scores, q_rows)
        of_q = scale * product(tl.trans(d_scores), all_k)
        if sin is not None:
            of_q = _rotated_back(
                *(of_q, head, query, column, sin, cos, start, count, table_step, HEAD_DIM, HALF)
            )
        store_rows(
            d_q, of_q, batch, head, d_q_batch, d_q_row, query, queries, column, ALIGN, HEAD_DIM
        )
    of_k = scale * of_k
    if lengths is not None:  # once more, where the loop holds no register for it
        _, keys = own_tokens(lengths, batch, queries, all_keys)
    if sin is not None:
        # Before the rotation, which takes registers.
        store_rows(d_v, of_v, batch, head, d_v_batch, d_v_row, key, keys, column, ALIGN, HEAD_DIM)
        of_k = _rotated_back(
            *(of_k, head, key, column, sin, cos, start, count, table_step, HEAD_DIM, HALF)
        )
    store_rows(d_k, of_k, batch, head, d_k_batch, d_k_row, key, keys, column, ALIGN, HEAD_DIM)
    if sin is None:
        store_rows(d_v, of_v, batch, head, d_v_batch, d_v_row, key, keys, column, ALIGN, HEAD_DIM)


def serves(q: torch.Tensor, k: torch.Tensor, num_heads: int) -> bool:
    """Whether the kernels take (B, Q, H Dh) queries over (B, N, H Dh) keys."""
    return q.dtype in DTYPES and _tile(q, k, num_heads) is not None


def rotates(q: torch.Tensor, k: torch.Tensor, num_heads: int, rotation: Rotation) -> bool:
    """Whether the kernels rotate such queries and keys. A tile's columns are exchanged, so that it
    may have none beside the head's."""
    tile = _tile(q, k, num_heads)
    if not isinstance(tile, heuristics.AttentionTile):
        return False
    if tile.columns != q.shape[2] // num_heads:
        return False
    return tile.takes_rotation(
        rotation.half, reads_shared=launch.tensor_cores_read_shared_memory(q.device)
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float,
    rotation: Rotation | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q k^T) v`` of each head, and the scores' log-sum-exps.

    ``q`` is (B, Q, H Dh), ``k`` and ``v`` are (B, N, H Dh), of the same one of ``DTYPES``, with any
    batch and row strides. :func:`serves` must accept their sizes, and :func:`rotates` the rotation
    of the first Q tokens' queries and of all keys. ``lengths`` (B,), int32 or int64, are each row's
    tokens: below 0 counts as 0, above N as N. Returns ``out`` (B, Q, H Dh), contiguous, and ``lse``
    (B, H, Q) in float32, both 0 past the length.
    """
    batch, queries, width = q.shape
    out = torch.empty((batch, queries, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_heads, queries), dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    tile = _tile(q, k, num_heads)
    assert tile is not None, "of sizes that serves() refuses"
    if lengths is not None:
        lengths = lengths.contiguous()
    if isinstance(tile, heuristics.AttentionTiles):
        assert rotation is None, "which rotates() refuses"
        attention_tiles.forward(tile, q, k, v, num_heads, scale, lengths, out, lse)
        return out, lse
    align, strides = strides_of(width // num_heads, q, k, v, out)
    parts, each = tile.parts(queries, batch * num_heads, launch.multiprocessors(q.device))
    with launch.on(q.device):
        _forward_kernel[(parts * batch * num_heads,)](
            *(q, k, v, out, lse, queries, k.shape[1], num_heads, *strides, scale, parts, each),
            *_tables(rotation),
            lengths,
            HALF=rotation is not None and rotation.half,
            ALIGN=align,
            HEAD_DIM=width // num_heads,
            **tile.meta(launch.warp_size(q.device)),
        )
    return out, lse


def backward(
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
    rotation: Rotation | None = None,
    lengths: torch.Tensor | None = None,
) -> None:
    """Write the gradients of ``q``, ``k`` and ``v`` into ``d_q``, ``d_k`` and ``d_v``.

    ``lse`` is what :func:`forward` returned, ``d_out`` the gradient of its ``out``. Batch and row
    strides may be any. The gradients must overlap neither each other nor an input. Past ``lengths``
    they are 0.
    """
    if not lse.numel():
        return
    batch, queries, width = q.shape
    tile = _tile(q, k, num_heads)
    assert tile is not None, "of sizes that serves() refuses"
    lse = lse.contiguous()
    if lengths is not None:
        lengths = lengths.contiguous()
    if isinstance(tile, heuristics.AttentionTiles):
        assert rotation is None, "which rotates() refuses"
        attention_tiles.backward(
            tile, d_out, q, k, v, lse, num_heads, scale, d_q, d_k, d_v, lengths
        )
        return
    if rotation is not None:
        tile = tile.rotated_backward()
    align, strides = strides_of(width // num_heads, d_out, q, k, v, d_q, d_k, d_v)
    with launch.on(q.device):
        _backward_kernel[(batch * num_heads,)](
            *(d_out, q, k, v, lse, d_q, d_k, d_v),
            *(queries, k.shape[1], num_heads, *strides, scale, *_tables(rotation)),
            lengths,
            HALF=rotation is not None and rotation.half,
            ALIGN=align,
            HEAD_DIM=width // num_heads,
            **tile.meta(launch.warp_size(q.device)),
        )


def _tile(
    q: torch.Tensor, k: torch.Tensor, num_heads: int
) -> heuristics.AttentionTile | heuristics.AttentionTiles | None:
    if not launch.tensor_cores_take_bf16(q.device):
        return None
    return heuristics.attention(
        k.shape[1],
        q.shape[2] // num_heads,
        reads_shared=launch.tensor_cores_read_shared_memory(q.device),
        shared_memory=launch.shared_memory(q.device),
    )


def _tables(rotation: Rotation | None) -> tuple[Any, ...]:
    """Sine, cosine, the first rotated token and how many are, and a head's stride of the tables."""
    if rotation is None:
        return (None,) * 5
    sin, cos = (t.to(torch.float32).contiguous() for t in rotation[:2])
    return sin, cos, rotation.start, sin.shape[-2], sin.stride(0) if sin.ndim == 3 else 0
