"""What an instruction computes for each thread: functions of arrays, one element per thread.

Approximations (ex2, lg2, rcp, ...) are rounded correctly here; a GPU's are off by an ulp or two.
The payload of a NaN is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Function = Callable[..., Any]


def dtype_of(kind: str) -> np.dtype:
    """Of a PTX type: b32, u64, s16, f32, pred."""
    if kind == "pred":
        return np.dtype(np.bool_)
    letter = {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]]
    return np.dtype(f"{letter}{int(kind[1:]) // 8}")


def flush(x: Array) -> Array:
    """Subnormal numbers become 0 of their sign."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def flushed(function: Function) -> Function:
    """``.ftz``, of operands and result."""
    return lambda *operands: flush(function(*map(flush, operands)))


def minimum(a: Array, b: Array) -> Array:
    """The number where one operand is NaN; -0 is below +0."""
    return np.where((a == b) & np.signbit(a), a, np.fmin(a, b))


def maximum(a: Array, b: Array) -> Array:
    return np.where((a == b) & ~np.signbit(a), a, np.fmax(a, b))


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a b + c`` with one rounding, in float32.

    The product is exact in float64. The sum is rounded to odd there, so that its second rounding,
    to float32, rounds as if it were the only one.
    """
    product = np.multiply(a, b, dtype=np.float64)
    wide = c.astype(np.float64)
    total = product + wide
    rest = total - product
    error = (product - (total - rest)) + (wide - rest)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    odd = np.where((error > 0) == (total > 0), bits + 1, bits - 1)
    return np.where(inexact, odd, bits).view(np.float64).astype(np.float32)


def in_float64(function: Function) -> Function:
    """A function of float32, rounded once."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def widened(function: Function, kind: str) -> Function:
    """On operands of twice the width."""
    wide = dtype_of(kind[0] + str(2 * int(kind[1:])))
    return lambda a, b, *c: function(a.astype(wide), b.astype(wide), *c)


def high_product(kind: str) -> Function:
    product = widened(np.multiply, kind)
    return lambda a, b: (product(a, b) >> int(kind[1:])).astype(dtype_of(kind))


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def quotient(a: Array, b: Array) -> Array:
    """Towards 0. By 0 the result is unspecified: all ones here."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    found = a // safe
    if a.dtype.kind == "i":
        found = found + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, ~np.zeros_like(b), found)


def remainder(a: Array, b: Array) -> Array:
    return a - quotient(a, b) * b


def shift_left(a: Array, by: Array) -> Array:
    """Shifts by more than the width leave 0."""
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0)


def shift_right(a: Array, by: Array) -> Array:
    """A signed type fills with its sign."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, 0)


def extract_bits(a: Array, start: Array, count: Array) -> Array:
    """``bfe`` of 32 bits. Of a signed type, the field's sign fills what is above it."""
    start, count = start.astype(np.int64) & 255, np.minimum(count.astype(np.int64) & 255, 32)
    field = a.astype(np.int64) >> np.minimum(start, 63)
    if a.dtype.kind == "u":
        return field & ((1 << count) - 1)
    unused = 64 - np.maximum(count, 1)
    return np.where(count > 0, (field << unused) >> unused, 0)


def permute_bytes(a: Array, b: Array, selection: Array) -> Array:
    """``prmt``: four of the eight bytes of a and b."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros(np.broadcast(a, b, selection).shape, np.uint32)
    for i in range(4):
        choice = (selection.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(choice >= 8, np.where(byte >= 128, 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def identity(x: Array) -> Array:
    return x


def select(a: Array, b: Array, predicate: Array) -> Array:
    return np.where(predicate, a, b)


def joined(dtype: np.dtype) -> Function:
    """A register from its parts, the lowest first."""

    def apply(*parts: Array) -> Array:
        result = parts[0].astype(dtype)
        for i, part in enumerate(parts[1:], 1):
            result = result | (part.astype(dtype) << dtype.type(8 * i * part.dtype.itemsize))
        return result

    return apply


def to_bf16(x: Array) -> Array:
    """To nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def from_f16(bits: Array) -> Array:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def in_halves(function: Function, kind: str, parts: int) -> Function:
    """A function of float32 on a register's one or two halves, bf16 or f16.

    A product is exact in float32, and so rounded once. A sum may be rounded twice.
    """
    widened, rounded = {"bf16": (from_bf16, to_bf16), "f16": (from_f16, to_f16)}[kind]

    def apply(*registers: Array) -> Array:
        result = np.zeros((), np.uint32)
        for part in range(parts):
            shift = np.uint32(16 * part)
            halves = [(each >> shift) & np.uint32(0xFFFF) for each in registers]
            found = rounded(function(*map(widened, halves)))
            result = result | (found.astype(np.uint32) << shift)
        return result if parts == 2 else result.astype(np.uint16)

    return apply


def pair(half: Function) -> Function:
    """Two halves of a 32-bit register from two numbers, the high one first."""
    return lambda high, low: (half(high).astype(np.uint32) << np.uint32(16)) | half(low)


def to_tf32(x: Array) -> Array:
    """To nearest, ties away from 0."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def to_integer(rounded: Function, dtype: np.dtype) -> Function:
    """A NaN becomes 0, what doesn't fit the nearest number that does."""
    limits = np.iinfo(dtype)

    def apply(x: Array) -> Array:
        whole = np.clip(rounded(x.astype(np.float64)), float(limits.min), float(limits.max))
        # float(limits.max) of 64 bits is one too many.
        whole = np.where(whole >= float(limits.max), limits.max, np.nan_to_num(whole).astype(dtype))
        return np.where(np.isnan(x), dtype.type(0), whole)

    return apply


COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMPARE_FLOAT: dict[str, Function] = {
    # Ordered: false where an operand is NaN.
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a < b) | (a > b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    # Unordered: true there.
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
COMBINE: dict[str, Function] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip

INTEGER: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": multiply_add, "div": quotient,
    "rem": remainder, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "mov": identity, "cvta": identity, "selp": select, "shl": shift_left, "shr": shift_right,
    "bfe": extract_bits, "prmt": permute_bytes,
}  # fmt: skip
FLOAT: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma, "div": np.divide,
    "min": minimum, "max": maximum, "neg": np.negative, "abs": np.abs, "rcp": np.reciprocal,
    "sqrt": np.sqrt, "rsqrt": in_float64(lambda x: 1 / np.sqrt(x)), "tanh": in_float64(np.tanh),
    "ex2": in_float64(np.exp2), "lg2": in_float64(np.log2),
}  # fmt: skip
