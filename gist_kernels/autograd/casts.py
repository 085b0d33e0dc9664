"""Frozen weights in the dtype of autocast's matmuls: converted by each call, or once a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_Casts = dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]]

_casts: ContextVar[_Casts | None] = ContextVar("gist_kernels_casts", default=None)


@contextmanager
def cached_casts() -> Iterator[None]:
    """Convert each frozen weight of a sublayer once, since none changes within the ``with`` block.

    Under autocast a sublayer converts its frozen weights to autocast's dtype in every call, because
    a weight can be written to without a trace (``weight.data.copy_(...)``). A training loop knows
    that nobody does. The block keeps the converted weights, which take as much memory as the frozen
    weights in that dtype, and drops them at its end. What is written to a frozen weight inside the
    block may go unseen there. The block holds for its own thread, and for eager calls.

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
    frozen = type(weight) is torch.nn.Parameter and not weight.requires_grad
    if kept is None or not frozen or _capturing(weight):
        return weight.detach().to(dtype)
    key = id(weight), dtype
    if key not in kept:  # the entry holds the weight, so that nothing else can have its id
        kept[key] = weight, weight.detach().to(dtype)
    return kept[key][1]


def _capturing(weight: torch.Tensor) -> bool:
    # What a CUDA graph's capture allocates belongs to the graph.
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
