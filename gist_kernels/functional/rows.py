"""From tensors of any leading shape to the rows that kernels take, each with its scale."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gist_kernels import check
from gist_kernels.kernels.protocols import LossOptions


class RowOptions(NamedTuple):
    """What says how much each row counts; all None where every row counts the same."""

    mask: torch.Tensor | None
    row_weight: torch.Tensor | None
    divisor: float | torch.Tensor | None

    @property
    def absent(self) -> bool:
        return self.mask is self.row_weight is self.divisor is None


_EVERY_ROW = RowOptions(None, None, None)


def row_options(
    mask: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    divisor: float | torch.Tensor | None,
) -> RowOptions:
    """``RowOptions`` of a call, without building one for the common case."""
    if mask is row_weight is divisor is None:
        return _EVERY_ROW
    return RowOptions(mask, row_weight, divisor)


def check_rows(rows: RowOptions, logits: torch.Tensor, reduction: str) -> None:
    """``logits`` are (..., C) and checked."""
    if rows.absent:
        return
    leading = tuple(logits.shape[:-1])
    for name, value in (("mask", rows.mask), ("row_weight", rows.row_weight)):
        if value is None:
            continue
        check.tensor(name, value)
        if name == "mask" and value.dtype is not torch.bool:
            raise TypeError(f"mask must be bool, True where a row counts; it is {value.dtype}")
        if name == "row_weight":
            check.floating(name, value)
            _check_constant(name, value)
        check.shape(name, value, leading, "(...) of the logits without their classes")
        if value.device != logits.device:
            raise ValueError(
                f"{name} is on {value.device} and the logits on {logits.device}; move one of them"
            )
    if rows.divisor is None:
        return
    if reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"divisor takes the place of the number of rows in a mean; reduction is {reduction!r}"
        )
    if not isinstance(rows.divisor, torch.Tensor):
        check.positive("divisor", rows.divisor)
    elif rows.divisor.ndim:
        raise ValueError(
            f"divisor must be a number or a 0-dim tensor; it has shape {tuple(rows.divisor.shape)}"
        )
    else:
        _check_constant("divisor", rows.divisor)


def _check_constant(name: str, value: torch.Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, and gets none; pass {name}.detach()")


def in_rows(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    rows: RowOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, LossOptions, torch.Tensor | None]:
    """The tensors as (B, C) and (B,), views where strides allow, and each row's scale.

    With a scale a mean becomes a sum: what divides it is part of the scale.
    """
    if cls.ndim != 2:
        cls, gist = flat_rows(cls), flat_rows(gist)
        if target is not None:
            target = flat_rows(target) if target.is_floating_point() else target.reshape(-1)
    if rows.absent:
        return cls, gist, target, options, None
    kept = None
    if target is not None and not target.is_floating_point():
        kept = target != options.ignore_index
    scale = row_scale(rows, cls, options.reduction, kept)
    if options.reduction == "mean":
        options = options._replace(reduction="sum")
    return cls, gist, target, options, scale


def flat_rows(logits: torch.Tensor) -> torch.Tensor:
    """(..., C) as (B, C): a view where one stride leads from each row to the next."""
    return logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])


def row_scale(
    rows: RowOptions, logits: torch.Tensor, reduction: str, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """(B,): each row's weight, over a mean's divisor, and 0 where it is masked; never read here.

    ``kept`` is where a row's class index is not to be ignored.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    mask = None if rows.mask is None else rows.mask.reshape(-1)
    if rows.row_weight is None:
        scale = torch.ones((), dtype=dtype, device=logits.device)
    else:
        scale = rows.row_weight.reshape(-1).to(dtype)
    if reduction == "mean":
        divisor = rows.divisor
        if divisor is None:
            counted = mask if kept is None else kept if mask is None else kept & mask
            divisor = max(1, len(logits)) if counted is None else counted.sum().clamp(min=1)
        scale = (scale / divisor).to(dtype)
    scale = scale.expand(len(logits))
    return scale if mask is None else torch.where(mask, scale, 0.0)
