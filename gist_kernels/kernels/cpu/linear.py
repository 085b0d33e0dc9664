"""Products with frozen weights on a CPU: oneDNN where it is the faster library.

For float32, PyTorch's own linear calls MKL, which leaves half of an AMD processor's AVX-512 unused;
the oneDNN that PyTorch carries does not. PyTorch offers it as an operator without a gradient: what
these functions compute are the pieces of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


# A product with so few outputs, the first of a low-rank update say, MKL sums in several parts where
# oneDNN sums it in one: half of the error in the same time. With more, MKL takes twice the time.
_FEW_OUTPUTS = range(2, 5)


def _by_onednn(x: torch.Tensor) -> bool:
    return bool(
        _linear_pointwise is not None
        and x.dtype is torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x weight^T + bias`` of (..., I) rows, with a weight of (O, I)."""
    few = weight.shape[0] in _FEW_OUTPUTS and weight.stride(1) == 1
    if _by_onednn(x) and not few:
        # It reads a bias as if it were contiguous, whatever its stride.
        bias = None if bias is None else bias.contiguous()
        result: torch.Tensor = _linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def add_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out + x weight^T`` of (M, I) rows onto (M, O) ones, which may be overwritten."""
    if _by_onednn(x):
        result: torch.Tensor = _linear_pointwise.binary(x, out, weight, None, "add")
        return result
    return out.addmm_(x, weight.t())
