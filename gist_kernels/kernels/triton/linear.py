"""Matmuls with frozen weights on a GPU: PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x weight^T + bias``, for x (..., I) and a weight (O, I)."""
    return F.linear(x, weight, bias)


def add_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out + x weight^T``, for x (M, I). Overwrites ``out`` (M, O), of x's dtype or float32."""
    if out.dtype is x.dtype:
        return out.addmm_(x, weight.t())
    if x.is_cuda:  # one kernel, whose product is not rounded to x's dtype
        return torch.addmm(out, x, weight.t(), out_dtype=out.dtype, out=out)
    return out.add_(F.linear(x, weight))  # interpreted
