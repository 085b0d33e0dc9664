"""Memory for large gradients, kept from one call to the next.

The C library returns blocks above 32 MiB to the system as soon as they are freed, and a process
pays for each of their pages again the next time. For a gradient of 1024 x 32000 numbers that takes
longer than computing it. So the last two such blocks, a gradient of each head, stay, unused, until
the next gradient of about that size; one that does not suit the next request is given back.
"""

from __future__ import annotations

import math
import mmap
import weakref

import torch

_LEAST_BYTES = 32 << 20
_MOST_UNUSED = 2

_unused: list[mmap.mmap] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As :func:`torch.empty`, for what a caller drops before it asks again."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _LEAST_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = _take(size)
    lent = memoryview(block)
    # The tensor's storage holds on to `lent` alone: when both are gone, the block is unused again.
    weakref.finalize(lent, _keep, block).atexit = False
    return torch.frombuffer(lent, dtype=dtype, count=count).view(shape)


def release() -> None:
    """Give back what is unused."""
    _unused.clear()


def _keep(block: mmap.mmap) -> None:
    _unused.append(block)
    del _unused[:-_MOST_UNUSED]


def _take(size: int) -> mmap.mmap:
    # Popped before it is looked at: another thread or a finalizer may change the list meanwhile.
    while True:
        try:
            block = _unused.pop()
        except IndexError:
            # Private, so that a forked process writes to pages of its own.
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size <= len(block) <= 2 * size:
            return block
