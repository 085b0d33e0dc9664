"""A linear head's matmuls on a CPU, and the chunks of rows they are computed in.

oneDNN is the faster library where a matrix is multiplied from the right. The weight's gradient is
MKL's, which alone adds a product to a matrix where it lies.
"""

from __future__ import annotations

import torch

from gist_kernels.kernels.cpu.linear import is_pytorchs, linear

SKIPS_ROWS = True

# A matmul of 64 pairs takes up to 1.3 times as long a row as one of 256, which few more improve.
_CHUNK_BYTES = 256 << 20
_LEAST_ROWS, _MOST_ROWS = 64, 256


def chunk_rows(classes: int, itemsize: int) -> int:
    """Row pairs of a chunk: a power of two, so that both sides' logits take at most 256 MiB."""
    fitting = _CHUNK_BYTES // (2 * classes * itemsize)
    return min(max(1 << fitting.bit_length() >> 1, _LEAST_ROWS), _MOST_ROWS)


def buffer(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Memory for the logits of these rows or fewer; None where oneDNN allocates them itself.

    Logits that are freed and allocated again take twice the memory: the C library puts the next
    chunk's rows where they were, and then they no longer fit.
    """
    return rows.new_empty(len(rows), len(weight)) if is_pytorchs(rows, weight) else None


def logits(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``rows weight^T + bias``, written over ``out`` where there is one."""
    if out is None:
        return linear(rows, weight, bias)
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def rows_gradient(d_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``d_logits weight``."""
    return linear(d_logits, weight.t(), None)


def add_weight_gradient(total: torch.Tensor, d_logits: torch.Tensor, rows: torch.Tensor) -> None:
    """``total += d_logits^T rows``; of half types in total's dtype, for its digits."""
    total.addmm_(d_logits.t().to(total.dtype), rows.to(total.dtype))
