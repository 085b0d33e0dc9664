"""Multi-head attention on CPU tensors, for sequences of some hundred tokens.

Queries, keys and values are read, and their gradients written, where they lie: slices of one packed
tensor as a rule. What is checked here is what the native code's memory safety rests on.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from gist_kernels import check
from gist_kernels.kernels.cpu.native import native as _native
from gist_kernels.weights import Rotation

# Address, stride of the batch, stride of the rows.
Place: TypeAlias = tuple[int, int, int]

_DTYPE_CODES = {getattr(torch, name): code for name, code in _native.ATTENTION_DTYPES.items()}
DTYPES: tuple[torch.dtype, ...] = tuple(_DTYPE_CODES)
MAX_HEAD_DIM = 256


def serves(q: torch.Tensor, k: torch.Tensor, num_heads: int) -> bool:
    """Whether :func:`forward` takes (B, Q, H Dh) queries over (B, N, H Dh) keys."""
    return q.dtype in DTYPES and q.shape[2] // num_heads <= MAX_HEAD_DIM


def rotates(q: torch.Tensor, k: torch.Tensor, num_heads: int, rotation: Rotation) -> bool:
    """Whether :func:`forward` and :func:`backward` rotate such queries and keys."""
    return True


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

    ``q`` is (B, Q, H * Dh), ``k`` and ``v`` are (B, N, H * Dh), of one of ``DTYPES`` and of any
    strides, but contiguous in the last dimension, in which each head has Dh columns. ``rotation``
    turns the queries of the first Q tokens and the keys of all. ``lengths`` (B,), int32 or int64
    in 1 to N, are each row's tokens: nothing is read beyond, and results there are 0. Returns
    ``out`` (B, Q, H * Dh), contiguous, and ``lse`` (B, H, Q) in float32. TypeError for dtypes,
    ValueError for all else.
    """
    sizes = _sizes(q, k, v, num_heads)
    batch, heads, queries, keys, head_dim = sizes
    tables, counts = _tables(rotation, heads, head_dim), _counts(lengths, batch, keys)
    device = q.device  # not the default one
    out = torch.empty((batch, queries, heads * head_dim), dtype=q.dtype, device=device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
    if batch:
        _native.attention_forward(
            _DTYPE_CODES[q.dtype],
            sizes,
            scale,
            _place(q),
            _place(k),
            _place(v),
            lse.data_ptr(),
            _address(tables),
            0 if counts is None else counts.data_ptr(),
            _place(out),
            torch.get_num_threads(),
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
    """Writes the gradients of ``q``, ``k`` and ``v`` into ``d_q``, ``d_k`` and ``d_v``.

    ``lse`` is what :func:`forward` returned, ``d_out`` the gradient of its result. ``q`` and ``k``
    are those before the rotation, as for forward, and so are their gradients. Beyond ``lengths``
    nothing is read, ``d_out`` neither, and gradients are 0.
    Strides may be any, but all except ``lse`` are contiguous in the last dimension. The gradients,
    slices of one packed tensor as a rule, must overlap neither each other nor an input. TypeError
    for dtypes, ValueError for all else.
    """
    sizes = _sizes(q, k, v, num_heads)
    batch, heads, queries, keys, head_dim = sizes
    tables, counts = _tables(rotation, heads, head_dim), _counts(lengths, batch, keys)
    grads = ("d_q", d_q, q), ("d_k", d_k, k), ("d_v", d_v, v)
    for name, tensor, like in (("d_out", d_out, q), *grads):
        _check(name, tensor, like)
    if lse.dtype is not torch.float32 or lse.shape != (batch, heads, queries):
        raise ValueError("lse must be what forward returned for these tensors")
    lse = lse.contiguous()
    if batch:
        _native.attention_backward(
            _DTYPE_CODES[q.dtype],
            sizes,
            scale,
            _place(q),
            _place(k),
            _place(v),
            lse.data_ptr(),
            _address(tables),
            0 if counts is None else counts.data_ptr(),
            _place(d_out),
            _place(d_q),
            _place(d_k),
            _place(d_v),
            torch.get_num_threads(),
        )


def _sizes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int
) -> tuple[int, int, int, int, int]:
    """B, H, Q, N, Dh."""
    if q.dtype not in _DTYPE_CODES:
        raise TypeError(f"q must be float32, bfloat16 or float16; it is {q.dtype}")
    if q.ndim != 3 or k.ndim != 3:
        raise ValueError("q, k and v must have three dimensions")
    batch, queries, width = q.shape
    keys = k.shape[1]
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{width} columns can't be shared out to {num_heads} heads")
    if not 1 <= width // num_heads <= MAX_HEAD_DIM:
        raise ValueError(f"a head must have 1 to {MAX_HEAD_DIM} columns, not {width // num_heads}")
    if k.shape[0] != batch or k.shape[2] != width:
        raise ValueError("q and k must agree in their first and last dimension")
    if queries < 1 or keys < 1:
        raise ValueError("there must be a query and a key")
    for name, tensor, like in (("q", q, q), ("k", k, k), ("v", v, k)):
        if tensor.dtype is not q.dtype:
            raise TypeError(f"{name} must be {q.dtype}, as q is; it is {tensor.dtype}")
        _check(name, tensor, like)
    return batch, num_heads, queries, keys, width // num_heads


def _check(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.dtype is not like.dtype:
        raise TypeError(f"{name} must be {like.dtype}; it is {tensor.dtype}")
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, not {tuple(tensor.shape)}")
    if tensor.stride(2) != 1 and tensor.shape[2] != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")


def _place(tensor: torch.Tensor) -> Place:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _tables(rotation: Rotation | None, num_heads: int, head_dim: int) -> Rotation | None:
    """The rotation with tables as the native code reads them."""
    if rotation is None:
        return None
    sin, cos, start, _ = rotation
    shape = (*((num_heads,) if sin.ndim == 3 else ()), sin.shape[-2], head_dim)
    if head_dim % 2 or sin.shape != shape or cos.shape != shape or start < 0:
        raise ValueError("the rotation does not fit the heads")
    sin, cos = (table.to("cpu", torch.float32).contiguous() for table in (sin, cos))
    return rotation._replace(sin=sin, cos=cos)


def _counts(lengths: torch.Tensor | None, batch: int, keys: int) -> torch.Tensor | None:
    """The lengths as the native code reads them."""
    if lengths is None:
        return None
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64; it is {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), not {tuple(lengths.shape)}")
    check.token_lengths("lengths", lengths, keys)
    return lengths.to("cpu", torch.int64).contiguous()


def _address(tables: Rotation | None) -> Any:
    if tables is None:
        return None
    sin, cos, start, half = tables
    return sin.data_ptr(), cos.data_ptr(), start, sin.shape[-2], sin.ndim == 3, half
