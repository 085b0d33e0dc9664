"""Whether and where Triton kernels run, and the device properties that launches need."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

DEVICE_TYPES = ("cpu",) if INTERPRETED else ("cuda",)
"""Values of ``tensor.device.type``; PyTorch calls ROCm devices "cuda" too."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Arithmetic is in float32, so float64 is not among them."""


def unavailable() -> str | None:
    """Why the kernels can't be used here; None when they can. Initialises no device."""
    if find_spec("triton") is None:
        return "Triton is not installed (it is published for Linux, on x86-64 and aarch64)"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "there is no CUDA or ROCm device"


def detail() -> str:
    """Triton's version, and the device or interpreter that runs the kernels here."""
    if INTERPRETED:
        where = "its interpreter, on CPU tensors (TRITON_INTERPRET=1)"
    elif torch.version.hip is not None:
        where = f"ROCm {torch.version.hip}"
    else:
        where = f"CUDA {torch.version.cuda}"
    from triton import __version__

    return f"Triton {__version__}, {where}"


def alignment(*sizes: int, most: int = 16) -> int:
    """The greatest power of two, up to ``most``, that divides every size.

    Kernels take sizes in units of it. It is a compile-time constant, so the compiler knows which
    accesses it can vectorise, without a binary for every size.
    """
    common = most
    for size in sizes:
        common |= size
    return common & -common


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which ``device`` is current: Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache
def warp_size(device: torch.device) -> int:
    return 32 if device.type == "cpu" else torch.cuda.get_device_properties(device).warp_size


@lru_cache
def tensor_cores_take_bf16(device: torch.device) -> bool:
    """Whether tensor cores take bf16, and float32 as TF32, as NVIDIA's do since Ampere."""
    if device.type == "cpu" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def tensor_cores_read_shared_memory(device: torch.device) -> bool:
    """Whether tensor cores read operands from shared memory: Hopper's and the data centres'
    Blackwell do. GeForce Blackwell's (12.0, 12.1) read registers, as Ampere's.

    True for AMD too: its matrix cores do not, but it has registers enough.
    """
    if device.type == "cpu" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


@lru_cache
def shared_memory(device: torch.device) -> int:
    """The most bytes of shared memory that a program can have; in the interpreter, Hopper's."""
    if device.type == "cpu":
        return 232_448
    if torch.version.hip is not None:
        return 65_536  # PyTorch names no limit there; no AMD GPU has less
    properties: Any = torch.cuda.get_device_properties(device)
    most: int = properties.shared_memory_per_block_optin
    return most


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors; in the interpreter, that of a large GPU."""
    if device.type == "cpu":
        return 128
    return torch.cuda.get_device_properties(device).multi_processor_count
