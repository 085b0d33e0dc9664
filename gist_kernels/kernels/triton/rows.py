"""What kernels over rows of logits share: addresses, loads, maxima and exponentials."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def address(pointer, row, stride, column, ALIGN: tl.constexpr):
    """The addresses of a tile. The stride counts ALIGN elements; offsets can exceed 2^31."""
    return pointer + row.to(tl.int64)[:, None] * stride * ALIGN + column[None, :]


@triton.jit
def load_logits(at, mask):
    """A tile of logits. Masked ones are -inf: a class that adds nothing."""
    return tl.load(at, mask, -float("inf")).to(tl.float32)


@triton.jit
def row_max(x):
    """The maximum of each row; 0 where every class is masked, so that x - max is -inf, not nan."""
    top = tl.max(x, 1)
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def power(x, POWER: tl.constexpr):
    y = x
    for _ in tl.static_range(POWER - 1):
        y *= x
    return y


@triton.jit
def exponentials(x, tempered_scale, POWER: tl.constexpr):
    """exp(x / T) and exp(x). POWER is T if T is 1, 2, 3 or 4, else 0."""
    tempered = tl.exp2(x * tempered_scale)
    plain = tl.exp2(x * 1.4426950408889634) if POWER == 0 else power(tempered, POWER)
    return tempered, plain
