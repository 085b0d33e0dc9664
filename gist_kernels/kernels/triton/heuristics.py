"""Launch shapes of the Triton kernels. Nothing is tuned at run time.

No shape depends on the number of rows. The way a row is cut decides the last bits of its sums, and
these must not change with the batch around the row. They do change with the alignment of the
logits: Triton compiles other loads, in other registers, where a tensor does not begin at a multiple
of 16 bytes, as a slice of a batch may.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

# Elements of each logit tensor in a tile of several rows.
_SHORT = 512
# The longest row that one program takes whole, and the longest that it can also keep for the
# gradients. At twice that, one program fills a multiprocessor's registers, and nothing overlaps its
# loads.
_LONGEST = 8192
_LONGEST_KEPT = 4096
# The chunks of longer rows in the forward and the backward pass. They are short enough for several
# programs per multiprocessor, so that loads and arithmetic overlap. They are long enough that the
# statistics of the chunks are below 1 % of the traffic.
_FORWARD_CHUNK = 4096
_BACKWARD_CHUNK = 2048

# Whether the compiler may contract a product and a sum into one FMA, which rounds once: not here.
# In p - q, an FMA rounds only one of the two products. Equal logits then have a gradient, and the
# product that is rounded depends on the sides that need one. In the sum of a row's products, an FMA
# rounds the product of another lane, but not its own. The lanes then disagree on the last bit.
FP_FUSION = False

# Up to this many rows, each program counts the targets itself; above, one program counts for all.
COUNT_INLINE = 256
# Targets that this one program reads at a time.
COUNT_BLOCK = 4096


class Tile(NamedTuple):
    """The work of one program: a block of classes, or of chunks, of some rows."""

    rows: int
    block: int
    threads: int

    def chunks(self, classes: int) -> int:
        """Programs that share a row."""
        return -(-classes // self.block)

    def programs(self, rows: int) -> int:
        return -(-rows // self.rows)

    def meta(self, warp_size: int) -> dict[str, Any]:
        """Launch arguments. A warp has 32 lanes, or 64 (AMD CDNA); a tile has a fixed number."""
        meta = {
            "ROWS": self.rows,
            "BLOCK": self.block,
            "num_warps": self.threads // warp_size,
            "enable_fp_fusion": FP_FUSION,
        }
        if self.rows > 1 and torch.version.hip is None:
            # By default ptxas may spill here, for an occupancy that so little work can't use.
            meta["maxnreg"] = 128
        return meta


@lru_cache(maxsize=1024)
def forward(classes: int, probabilities: bool = False) -> Tile:
    """The tile of the statistics. Targets that are ``probabilities`` take a register a class."""
    return _tile(classes if classes <= _LONGEST else _FORWARD_CHUNK, 16 if probabilities else 32)


@lru_cache(maxsize=1024)
def backward(classes: int) -> Tile:
    """The tile of the gradients from given statistics, which are element-wise."""
    return _tile(min(classes, _BACKWARD_CHUNK), 16)


@lru_cache(maxsize=1024)
def kept(classes: int) -> Tile | None:
    """The tile of statistics and gradients in one kernel; None if a row doesn't fit registers."""
    return _tile(classes, 16) if classes <= _LONGEST_KEPT else None


