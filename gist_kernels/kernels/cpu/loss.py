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

_DTYPE_CODES = {getattr(torch, name): code for name, code in _native.LOSS_DTYPES.items()}
_TARGET_CODES = _DTYPE_CODES | {torch.int64: _native.DTYPES["int64"]}
_NO_TARGET: TargetGroup = (_native.DTYPES["none"], 0, 0)
_NOTHING = 0
_STATS_PER_ROW: int = _native.LOSS_STATS_PER_ROW

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
    loss, terms, stats = _outputs(cls, options, want_terms)
    logits_group, target_group = _inputs(cls, gist, target)
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
    d_cls, d_gist, gradients = _gradients(cls, gist, need_cls, need_gist, in_place)
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
    loss, _, stats = _outputs(cls, options, False)
    d_cls, d_gist, gradients = _gradients(cls, gist, True, True, in_place)
    logits_group, target_group = _inputs(cls, gist, target)
    invalid_row = _native.loss_forward_backward(
        logits_group,
        target_group,
        options,
        _row_scales(row_scale, cls),
        stats.data_ptr(),
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
    rows, classes = cls.shape
    cls_stride, cls_step = cls.stride()
    gist_stride, gist_step = gist.stride()
    if gist.shape != cls.shape or gist.dtype is not cls.dtype:
        raise ValueError("both logits must have the same shape and dtype")
    if rows and classes != 1 and (cls_step != 1 or gist_step != 1):
        raise ValueError("the logits' last dimension must be contiguous")
    if target is None:
        target_group = _NO_TARGET
    else:
        target_group = (_TARGET_CODES[target.dtype], target.data_ptr(), target.stride(0))
        if target.dtype is torch.int64:
            if target.shape != (rows,):
                raise ValueError("class indices must have shape (B,)")
        elif target.shape != cls.shape or (rows and classes != 1 and target.stride(1) != 1):
            raise ValueError("class probabilities must be (B, C), contiguous in C")
    logits_group = (
        _DTYPE_CODES[cls.dtype],
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


def _outputs(
    cls: torch.Tensor, options: LossOptions, want_terms: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    rows, dtype = cls.shape[0], _accumulate(cls)
    per_row = (rows,) if options.reduction == "none" else ()
    device = cls.device  # not the default one
    loss = torch.empty(per_row, dtype=dtype, device=device)
    terms = torch.empty((4, *per_row), dtype=dtype, device=device) if want_terms else None
    return loss, terms, torch.empty(stats_shape(rows), dtype=dtype, device=device)


def _gradients(
    cls: torch.Tensor, gist: torch.Tensor, need_cls: bool, need_gist: bool, in_place: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, GradientsGroup]:
    """Tensors for the gradients: the logits themselves, or new ones. Halves of one (B, 2, C) tensor
    get the halves of another."""
    rows, classes = cls.shape
    if in_place:
        if cls.stride(0) != gist.stride(0) or (rows > 1 and cls.stride(0) < classes):
            raise ValueError("gradients in place need one stride for both logits, of C at least")
        sides = cls if need_cls else None, gist if need_gist else None
        at_cls, at_gist = (_NOTHING if side is None else side.data_ptr() for side in sides)
        return *sides, (at_cls, at_gist, cls.stride(0))
    if need_cls and need_gist and _stacked(cls, gist):
        halves = memory.empty((rows, 2, classes), cls.dtype).unbind(1)
        at_cls, at_gist = halves[0].data_ptr(), halves[1].data_ptr()
        return halves[0], halves[1], (at_cls, at_gist, 2 * classes)
    d_cls = memory.empty((rows, classes), cls.dtype) if need_cls else None
    d_gist = memory.empty((rows, classes), cls.dtype) if need_gist else None
    at_cls = _NOTHING if d_cls is None else d_cls.data_ptr()
    at_gist = _NOTHING if d_gist is None else d_gist.data_ptr()
    return d_cls, d_gist, (at_cls, at_gist, classes)


def _stacked(cls: torch.Tensor, gist: torch.Tensor) -> bool:
    classes = cls.shape[1]
    return (
        cls.stride(0) == gist.stride(0) == 2 * classes
        and gist.data_ptr() - cls.data_ptr() == classes * cls.element_size()
    )
