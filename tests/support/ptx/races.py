"""Races: accesses to one place, one of them a write, that nothing puts in an order.

Every warp has a clock, which counts its releases and barriers, and knows a time of every other
warp: what happened there until then happened before anything it does now. A barrier tells the warps
of a program each other's times.

A program has such clocks for shared memory, and others for tensors. Triton puts barriers wherever
its own use of shared memory needs them, and needs them elsewhere in the next version. So a barrier
counts for tensors only if the source has it at its line: ``tl.debug_barrier``, or an atomic, whose
result reaches all threads by way of one.

An atomic that releases leaves its warp's times at its address; one that acquires learns the times
that are left there for its program, if the scope was the program ("cta"), or for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


class FaultError(Exception):
    """What a program did that no program may do."""


class Clocks:
    """The times that the warps of one program know."""

    def __init__(self, program: int, warps: int, programs: int) -> None:
        self.program, self.warps = program, warps
        self.own = program * warps + np.arange(warps)
        """The columns of the program's own warps."""
        self.known = np.zeros((warps, programs * warps), np.int32)
        self._tick()

    def _tick(self, warps: Any = slice(None)) -> None:
        self.known[np.arange(self.warps)[warps], self.own[warps]] += 1

    def barrier(self) -> None:
        self.known[:] = self.known.max(0)
        self._tick()

    def atomic(self, warp: int, left: dict[int | None, np.ndarray], order: str, scope: str) -> None:
        """``left`` are the times left at its address: for a program, or, by None, for all."""
        audience = (self.program,) if scope == "cta" else (self.program, None)
        if order in ("acquire", "acq_rel"):
            for program in audience:
                if program in left:
                    np.maximum(self.known[warp], left[program], out=self.known[warp])
        if order in ("release", "acq_rel"):
            for program in audience:
                before = left.get(program, np.zeros(1, np.int32))
                left[program] = np.maximum(self.known[warp], before)
            self._tick(slice(warp, warp + 1))


@dataclass
class History:
    """Who wrote each element of a memory last, and when; who read it, and when."""

    size: int
    warps: int = 1
    """Of a program."""
    writer: np.ndarray = field(init=False)
    written: np.ndarray = field(init=False)
    """The writer's time; 0 for what was there before."""
    reads: dict[int, np.ndarray] = field(default_factory=dict)
    """By program: warps by elements."""
    last: dict[int, np.ndarray] = field(default_factory=dict)
    """By program: when each warp last read anything."""
    left: dict[int, dict[int | None, np.ndarray]] = field(default_factory=dict)
    """What atomics released, by element."""

    def __post_init__(self) -> None:
        self.writer = np.zeros(self.size, np.int32)
        self.written = np.zeros(self.size, np.int32)

    def unordered(self, clocks: Clocks, warp: np.ndarray, elements: np.ndarray) -> np.ndarray:
        """Which accesses don't come after the last write. ``elements``: threads by elements."""
        known = clocks.known[warp[:, None], self.writer[elements]]
        return self.written[elements] > known

    def writer_of(self, element: int) -> str:
        program, warp = divmod(int(self.writer[element]), self.warps)
        return f"program {program}, warp {warp}"

    def read(self, clocks: Clocks, warp: np.ndarray, elements: np.ndarray) -> None:
        program = clocks.program
        if program not in self.reads:
            self.reads[program] = np.zeros((clocks.warps, self.size), np.int32)
            self.last[program] = np.zeros(clocks.warps, np.int32)
        time = clocks.known[warp, clocks.own[warp]]
        self.reads[program][warp[:, None], elements] = time[:, None]
        self.last[program][warp] = time

    def write(self, clocks: Clocks, warp: np.ndarray, elements: np.ndarray) -> None:
        self.warps = clocks.warps
        self.writer[elements] = clocks.own[warp][:, None]
        self.written[elements] = clocks.known[warp, clocks.own[warp]][:, None]

    def unread(self, clocks: Clocks, warp: np.ndarray, elements: np.ndarray) -> int | None:
        """Before a write: a program whose read of the place is in no order with it."""
        least = clocks.known.min(0) if self.reads else None
        for program, reads in self.reads.items():
            own = program * clocks.warps + np.arange(clocks.warps)
            if (self.last[program] <= least[own]).all():
                continue
            known = clocks.known[warp][:, own].T[:, :, None]
            if (reads[:, elements] > known).any():
                return program
        return None
