"""What the 32 threads of a warp do together: functions of arrays, 32 elements per warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.parser import WARP

_LANE = np.arange(WARP)
_GROUP, _WITHIN = _LANE // 4, _LANE % 4


def shuffled(mode: str) -> Callable[..., np.ndarray]:
    """``shfl.sync``: the value of another lane; one's own where the other is out of range."""

    def apply(value: np.ndarray, by: np.ndarray, control: np.ndarray) -> np.ndarray:
        lane = np.arange(value.size) % WARP
        by, control = by.astype(np.int64) & 31, control.astype(np.int64)
        segment, clamp = (control >> 8) & 31, control & 31
        first = lane & segment
        last = first | (clamp & ~segment)
        if mode == "bfly":
            source = lane ^ by
        elif mode == "idx":
            source = first | (by & ~segment)
        else:
            source = lane + by if mode == "down" else lane - by
        inside = source >= last if mode == "up" else source <= last
        return value[np.arange(value.size) - lane + np.where(inside, source, lane)]

    return apply


def reduced(function: np.ufunc) -> Callable[..., np.ndarray]:
    """``redux.sync``."""

    def apply(value: np.ndarray) -> np.ndarray:
        rows = function.reduce(value.reshape(-1, WARP), axis=1, dtype=value.dtype)
        return np.repeat(rows, WARP)

    return apply


def to_lanes(matrices: np.ndarray) -> np.ndarray:
    """The 32-bit registers that hold 8 x 8 matrices of 16 bits, one of each warp."""
    flat = np.ascontiguousarray(matrices.reshape(-1, 64))
    return flat.view(np.uint32).reshape(-1)


def from_lanes(register: np.ndarray) -> np.ndarray:
    """8 x 8 matrices of 16 bits, from what :func:`to_lanes` returns."""
    return np.ascontiguousarray(register).view(np.uint16).reshape(-1, 8, 8)


# Rows and columns of the elements that each lane holds, by register and, of 16-bit types, by half.
# From "Matrix Fragments for mma.m16n8k16" and "... m16n8k8" in the PTX manual.
_A16 = [
    (_GROUP + 8 * (i % 2), 2 * _WITHIN + half + 8 * (i // 2)) for i in range(4) for half in range(2)
]
_B16 = [(2 * _WITHIN + half + 8 * i, _GROUP) for i in range(2) for half in range(2)]
_A32 = [(_GROUP + 8 * (i % 2), _WITHIN + 4 * (i // 2)) for i in range(4)]
_B32 = [(_WITHIN + 4 * i, _GROUP) for i in range(2)]
_C = [(_GROUP + 8 * (i // 2), 2 * _WITHIN + i % 2) for i in range(4)]


def multiplied(kind: str) -> Callable[..., list[np.ndarray]]:
    """``mma``: a b + c of each warp, (16, K) by (K, 8); summed in float64 and rounded once.

    Tensor cores sum with fewer digits than that, in an order that NVIDIA does not publish.
    """
    depth, at_a, at_b = (8, _A32, _B32) if kind == "tf32" else (16, _A16, _B16)

    def numbers(register: np.ndarray) -> list[np.ndarray]:
        if kind == "tf32":
            return [(register & np.uint32(0xFFFFE000)).view(np.float32)]
        halves = register.astype(np.uint32) & np.uint32(0xFFFF), register >> np.uint32(16)
        if kind == "bf16":
            return [(half << np.uint32(16)).view(np.float32) for half in halves]
        return [half.astype(np.uint16).view(np.float16) for half in halves]

    def matrix(registers: tuple[np.ndarray, ...], at: list, shape: tuple[int, int]) -> np.ndarray:
        found = np.zeros((registers[0].size // WARP, *shape))
        parts = [part for register in registers for part in numbers(register)]
        for (row, column), part in zip(at, parts, strict=True):
            found[:, row, column] = part.reshape(-1, WARP)
        return found

    def apply(*registers: np.ndarray) -> list[np.ndarray]:
        left = matrix(registers[:4], at_a, (16, depth))
        total = left @ matrix(registers[4:6], at_b, (depth, 8))
        for (row, column), c in zip(_C, registers[6:], strict=True):
            total[:, row, column] += c.view(np.float32).reshape(-1, WARP)
        return [
            total[:, row, column].astype(np.float32).view(np.uint32).ravel() for row, column in _C
        ]

    return apply
