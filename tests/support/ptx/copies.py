"""Copies into shared memory that are under way (``cp.async``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


class Copies:
    """What each thread copied, by the group that it will commit or has committed."""

    def __init__(self, threads: int) -> None:
        self._committed = np.zeros(threads, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, threads: np.ndarray, at: np.ndarray, data: np.ndarray) -> None:
        """Rows of bytes of threads, to the bytes ``at`` of shared memory."""
        self._pending.append((threads, at, data, self._committed[threads]))

    def commit(self, where: Any) -> None:
        self._committed[... if where is True else where] += 1

    def landed(
        self, pending: int, where: Any
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Copies of the active threads, all but those of their last ``pending`` groups."""
        active = np.zeros(len(self._committed), np.bool_)
        active[... if where is True else where] = True
        kept = []
        for threads, at, data, group in self._pending:
            lands = active[threads] & (group < self._committed[threads] - pending)
            if lands.any():
                yield threads[lands], at[lands], data[lands]
            if not lands.all():
                kept.append((threads[~lands], at[~lands], data[~lands], group[~lands]))
        self._pending = kept
