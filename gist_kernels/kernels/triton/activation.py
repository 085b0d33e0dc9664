"""The activation functions on GPUs: Triton device functions, and element-wise kernels.

Arithmetic is in float32. Both forms of GELU, and SiLU, are z F(z) with a distribution function F.
Their derivative is F + z F'.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gist_kernels.kernels.triton import heuristics, launch


@triton.jit
def activate(z, KIND: tl.constexpr):
    """The activation of float32 values; KIND is a key of ``activations.ACTIVATIONS``."""
    if KIND == "identity":
        y = z
    elif KIND == "relu":
        # A maximum would drop a nan.
        y = tl.where(z < 0, 0.0, z)
    else:
        y = z * _distribution(z, KIND)
    return y


@triton.jit
def slope(z, KIND: tl.constexpr):
    """The derivative of :func:`activate`; that of relu at 0 is 0."""
    if KIND == "identity":
        y = tl.full(z.shape, 1.0, tl.float32)
    elif KIND == "relu":
        y = tl.where(z <= 0, 0.0, 1.0)
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        y = _distribution(z, KIND) + z * density
    else:
        F = _distribution(z, KIND)
        rate = tl.full(z.shape, 1.0, tl.float32)
        if KIND == "gelu_tanh":
            rate = 1.5957691216057308 + 0.21406444881780076 * z * z
        # Far out, F' is 0 and z or the rate may be infinite.
        y = F + tl.where(tl.abs(z) > 128, 0.0, z * rate * (F * (1 - F)))
    return y


@triton.jit
def _distribution(z, KIND: tl.constexpr):
    if KIND == "gelu":
        y = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "gelu_tanh" or KIND == "silu")
        t = z
        if KIND == "gelu_tanh":
            # (1 + tanh(t)) / 2 = 1 / (1 + exp(-2 t)) with t = sqrt(2 / pi) (z + 0.044715 z^3)
            t = z * (1.5957691216057308 + 0.07135481627260025 * z * z)
        y = 1 / (1 + tl.exp(-t))
    return y


@triton.jit(do_not_specialize=("units",))
def _forward_kernel(
    u,
    a,  # written
    units, KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < units.to(tl.int64) * ALIGN
    value = activate(tl.load(u + at, mask, 0.0).to(tl.float32), KIND)
    tl.store(a + at, value.to(a.dtype.element_ty), mask)


@triton.jit(do_not_specialize=("units",))
def _backward_kernel(
    d_a, u,
    d_u,  # written; may be d_a
    units, KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < units.to(tl.int64) * ALIGN
    upstream = tl.load(d_a + at, mask, 0.0).to(tl.float32)
    value = upstream * slope(tl.load(u + at, mask, 0.0).to(tl.float32), KIND)
    tl.store(d_u + at, value.to(d_u.dtype.element_ty), mask)


@triton.jit(do_not_specialize=("units", "chunks"))
def _gated_forward_kernel(
    u,
    hidden,  # written
    units, chunks, KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``act(gate) * value`` of rows of ``units`` hidden features, ``chunks`` programs a row."""
    row, column = _place(chunks, BLOCK)
    width = units * ALIGN
    mask = column < width
    gate = u + row * (2 * width) + column
    value = tl.load(gate + width, mask, 0.0).to(tl.float32)
    value *= activate(tl.load(gate, mask, 0.0).to(tl.float32), KIND)
    tl.store(hidden + row * width + column, value.to(hidden.dtype.element_ty), mask)


@triton.jit(do_not_specialize=("units", "chunks"))
def _gated_backward_kernel(
    d_hidden, u,
    d_u,  # written
    units, chunks, KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = _place(chunks, BLOCK)
    width = units * ALIGN
    mask = column < width
    at = row * (2 * width) + column
    gate = tl.load(u + at, mask, 0.0).to(tl.float32)
    value = tl.load(u + at + width, mask, 0.0).to(tl.float32)
    upstream = tl.load(d_hidden + row * width + column, mask, 0.0).to(tl.float32)
    d_gate, d_value = upstream * value * slope(gate, KIND), upstream * activate(gate, KIND)
    tl.store(d_u + at, d_gate.to(d_u.dtype.element_ty), mask)
    tl.store(d_u + at + width, d_value.to(d_u.dtype.element_ty), mask)


@triton.jit
def _place(chunks, BLOCK: tl.constexpr):
    """A program's row, and the columns of its chunk of that row."""
    program = tl.program_id(0)
    row = program // chunks
    return row.to(tl.int64), (program - row * chunks) * BLOCK + tl.arange(0, BLOCK)


def forward(u: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of every element, in a contiguous tensor of ``u``'s shape and dtype."""
    u = u.contiguous()
    a = torch.empty_like(u)
    _launch(_forward_kernel, (u, a), activation)
    return a


def backward(
    d_a: torch.Tensor, u: torch.Tensor, activation: str, *, into_d_a: bool = False
) -> torch.Tensor:
    """The gradient of ``u``, contiguous, in ``u``'s shape and dtype, from the gradient ``d_a``.

    With ``into_d_a``, the result overwrites ``d_a``, which must be contiguous and in ``u``'s dtype.
    """
    if into_d_a and not (d_a.is_contiguous() and d_a.dtype == u.dtype):
        raise ValueError("into_d_a needs a contiguous d_a of u's dtype")
    d_a, u = d_a.contiguous(), u.contiguous()
    d_u = d_a if into_d_a else torch.empty_like(u)
    _launch(_backward_kernel, (d_a, u, d_u), activation)
    return d_u


def gated_forward(u: torch.Tensor, activation: str) -> torch.Tensor:
    """``act(gate) * value``, contiguous (M, F), of (M, 2 F) rows ``u``: gates, then values."""
    u = u.contiguous()
    hidden = u.new_empty((u.shape[0], u.shape[1] // 2))
    _launch_gated(_gated_forward_kernel, (u, hidden), hidden, activation)
    return hidden


def gated_backward(d_hidden: torch.Tensor, u: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of ``u``, contiguous, in ``u``'s shape and dtype, from the gradient
    ``d_hidden``, (M, F)."""
    d_hidden, u = d_hidden.contiguous(), u.contiguous()
    d_u = torch.empty_like(u)
    _launch_gated(_gated_backward_kernel, (d_hidden, u, d_u), d_hidden, activation)
    return d_u


def _launch_gated(
    kernel: Any, tensors: tuple[torch.Tensor, ...], hidden: torch.Tensor, kind: str
) -> None:
    (rows, width), device = hidden.shape, hidden.device
    if hidden.numel():
        align = launch.alignment(width)
        tile = heuristics.ELEMENTWISE
        chunks = tile.chunks(width)
        with launch.on(device):
            kernel[(rows * chunks,)](
                *(*tensors, width // align, chunks, kind, align, tile.block),
                num_warps=tile.threads // launch.warp_size(device),
                enable_fp_fusion=True,
            )


def _launch(kernel: Any, tensors: tuple[torch.Tensor, ...], kind: str) -> None:
    size, device = tensors[0].numel(), tensors[0].device
    if size:
        align = launch.alignment(size)
        tile = heuristics.ELEMENTWISE
        with launch.on(device):
            kernel[(tile.chunks(size),)](
                *(*tensors, size // align, kind, align, tile.block),
                num_warps=tile.threads // launch.warp_size(device),
                enable_fp_fusion=True,
            )
