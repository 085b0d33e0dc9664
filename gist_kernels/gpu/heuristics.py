"""Launch shapes of the Triton kernels, in one place; nothing is tuned at run time.

None of them depends on the number of rows: how a row is cut up decides the last bits of its sums,
and those must not change with the batch around it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

# Elements, of either logit tensor, in a tile of several rows.
_SHORT = 512
# The longest row that one program takes whole, and that it can also keep for the gradients: at
# twice that, one program fills a multiprocessor's registers, and nothing overlaps its loads.
_LONGEST = 8192
_LONGEST_KEPT = 4096
# Above, its chunks in the forward and the backward pass: short enough for several programs on a
# multiprocessor, whose loads and arithmetic then overlap, long enough that what is kept of a chunk
# is below 1 % of the traffic.
_FORWARD_CHUNK = 4096
_BACKWARD_CHUNK = 2048

# Rows whose targets each program counts for itself; above, one program counts for all.
COUNT_INLINE = 256


class Tile(NamedTuple):
    """What one program works on: a block of classes, or of chunks, of some rows."""

    rows: int
    block: int
    threads: int

    def chunks(self, classes: int) -> int:
        """Programs that share a row."""
        return -(-classes // self.block)

    def programs(self, rows: int, classes: int = 1) -> int:
        return -(-rows // self.rows) * self.chunks(classes)

    def meta(self, warp_size: int) -> dict[str, Any]:
        """Launch arguments. Warps differ in size, 32 lanes or 64 (AMD CDNA); threads do not."""
        meta = {
            "ROWS": self.rows,
            "BLOCK": self.block,
            "num_warps": self.threads // warp_size,
            "enable_fp_fusion": True,
        }
        if self.rows > 1 and torch.version.hip is None:
            # Left to itself, ptxas may spill here for an occupancy that so little work can't use.
            meta["maxnreg"] = 128
        return meta


@lru_cache(maxsize=1024)
def forward(classes: int) -> Tile:
    """Statistics."""
    return _tile(classes if classes <= _LONGEST else _FORWARD_CHUNK, 16)


@lru_cache(maxsize=1024)
def backward(classes: int) -> Tile:
    """Gradients from given statistics: element-wise."""
    return _tile(min(classes, _BACKWARD_CHUNK), 8)


@lru_cache(maxsize=1024)
def kept(classes: int) -> Tile | None:
    """Statistics and gradients of rows held in registers in between; None where they can't be."""
    return _tile(classes, 8) if classes <= _LONGEST_KEPT else None


@lru_cache(maxsize=1024)
def combine(chunks: int) -> Tile:
    """Rows' statistics from their chunks'."""
    block = _power_of_2(chunks)
    return Tile(max(1, 256 // block), block, threads=128)


def _tile(classes: int, per_thread: int) -> Tile:
    block = max(16, _power_of_2(classes))
    if block <= _SHORT:
        return Tile(_SHORT // block, block, threads=128)
    return Tile(1, block, threads=max(128, block // per_thread))


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
