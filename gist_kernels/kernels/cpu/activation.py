"""The element-wise activation on CPU tensors, plain and gated: allocates outputs, hands over
addresses.

What is checked here is what the native code's memory safety rests on.
"""

from __future__ import annotations

import torch

from gist_kernels.kernels.cpu import memory
from gist_kernels.kernels.cpu.native import native as _native

ACTIVATION_CODES: dict[str, int] = _native.ACTIVATIONS
_DTYPE_CODES = {getattr(torch, name): code for name, code in _native.ACTIVATION_DTYPES.items()}


def forward(u: torch.Tensor, activation: str) -> torch.Tensor:
    """``act(u)`` of a contiguous ``u`` of any shape, in its dtype; a new tensor.

    Raises:
        ValueError: ``u`` is not contiguous, or not a floating-point tensor on the CPU.
    """
    _check("u", u)
    result = memory.empty(tuple(u.shape), u.dtype)
    _native.activation_forward(
        _DTYPE_CODES[u.dtype],
        ACTIVATION_CODES[activation],
        u.numel(),
        u.data_ptr(),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def backward(
    d_a: torch.Tensor, u: torch.Tensor, activation: str, *, into_d_a: bool = False
) -> torch.Tensor:
    """``d_a * act'(u)``, the gradient in ``u`` from that in ``forward(u, activation)``.

    Args:
        d_a: as ``u`` in shape and dtype, contiguous.
        u: contiguous, of any shape.
        activation: a key of ``activations.ACTIVATIONS``.
        into_d_a: write over ``d_a`` and return it; only for a caller that owns it.

    Raises:
        ValueError: a tensor is not contiguous, not a floating-point tensor on the CPU, or the two
            differ in shape or dtype.
    """
    _check("u", u)
    _check("d_a", d_a)
    if d_a.shape != u.shape or d_a.dtype is not u.dtype:
        raise ValueError("d_a must have the shape and dtype of u")
    result = d_a if into_d_a else memory.empty(tuple(u.shape), u.dtype)
    _native.activation_backward(
        _DTYPE_CODES[u.dtype],
        ACTIVATION_CODES[activation],
        u.numel(),
        u.data_ptr(),
        d_a.data_ptr(),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def gated_forward(u: torch.Tensor, activation: str) -> torch.Tensor:
    """``act(gate) * value``, a new (M, F) tensor, of contiguous (M, 2 F) rows ``u`` that hold the
    gates in the first half and the values in the second.

    Raises:
        ValueError: ``u`` is not such a tensor, or not a floating-point one on the CPU.
    """
    rows, width = _gated(u)
    hidden = memory.empty((rows, width), u.dtype)
    _native.gated_activation_forward(
        _DTYPE_CODES[u.dtype],
        ACTIVATION_CODES[activation],
        (rows, width),
        u.data_ptr(),
        hidden.data_ptr(),
        torch.get_num_threads(),
    )
    return hidden


def gated_backward(d_hidden: torch.Tensor, u: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient in ``u``, a new (M, 2 F) tensor, from that in ``gated_forward(u, activation)``.

    Args:
        d_hidden: (M, F), contiguous, of ``u``'s dtype.
        u: as in :func:`gated_forward`.
        activation: a key of ``activations.ACTIVATIONS``.

    Raises:
        ValueError: a tensor is not as above.
    """
    rows, width = _gated(u)
    _check("d_hidden", d_hidden)
    if d_hidden.shape != (rows, width) or d_hidden.dtype is not u.dtype:
        raise ValueError("d_hidden must have half of u's columns, and u's rows and dtype")
    d_u = memory.empty((rows, 2 * width), u.dtype)
    _native.gated_activation_backward(
        _DTYPE_CODES[u.dtype],
        ACTIVATION_CODES[activation],
        (rows, width),
        u.data_ptr(),
        d_hidden.data_ptr(),
        d_u.data_ptr(),
        torch.get_num_threads(),
    )
    return d_u


def _gated(u: torch.Tensor) -> tuple[int, int]:
    """M and F."""
    _check("u", u)
    if u.ndim != 2 or u.shape[1] % 2:
        raise ValueError(f"u must be (M, 2 F); it has shape {tuple(u.shape)}")
    return u.shape[0], u.shape[1] // 2


def _check(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous() or tensor.dtype not in _DTYPE_CODES or not tensor.is_cpu:
        raise ValueError(f"{name} must be a contiguous floating-point tensor on the CPU")