@lru_cache(maxsize=1024)
def divergence_forward(classes: int, sides: int) -> Tile:
    """A row of several sides in registers, or block by block."""
    most = _LONGEST // _power_of_2(sides)
    block = min(max(16, _power_of_2(classes)), most)
    return Tile(1, block, threads=256 if sides > 4 else min(512, max(128, block // 8)))


@lru_cache(maxsize=1024)
def divergence_backward(classes: int, sides: int) -> Tile:
    """Gradients of several sides: element-wise.

    No block has fewer classes than threads. Otherwise every warp would load all logits, perhaps
    after another warp had stored the gradients over them.
    """
    least = 256 if sides > 4 else 128
    block = min(max(least, _power_of_2(classes)), 1024 if sides > 4 else _BACKWARD_CHUNK)
    return Tile(1, block, threads=256 if sides > 4 else max(128, block // 8))


def divergence_meta(tile: Tile, warp_size: int) -> dict[str, Any]:
    """Launch arguments of the divergence's kernels, which take one row per program."""
    meta = tile.meta(warp_size)
    del meta["ROWS"]
    if torch.version.hip is None:
        # All there are: left to itself, ptxas may spill for an occupancy that nothing needs.
        meta["maxnreg"] = min(255, 65536 // tile.threads)
    return meta


@lru_cache(maxsize=1024)
def combine(chunks: int) -> Tile:
    """The tile of the kernel that merges the chunks' statistics."""
    block = _power_of_2(chunks)
    return Tile(max(1, 256 // block), block, threads=128)


ELEMENTWISE = Tile(1, 1024, threads=128)
"""The tile of activations."""

# The greatest rank, padded to a power of 2, whose matmuls are summed in registers.
_SMALL_RANK = 8
# Numbers of each weight that a thread then holds in registers.
_WEIGHTS_HELD = 32
# The most threads for which a multiprocessor has that many registers, and as many for the backward
# pass's sums.
_MOST_THREADS = 256


class AdapterTile(NamedTuple):
    """The tile that one program of the adapter works on at a time."""

    rows: int
    block: int
    """Features: all, unless ``chunked``."""
    ranks: int
    threads: int
    stages: int
    share: float
    """Programs per multiprocessor, if a program takes many tiles."""
    chunked: bool = False

    def programs(self, rows: int) -> int:
        return -(-rows // self.rows)

    def chunks(self, features: int) -> int:
        return -(-features // self.block)

    def parts(self, rows: int, multiprocessors: int) -> tuple[int, int]:
        """The number of programs, and the number of tiles each takes.

        They depend only on the shapes and the device's size: the same sums every time.
        """
        tiles = self.programs(rows)
        each = -(-tiles // max(1, int(self.share * multiprocessors)))
        return -(-tiles // each), each

    def meta(self, warp_size: int) -> dict[str, Any]:
        shape = {"ROWS": self.rows} if self.chunked else {"STAGES": self.stages}
        return shape | {
            "BLOCK": self.block,
            "RANKS": self.ranks,
            # With fewer than four warps per row, AMD's compiler spills a scalar register.
            "num_warps": max(4 if warp_size == 64 else 1, self.threads // warp_size),
            "num_stages": self.stages,
            "enable_fp_fusion": FP_FUSION,
        }


@lru_cache(maxsize=1024)
def adapter_forward(features: int, rank: int, tf32: bool = True) -> AdapterTile:
    """The tile of LayerNorm and adapter; rank 0 means no adapter.

    Without ``tf32``, tensor cores take no float32.
    """
    return _row(features, rank, 384, tf32)


@lru_cache(maxsize=1024)
def adapter_backward(features: int, rank: int, tf32: bool = True) -> AdapterTile:
    """The tile of dx and, for small ranks, of the weights' gradients."""
    return _row(features, rank, 256, tf32)


def _row(features: int, rank: int, resident: int, tf32: bool) -> AdapterTile:
    """One row at a time, on as many programs as a multiprocessor can hold.

    They take turns, since a program waits for the sums of its row. More programs than that would
    only leave more partial sums to add up.
    """
    block, ranks = max(16, _power_of_2(features)), _power_of_2(max(1, rank))
    threads = max(32, block * max(ranks, 2) // _WEIGHTS_HELD)
    if ranks > _SMALL_RANK or block > _LONGEST or threads > _MOST_THREADS:
        return _chunked(rank, tf32)
    # Enough rows in flight to keep the memory busy.
    stages = 4 if block <= 1024 else 3 if block <= 2048 else 2
    return AdapterTile(1, block, ranks, threads, stages, max(1, resident // threads))


@lru_cache(maxsize=1024)
def adapter_weights(features: int, rank: int, tf32: bool = True) -> AdapterTile:
    """The tile of the weights' gradients for large ranks."""
    tile = _chunked(rank, tf32)
    return tile._replace(share=2 / tile.chunks(features))


def _chunked(rank: int, tf32: bool) -> AdapterTile:
    """A tile that spills registers on no target up to rank 128, as bench/binaries.py checks."""
    ranks = max(16, _power_of_2(rank))
    few = ranks <= 64
    # Without tensor cores, operands of a matmul stay in registers.
    block = 32 if few or tf32 else 16
    return AdapterTile(32 if few else 16, block, ranks, 256, 2, 1, chunked=True)


ADAPTER_SUMS = Tile(32, 64, threads=128)
"""The tile of the launch that adds up partial sums: programs by weights."""


class AttentionTile(NamedTuple):
    """The work of one attention program: all keys of a head, and a block of queries at a time."""

    columns: int
    keys: int
    queries: int
    threads: int

    def parts(self, queries: int, heads: int, multiprocessors: int) -> tuple[int, int]:
        """The number of forward programs per head, and the blocks of queries each takes.

        Each program reads all keys. So there are only as many as keep the multiprocessors busy.
        """
        blocks = -(-queries // self.queries)
        each = min(blocks, max(1, blocks * heads // (2 * multiprocessors)))
        return -(-blocks // each), each

    def takes_rotation(self, half: bool, *, reads_shared: bool) -> bool:
        """Whether rotary positions leave enough registers, as bench/binaries.py checks: those of
        neighbours keep more tables at once."""
        if self.columns > 64:
            return False
        if reads_shared:
            return half or self.keys * self.columns <= 8192
        return self.keys <= 128 or self.columns <= 16

    def rotated_backward(self) -> AttentionTile:
        """The tile of the backward pass with rotary positions, which take registers too."""
        return self._replace(queries=self.queries // 2)

    def shared_memory(self) -> int:
        """At least the bytes of shared memory that each kernel takes, as bench/binaries.py
        checks."""
        keys = 4 * self.keys * self.columns  # and values
        most: int = keys + 6 * self.queries * (self.columns + self.keys)
        # AMD's matrix cores read registers.
        return most if torch.version.hip is None else most // 2

    def meta(self, warp_size: int) -> dict[str, Any]:
        meta = {
            "COLUMNS": self.columns,
            "KEYS": self.keys,
            "QUERIES": self.queries,
            "num_warps": self.threads // warp_size,
            "num_stages": 1,
            "enable_fp_fusion": FP_FUSION,
        }
        if torch.version.hip is None:
            meta["maxnreg"] = 255  # all there are; by default ptxas may spill for occupancy
        return meta


class AttentionTiles(NamedTuple):
    """The work of attention programs that hold no head whole: tiles of some queries by some keys.

    The same for all sizes of batch, queries and keys.
    """

    columns: int
    stages: int
    rows: int = 64
    """Of queries, or of keys, whose results or gradients are in registers."""
    block: int = 32
    """Of the keys, or queries, that are gone over."""
    warps: int = 4

    def programs(self, queries: int) -> int:
        """Forward programs per head. Of the backward pass, there is one per head."""
        return -(-queries // self.rows)

    def backward(self) -> AttentionTiles:
        """The tile of the backward pass. Warps that need no others for a matmul take fewer rows
        together, of which fewer are beyond the last."""
        return self if self.stages == 1 else self._replace(rows=32, warps=2)

    def meta(self) -> dict[str, Any]:
        meta = {
            "COLUMNS": self.columns,
            "ROWS": self.rows,
            "BLOCK": self.block,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": FP_FUSION,
        }
        if torch.version.hip is None:
            meta["maxnreg"] = 255  # as above
        return meta


# Numbers of the keys, and as many of the values, that a program can hold, with their gradients in
# registers. True: tensor cores read operands from shared memory. False: they need registers for it.
_KEYS_HELD = {True: 16_384, False: 8192}
# The widest heads and the most keys. Beyond, the backward pass spills.
_MOST_COLUMNS, _MOST_KEYS = 128, 256
# Queries at a time.
QUERIES = 32
# The widest heads and the most keys that go by tiles. Wider heads spill, or take twice the
# instructions. Longer ones are PyTorch's, with 5 matmuls in its backward pass for 8 here:
# `python -m bench.roofline --tokens N`.
_MOST_COLUMNS_TILED, _MOST_KEYS_TILED = 64, 320


@lru_cache(maxsize=1024)
def attention(
    keys: int, head_dim: int, *, reads_shared: bool, shared_memory: int
) -> AttentionTile | AttentionTiles | None:
    """The tile of attention: of all keys of a head if a program can hold them, or tiles of some.

    None if a head has too many keys for either, or rows of numbers that 16 bytes don't divide:
    loaded one by one, they take registers that are not there. ``shared_memory`` is the most bytes
    that a program can have.
    """
    if head_dim % 8:
        return None
    columns = max(16, _power_of_2(head_dim))
    held = _held(keys, columns, reads_shared)
    if held is not None and held.shared_memory() <= shared_memory:
        return held
    if columns > _MOST_COLUMNS_TILED or keys > _MOST_KEYS_TILED:
        return None
    # Where tensor cores read shared memory, other warps hide the loads.
    return AttentionTiles(columns, stages=1 if reads_shared else 2)


def _held(keys: int, columns: int, reads_shared: bool) -> AttentionTile | None:
    """The tile of all keys of a head; None if they are too many for one program."""
    rows = max(16, _power_of_2(keys))
    if rows * columns > _KEYS_HELD[reads_shared] or rows > _MOST_KEYS or columns > _MOST_COLUMNS:
        return None
    # The scores take registers too, for which heads of 16 columns count as 32.
    threads = 256 if rows * max(32, columns) >= 8192 else 128
    return AttentionTile(columns, rows, queries=QUERIES, threads=threads)


def _tile(classes: int, per_thread: int) -> Tile:
    block = max(16, _power_of_2(classes))
    if block <= _SHORT:
        return Tile(_SHORT // block, block, threads=128)
    return Tile(1, block, threads=max(128, block // per_thread))


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
