"""The Jensen-Shannon divergence on CPU tensors: allocates outputs, hands addresses to the native
module and checks what its memory safety rests on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gist_kernels.kernels.cpu import memory
from gist_kernels.kernels.cpu.native import native as _native

NAME = "cpu"

_DTYPE_CODES = {getattr(torch, name): code for name, code in _native.DIVERGENCE_DTYPES.items()}
_STATS_PER_SIDE: int = _native.DIVERGENCE_STATS_PER_SIDE


def stats_shape(rows: int, sides: int) -> tuple[int, int, int]:
    return rows, sides, _STATS_PER_SIDE


def forward(
    sides: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    temperatures: tuple[float, ...],
    row_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's divergence, and the statistics that :func:`backward` needs."""
    first = sides[0]
    dtype, device = _accumulate(first), first.device  # not the default one
    loss = torch.empty(len(first), dtype=dtype, device=device)
    stats = torch.empty(stats_shape(len(first), len(sides)), dtype=dtype, device=device)
    _native.divergence_forward(
        *_inputs(sides, weights, temperatures, row_scale),
        stats.data_ptr(),
        loss.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, stats


def backward(
    grad: torch.Tensor,
    sides: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    temperatures: tuple[float, ...],
    stats: torch.Tensor,
    needs: Sequence[bool],
    row_scale: torch.Tensor | None,
    in_place: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients asked for, each a tensor of its own, or that of the logits."""
    first = sides[0]
    if stats.dtype is not _accumulate(first) or stats.shape != stats_shape(len(first), len(sides)):
        raise ValueError("stats must be what forward returned for these logits")
    if grad.dtype is not stats.dtype or grad.shape != (len(first),):
        raise ValueError(f"grad must be {stats.dtype}, of shape (B,)")
    if len(needs) != len(sides):
        raise ValueError("needs must have one entry for each side")
    shape = (len(first), first.shape[1])
    if in_place:
        if not all(side.is_contiguous() for side in sides):
            raise ValueError("gradients in place need contiguous logits")
        gradients = tuple(side if need else None for side, need in zip(sides, needs, strict=True))
    else:
        gradients = tuple(memory.empty(shape, first.dtype) if need else None for need in needs)
    _native.divergence_backward(
        *_inputs(sides, weights, temperatures, row_scale),
        stats.data_ptr(),
        (grad.data_ptr(), grad.stride(0)),
        [0 if d is None else d.data_ptr() for d in gradients],
        torch.get_num_threads(),
    )
    return gradients


def _accumulate(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def _inputs(
    sides: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    temperatures: tuple[float, ...],
    row_scale: torch.Tensor | None,
) -> tuple[int, tuple[int, int], list[tuple[int, int, float, float]], tuple[int, int]]:
    first = sides[0]
    rows, classes = first.shape
    for side in sides:
        if side.shape != first.shape or side.dtype is not first.dtype:
            raise ValueError("all logits must have the same shape and dtype")
        if rows and classes != 1 and side.stride(1) != 1:
            raise ValueError("the logits' last dimension must be contiguous")
    scales = 0, 0
    if row_scale is not None:
        if row_scale.shape != (rows,) or row_scale.dtype is not _accumulate(first):
            raise ValueError(f"row_scale must have shape (B,) and be {_accumulate(first)}")
        scales = row_scale.data_ptr(), row_scale.stride(0)
    groups = [
        (side.data_ptr(), side.stride(0), weight, temperature)
        for side, weight, temperature in zip(sides, weights, temperatures, strict=True)
    ]
    return _DTYPE_CODES[first.dtype], (rows, classes), groups, scales
