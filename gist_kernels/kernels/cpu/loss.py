"""The loss on CPU tensors: allocates outputs and hands addresses to the native module.

Arguments are those of the public functions after their checks; what is checked again here is what
the native code's memory safety rests on. It reads no class index outside the classes either, and
names the first row that has one.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from gist_kernels import check
from gist_kernels.kernels.cpu import memory
from gist_kernels.kernels.cpu.native import native as _native
from gist_kernels.kernels.protocols import LossOptions

Gradients: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None]
# The native entries' groups of arguments: dtype, rows, classes, then address and row stride of each
# head's logits; dtype, address and row stride; both addresses and their row stride.
LogitsGroup: TypeAlias = tuple[int, int, int, int, int, int, int]
TargetGroup: TypeAlias = tuple[int, int, int]
GradientsGroup: TypeAlias = tuple[int, int, int]

NAME = "cpu"
MIXED_DTYPES = False
# What one thread computes; larger gradients would take memory until the backward pass.
AHEAD = 16 * 1024

_DTYPE_CODES = {getattr(torch, name): code for name, code in _native.LOSS_DTYPES.items()}
_TARGET_CODES = _DTYPE_CODES | {torch.int64: _native.DTYPES["int64"]}
_NO_TARGET: TargetGroup = (_native.DTYPES["none"], 0, 0)
_NOTHING = 0
_STATS_PER_ROW: int = _native.LOSS_STATS_PER_ROW
_CPU = torch.device("cpu")  # not the default one
# A copy of a scalar's shape is allocated in half the time of torch.empty(()).
_SCALARS = {d: torch.empty((), dtype=d, device=_CPU) for d in (torch.float32, torch.float64)}

DTYPES: tuple[torch.dtype, ...] = tuple(_DTYPE_CODES)


def stats_shape(rows: int) -> tuple[int, int]:
    return rows, _STATS_PER_ROW


def forward(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    want_terms: bool = True,
    row_scale: torch.Tensor | None = None,
    stateless: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The loss, its four unweighted terms, and each row's statistics for :func:`backward`. Every
    call is ``stateless``."""
    logits_group, target_group = _inputs(cls, gist, target)
    loss = _loss(cls, options)
    stats = torch.empty(*stats_shape(cls.shape[0]), dtype=loss.dtype, device=_CPU)
    terms = None
    if want_terms:
        terms = torch.empty(4, *loss.shape, dtype=loss.dtype, device=_CPU)
    invalid_row = _native.loss_forward(
        logits_group,
        target_group,
        options,
        _row_scales(row_scale, cls),
        stats.data_ptr(),
        loss.data_ptr(),
        _NOTHING if terms is None else terms.data_ptr(),
        torch.get_num_threads(),
    )
    if invalid_row >= 0:
        raise _out_of_range(target, invalid_row, cls, options)
    return loss, terms, stats


def backward(
    grad: torch.Tensor,
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    stats: torch.Tensor,
    options: LossOptions,
    need_cls: bool,
    need_gist: bool,
    row_scale: torch.Tensor | None = None,
    in_place: bool = False,
) -> Gradients:
    """The gradients asked for, ``grad`` being that of the loss and ``stats`` from forward."""
    logits_group, target_group = _inputs(cls, gist, target)
    rows = cls.shape[0]
    if stats.dtype is not _accumulate(cls) or stats.shape != stats_shape(rows):
        raise ValueError("stats must be what forward returned for these logits")
    if grad.dtype is not stats.dtype or (grad.ndim and grad.shape != (rows,)):
        raise ValueError(f"grad must be {stats.dtype}, of the loss's shape")
    d_cls, d_gist, gradients = _gradients(cls, gist, logits_group, need_cls, need_gist, in_place)
    _native.loss_backward(
        logits_group,
        target_group,
        options,
        _row_scales(row_scale, cls),
        stats.data_ptr(),
        (grad.data_ptr(), grad.stride(0) if grad.ndim else 0),
        gradients,
        torch.get_num_threads(),
    )
    return d_cls, d_gist


