"""Tensors as kernels read them: their numbers in memory, rows dense, and nothing traced."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from gist_kernels.quantised import QuantisedWeight

_T = TypeVar("_T", torch.Tensor, "torch.Tensor | None")


def negated(*arguments: Any) -> bool:
    """Whether a tensor's numbers are those in memory with the other sign (``torch._neg_view``,
    the imaginary part of a conjugate), which kernels know nothing of."""
    for value in arguments:
        if isinstance(value, torch.Tensor):
            if value.is_neg():
                return True
        elif isinstance(value, tuple) and negated(*value):
            return True
    return False


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its numbers as they lie in memory: an upstream gradient may be negated, or
    zeros without memory."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, faster where there is nothing to convert."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """(..., D) as (M, D), features side by side."""
    tensor = in_memory(tensor)
    rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[None]
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def dense_rows(tensor: _T) -> _T:
    """The (B,) or (B, C) tensor with classes side by side, rows at any stride."""
    if tensor is None:
        return tensor
    if not torch.compiler.is_compiling() and tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous() or tensor.ndim == 1 or tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous()


def as_result(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A node's output in its shape, but no view: autograd lets nobody write to a node's views."""
    result: torch.Tensor = torch.ops.aten._unsafe_view.default(rows, shape)
    return result


def watched_tensors(*arguments: Any) -> list[torch.Tensor]:
    """The tensors among the arguments that have a version counter; inference tensors have none."""
    found = [t for t in arguments if isinstance(t, torch.Tensor)]
    for value in arguments:
        if isinstance(value, QuantisedWeight):
            found += value.memory
    return [t for t in found if not t.is_inference()]


def column_sums(d: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sums over rows, in float32 at least, in ``like``'s dtype."""
    return d.sum(0, dtype=torch.promote_types(d.dtype, torch.float32)).to(like.dtype)
