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
def divergence_forward(classes: int, sides: int) -> Tile:
    """A row of several sides in registers, or block by block."""
    most = _LONGEST // _power_of_2(sides)
    block = min(max(16, _power_of_2(classes)), most)
    return Tile(1, block, threads=256 if sides > 4 else min(512, max(128, block // 8)))


@lru_cache(maxsize=1024)
def divergence_backward(classes: int, sides: int) -> Tile:
    """Gradients of several sides: element-wise."""
    block = min(max(16, _power_of_2(classes)), 1024 if sides > 4 else _BACKWARD_CHUNK)
    return Tile(1, block, threads=256 if sides > 4 else max(128, block // 8))


@lru_cache(maxsize=1024)
def combine(chunks: int) -> Tile:
    """Rows' statistics from their chunks'."""
    block = _power_of_2(chunks)
    return Tile(max(1, 256 // block), block, threads=128)


ELEMENTWISE = Tile(1, 1024, threads=128)
"""Of activations."""

# The greatest rank of which products are summed in registers, padded to a power of 2; how many
# numbers of either weight a thread then holds there; and the most threads for which a
# multiprocessor has that many registers, for the sums of that size in the backward pass too.
_SMALL_RANK = 8
_WEIGHTS_HELD = 32
_MOST_THREADS = 256


class AdapterTile(NamedTuple):
    """What one program of the adapter works on at a time."""

    rows: int
    block: int
    """Features: all of them, unless ``chunked``."""
    ranks: int
    threads: int
    stages: int
    share: float
    """Programs for each multiprocessor, where a program goes through many tiles."""
    chunked: bool = False

    def programs(self, rows: int) -> int:
        return -(-rows // self.rows)

    def chunks(self, features: int) -> int:
        return -(-features // self.block)

    def parts(self, rows: int, multiprocessors: int) -> tuple[int, int]:
        """How many programs share all tiles, and how many tiles each of them takes.

        They depend on the shapes and the device's size alone: the same sums every time.
        """
        tiles = self.programs(rows)
        each = -(-tiles // max(1, int(self.share * multiprocessors)))
        return -(-tiles // each), each

    def meta(self, warp_size: int) -> dict[str, Any]:
        shape = {"ROWS": self.rows} if self.chunked else {"STAGES": self.stages}
        return shape | {
            "BLOCK": self.block,
            "RANKS": self.ranks,
            # AMD's compiler spills a scalar register for rows shared among fewer than four.
            "num_warps": max(4 if warp_size == 64 else 1, self.threads // warp_size),
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


@lru_cache(maxsize=1024)
def adapter_forward(features: int, rank: int) -> AdapterTile:
    """LayerNorm and adapter; rank 0 is no adapter."""
    return _row(features, rank, 384)


@lru_cache(maxsize=1024)
def adapter_backward(features: int, rank: int) -> AdapterTile:
    """dx, and with few ranks the weights' gradients."""
    return _row(features, rank, 256)


def _row(features: int, rank: int, resident: int) -> AdapterTile:
    """One row at a time. As many programs as a multiprocessor can hold take turns there: a program
    waits for the sums of its row, and each leaves sums of its own to add up in the end."""
    block, ranks = max(16, _power_of_2(features)), _power_of_2(max(1, rank))
    threads = max(32, block * max(ranks, 2) // _WEIGHTS_HELD)
    if ranks > _SMALL_RANK or block > _LONGEST or threads > _MOST_THREADS:
        return _chunked(rank)
    # Enough rows on their way to keep the memory busy.
    stages = 4 if block <= 1024 else 3 if block <= 2048 else 2
    return AdapterTile(1, block, ranks, threads, stages, max(1, resident // threads))


@lru_cache(maxsize=1024)
def adapter_weights(features: int, rank: int) -> AdapterTile:
    """The weights' gradients of many ranks."""
    tile = _chunked(rank)
    return tile._replace(share=2 / tile.chunks(features))


def _chunked(rank: int) -> AdapterTile:
    """What no target needs more registers for than there are, as bench/binaries.py checks."""
    ranks = max(16, _power_of_2(rank))
    return AdapterTile(32 if ranks <= 64 else 16, 32, ranks, 256, 2, 1, chunked=True)


ADAPTER_SUMS = Tile(32, 64, threads=128)
"""Of programs, and weights."""


class AttentionTile(NamedTuple):
    """What one program of the attention works on: all keys of a head, and a block of queries at a
    time."""

    columns: int
    keys: int
    queries: int
    threads: int

    def parts(self, queries: int, heads: int, multiprocessors: int) -> tuple[int, int]:
        """How many programs share a head's blocks of queries in the forward pass, and how many
        blocks each takes. Each reads all keys, so there are no more than to be busy with."""
        blocks = -(-queries // self.queries)
        each = min(blocks, max(1, blocks * heads // (2 * multiprocessors)))
        return -(-blocks // each), each

    def meta(self, warp_size: int) -> dict[str, Any]:
        meta = {
            "COLUMNS": self.columns,
            "KEYS": self.keys,
            "QUERIES": self.queries,
            "num_warps": self.threads // warp_size,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }
        if torch.version.hip is None:
            meta["maxnreg"] = 255  # all there are; ptxas may spill for an occupancy instead
        return meta


# How many numbers of keys and of values a program can keep at hand, and their gradients in
# registers: with tensor cores that read shared memory, and with those that need registers for it.
_KEYS_HELD = {True: 16_384, False: 8192}


@lru_cache(maxsize=1024)
def attention(keys: int, head_dim: int, *, reads_shared: bool) -> AttentionTile | None:
    """None where a head's keys are too many for one program."""
    columns, rows = max(16, _power_of_2(head_dim)), max(16, _power_of_2(keys))
    if rows * columns > _KEYS_HELD[reads_shared] or rows > 256:
        return None
    threads = 256 if rows * columns >= 8192 else 128
    return AttentionTile(columns, rows, queries=32, threads=threads)


def _tile(classes: int, per_thread: int) -> Tile:
    block = max(16, _power_of_2(classes))
    if block <= _SHORT:
        return Tile(_SHORT // block, block, threads=128)
    return Tile(1, block, threads=max(128, block // per_thread))


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
