"""What every launch of a Triton kernel needs to know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch


def alignment(*sizes: int, most: int = 16) -> int:
    """The greatest power of two, up to ``most``, that divides every size.

    Kernels take sizes in units of it. They know it when compiled, and hence which accesses they can
    vectorise, without a binary for every size.
    """
    common = most
    for size in sizes:
        common |= size
    return common & -common


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache
def warp_size(device: torch.device) -> int:
    return 32 if device.type == "cpu" else torch.cuda.get_device_properties(device).warp_size


@lru_cache
def tensor_cores_read_shared_memory(device: torch.device) -> bool:
    """As NVIDIA's do since Hopper. AMD's do not, but have registers enough."""
    if device.type == "cpu" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; in the interpreter, as many as a large GPU has."""
    if device.type == "cpu":
        return 128
    return torch.cuda.get_device_properties(device).multi_processor_count
