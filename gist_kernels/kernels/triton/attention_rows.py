"""Rows of an attention head: what the attention kernels load, multiply and store.

Shapes: B images, H heads, Dh features per head. The features of a row are contiguous; its batch and
row strides come in units of ALIGN elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gist_kernels.kernels.triton import launch
from gist_kernels.kernels.triton.launch import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
# Triton's interpreter would multiply the bits of bfloat16 numbers.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def pointers(
    tensor,  # (B, rows, H Dh)
    batch,
    head,
    batch_step,
    row_step,
    row,
    column,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Pointers to some rows of a head. Offsets can exceed 2^31."""
    start = tensor + batch * batch_step * ALIGN + head * HEAD_DIM
    return start + row.to(tl.int64)[:, None] * row_step * ALIGN + column[None, :]


@triton.jit
def inside(row, rows, column, HEAD_DIM: tl.constexpr):
    mask = (row < rows)[:, None]
    if column.shape[0] > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_rows(
    tensor,  # (B, rows, H Dh)
    batch,
    head,
    batch_step,
    row_step,
    row,
    rows,
    column,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Load some rows of a head, 0 beyond the last row and column."""
    at = pointers(tensor, batch, head, batch_step, row_step, row, column, ALIGN, HEAD_DIM)
    return tl.load(at, inside(row, rows, column, HEAD_DIM), 0.0)


@triton.jit
def store_rows(
    tensor,  # (B, rows, H Dh)
    value,  # (len(row), len(column))
    batch,
    head,
    batch_step,
    row_step,
    row,
    rows,
    column,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store some rows of a head."""
    at = pointers(tensor, batch, head, batch_step, row_step, row, column, ALIGN, HEAD_DIM)
    tl.store(at, value.to(tensor.dtype.element_ty), inside(row, rows, column, HEAD_DIM))


@triton.jit
def own_tokens(
    lengths,  # (B,) int32 or int64
    batch,
    queries,
    keys,
):
    """The queries and keys that a row has of those that there are."""
    own = tl.maximum(tl.minimum(tl.load(lengths + batch), keys), 0).to(tl.int32)
    return tl.minimum(own, queries), own


@triton.jit
def product(a, b):
    """The matmul of fp16 or bf16 tiles, in float32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b)


def strides_of(head_dim: int, *tensors: torch.Tensor) -> tuple[int, list[int]]:
    """ALIGN, and the tensors' batch and row strides in units of it."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    align = launch.alignment(head_dim, *strides)
    return align, [stride // align for stride in strides]
