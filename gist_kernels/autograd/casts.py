"""Frozen weights as matmuls read them: converted and joined by each call, or once a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

# What weights became, by their ids and the dtype. An entry holds them: nothing else has their ids.
_Casts = dict[tuple[Any, ...], tuple[Any, torch.Tensor]]

_casts: ContextVar[_Casts | None] = ContextVar("gist_kernels_casts", default=None)


@contextmanager
def cached_casts() -> Iterator[None]:
    """Convert each frozen weight of a sublayer once, since none changes within the ``with`` block.

    Under autocast a sublayer converts its frozen weights to autocast's dtype in every call, because
    a weight can be written to without a trace (``weight.data.copy_(...)``). A training loop knows
    that nobody does. The block keeps the converted weights, which take as much memory as the frozen
    weights in that dtype, and drops them at its end. It also keeps the joined weights of queries,
    keys and values that a model has apart. What is written to a frozen weight inside the block may
    go unseen there. The block holds for its own thread, and for eager calls.

    Parameters that require a gradient are converted by every call, and so are tensors that are no
    parameters.

    >>> import gist_kernels as gk
    >>> with gk.cached_casts():
    ...     pass  # training steps under torch.autocast
    """
    if _casts.get() is not None:  # the outer block's end is the end
        yield
        return
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def frozen_in_dtype(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight.to(dtype)`` without a gradient, kept for the block of :func:`cached_casts`."""
    if weight.dtype is dtype:
        return weight
    kept = _casts.get()
    if kept is None or not _is_frozen(weight) or _capturing(weight):
        return weight.detach().to(dtype)
    key = id(weight), dtype
    if key not in kept:
        kept[key] = weight, weight.detach().to(dtype)
    return kept[key][1]


def frozen_joined(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """``torch.cat(weights).to(dtype)`` without a gradient, kept as :func:`frozen_in_dtype` keeps.

    Outside of a block of :func:`cached_casts`, each call joins them into new memory, which lives as
    long as the call's graph.

    Args:
        weights: at least one, of shape (O, I) each.
        dtype: of the result.
    """
    kept = None if torch.compiler.is_compiling() else _casts.get()
    if kept is None or not all(_is_frozen(w) and not _capturing(w) for w in weights):
        return torch.cat([weight.detach().to(dtype) for weight in weights])
    key = (*(id(weight) for weight in weights), dtype)
    if key not in kept:
        kept[key] = tuple(weights), torch.cat([weight.detach().to(dtype) for weight in weights])
    return kept[key][1]


def _is_frozen(weight: torch.Tensor) -> bool:
    return type(weight) is torch.nn.Parameter and not weight.requires_grad


def _capturing(weight: torch.Tensor) -> bool:
    # What a CUDA graph's capture allocates belongs to the graph.
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
