"""A linear head's matmuls on a GPU, PyTorch's own, and the chunks of rows they are computed in."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# To know which rows to leave out, the host would have to wait for the device.
SKIPS_ROWS = False

# A chunk reads and writes the weight's gradient once: with fewer rows that takes more than a tenth
# of the matmuls' time.
_MOST_ROWS, _LEAST_ROWS, _CHUNK_BYTES = 2048, 512, 1 << 30


def chunk_rows(classes: int, itemsize: int) -> int:
    """Row pairs of a chunk: a power of two, so that both sides' logits take at most 1 GiB."""
    fitting = _CHUNK_BYTES // (2 * classes * itemsize)
    return min(max(1 << fitting.bit_length() >> 1, _LEAST_ROWS), _MOST_ROWS)


def buffer(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """None: PyTorch's allocator gives a chunk's logits the last one's memory."""
    return None


def logits(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``rows weight^T + bias``."""
    return F.linear(rows, weight, bias)


def rows_gradient(d_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``d_logits weight``."""
    return d_logits @ weight


def add_weight_gradient(total: torch.Tensor, d_logits: torch.Tensor, rows: torch.Tensor) -> None:
    """``total += d_logits^T rows``; of half types by tensor cores that sum in float32."""
    if d_logits.dtype is total.dtype:
        total.addmm_(d_logits.t(), rows)
    elif d_logits.is_cuda:
        total.add_(torch.mm(d_logits.t(), rows, out_dtype=total.dtype))
    else:  # interpreted
        total.addmm_(d_logits.t().to(total.dtype), rows.to(total.dtype))