def forward_backward(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    row_scale: torch.Tensor | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The loss and both gradients of its sum, each row read from memory once."""
    logits_group, target_group = _inputs(cls, gist, target)
    loss = _loss(cls, options)
    d_cls, d_gist, gradients = _gradients(cls, gist, logits_group, True, True, in_place)
    invalid_row = _native.loss_forward_backward(
        logits_group,
        target_group,
        options,
        _row_scales(row_scale, cls),
        _NOTHING,
        loss.data_ptr(),
        gradients,
        torch.get_num_threads(),
    )
    if invalid_row >= 0:
        raise _out_of_range(target, invalid_row, cls, options)
    return loss, d_cls, d_gist


def _out_of_range(
    target: torch.Tensor | None, row: int, cls: torch.Tensor, options: LossOptions
) -> IndexError:
    assert target is not None
    return check.out_of_range("target", row, int(target[row]), cls.shape[1], options.ignore_index)


def _accumulate(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def _inputs(
    cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor | None
) -> tuple[LogitsGroup, TargetGroup]:
    shape, dtype = cls.shape, cls.dtype
    rows, classes = shape
    cls_stride, cls_step = cls.stride()
    gist_stride, gist_step = gist.stride()
    if gist.shape != shape or gist.dtype is not dtype:
        raise ValueError("both logits must have the same shape and dtype")
    if rows and classes != 1 and (cls_step != 1 or gist_step != 1):
        raise ValueError("the logits' last dimension must be contiguous")
    if target is None:
        target_group = _NO_TARGET
    else:
        kind, strides = target.dtype, target.stride()
        if kind is torch.int64:
            if target.shape != (rows,):
                raise ValueError("class indices must have shape (B,)")
        elif target.shape != shape or (rows and classes != 1 and strides[1] != 1):
            raise ValueError("class probabilities must be (B, C), contiguous in C")
        target_group = _TARGET_CODES[kind], target.data_ptr(), strides[0]
    logits_group = (
        _DTYPE_CODES[dtype],
        rows,
        classes,
        cls.data_ptr(),
        cls_stride,
        gist.data_ptr(),
        gist_stride,
    )
    return logits_group, target_group


def _row_scales(row_scale: torch.Tensor | None, cls: torch.Tensor) -> tuple[int, int]:
    if row_scale is None:
        return _NOTHING, 0
    if row_scale.shape != cls.shape[:1] or row_scale.dtype is not _accumulate(cls):
        raise ValueError(f"row_scale must have shape (B,) and be {_accumulate(cls)}")
    return row_scale.data_ptr(), row_scale.stride(0)


def _loss(cls: torch.Tensor, options: LossOptions) -> torch.Tensor:
    dtype = _accumulate(cls)
    if options.reduction == "none":
        return torch.empty(cls.shape[0], dtype=dtype, device=_CPU)
    return torch.empty_like(_SCALARS[dtype])


def _gradients(
    cls: torch.Tensor,
    gist: torch.Tensor,
    logits_group: LogitsGroup,
    need_cls: bool,
    need_gist: bool,
    in_place: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, GradientsGroup]:
    """Tensors for the gradients: the logits themselves, or new ones. Halves of one (B, 2, C) tensor
    get the halves of another."""
    _, rows, classes, at_cls, cls_stride, at_gist, gist_stride = logits_group
    if in_place:
        if cls_stride != gist_stride or (rows > 1 and cls_stride < classes):
            raise ValueError("gradients in place need one stride for both logits, of C at least")
        group = at_cls if need_cls else _NOTHING, at_gist if need_gist else _NOTHING, cls_stride
        return cls if need_cls else None, gist if need_gist else None, group
    dtype = cls.dtype
    stacked = cls_stride == gist_stride == 2 * classes
    if stacked and need_cls and need_gist and at_gist - at_cls == classes * dtype.itemsize:
        d_cls, d_gist = memory.empty((rows, 2, classes), dtype).unbind(1)
        return d_cls, d_gist, (d_cls.data_ptr(), d_gist.data_ptr(), 2 * classes)
    at_cls = at_gist = _NOTHING
    to_cls = to_gist = None
    if need_cls:
        to_cls = _contiguous_like(cls)
        at_cls = to_cls.data_ptr()
    if need_gist:
        to_gist = _contiguous_like(gist)
        at_gist = to_gist.data_ptr()
    return to_cls, to_gist, (at_cls, at_gist, classes)


def _contiguous_like(logits: torch.Tensor) -> torch.Tensor:
    if logits.is_contiguous():
        return memory.empty_like(logits)
    return memory.empty(tuple(logits.shape), logits.dtype)
