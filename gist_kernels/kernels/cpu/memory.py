"""Memory kept from one call to the next: large gradients, and what the C library has freed.

The C library returns blocks above 32 MiB to the system as soon as they are freed, and a process
pays for each of their pages again the next time. For a gradient of 1024 x 32000 numbers that takes
longer than computing it. So the last two such blocks, a gradient of each head, stay, unused, until
the next gradient of about that size; one that does not suit the next request is given back.

Smaller blocks lie in the C library's heap, which it shrinks when enough of its top is free. A
training step frees more than that at its end, and pays for each page again in the next step.
:func:`keep_freed` has the heap keep more. It is a setting of the whole process, so that a training
asks for it (:func:`gist.training.loop.fit`), and no import.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref

import torch

_CPU = torch.device("cpu")  # not the default one
_LEAST_BYTES = 32 << 20
_MOST_UNUSED = 2

KEEP_VARIABLE = "GIST_KERNELS_KEEP_MIB"
"""Environment variable with the MiB of its freed heap that the process keeps, read when
:func:`keep_freed` is called."""
_KEEP_MIB, _MOST_MIB = 1024, 2047  # mallopt takes an int
# The C library's own settings, which a user chose on purpose.
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")

_unused: list[mmap.mmap] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As :func:`torch.empty`, for what a caller drops before it asks again."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _LEAST_BYTES:
        return torch.empty(*shape, dtype=dtype, device=_CPU)  # a tuple takes twice as long
    block = _take(size)
    lent = memoryview(block)
    # The tensor's storage holds on to `lent` alone: when both are gone, the block is unused again.
    weakref.finalize(lent, _keep, block).atexit = False
    return torch.frombuffer(lent, dtype=dtype, count=count).view(shape)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """As :func:`empty`, in a contiguous tensor's shape and dtype, but faster where it is small."""
    if tensor.numel() * tensor.itemsize < _LEAST_BYTES:
        return torch.empty_like(tensor)
    return empty(tuple(tensor.shape), tensor.dtype)


def release() -> None:
    """Give back what is unused."""
    _unused.clear()


def keep_freed() -> bool:
    """Have the C library keep freed memory of its heap; whether it does.

    Only GNU's has the setting. Nothing is set where the user has set the library's own variables,
    or ``GIST_KERNELS_KEEP_MIB`` to 0.

    Raises:
        ValueError: the variable is no number from 0 to 2047.
    """
    value = os.environ.get(KEEP_VARIABLE) or str(_KEEP_MIB)
    if not value.isdecimal() or int(value) > _MOST_MIB:
        raise ValueError(f"{KEEP_VARIABLE} must be a number from 0 to {_MOST_MIB}, not {value!r}")
    chosen = any(name in os.environ for name in _SETTINGS)
    chosen |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or chosen or int(value) == 0:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3
    # Setting the first one ends the automatic growth of the second, which stops at 32 MiB.
    kept = mallopt(trim_threshold, int(value) << 20) and mallopt(mmap_threshold, _LEAST_BYTES)
    return bool(kept)


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
