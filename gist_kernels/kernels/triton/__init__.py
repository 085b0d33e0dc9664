"""The Triton backend, for tensors on CUDA and ROCm devices.

With the environment variable ``TRITON_INTERPRET=1``, set before Triton is imported, the kernels
run in Triton's interpreter instead, on CPU tensors: slow, but no device is needed to test them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

DEVICE_TYPES = ("cpu",) if INTERPRETED else ("cuda",)
"""As in ``tensor.device.type``; PyTorch calls ROCm devices "cuda" too."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Arithmetic is in float32, which would be a loss for float64."""


def unavailable() -> str | None:
    """Why the kernels can't be used here; None when they can. Initialises no device."""
    if find_spec("triton") is None:
        return "Triton is not installed (it is published for Linux on x86-64)"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "there is no CUDA or ROCm device"


def detail() -> str:
    """What the kernels run on here."""
    if unavailable() is not None:
        return ""
    if INTERPRETED:
        where = "its interpreter, on CPU tensors (TRITON_INTERPRET=1)"
    elif torch.version.hip is not None:
        where = f"ROCm {torch.version.hip}"
    else:
        where = f"CUDA {torch.version.cuda}"
    from triton import __version__

    return f"Triton {__version__}, {where}"


def operations() -> dict[str, Callable[..., Any]]:
    """What the kernels serve; Triton is imported only where they can run."""
    if unavailable() is not None:
        return {}
    from gist_kernels.fused import sublayer_operations
    from gist_kernels.kernels.triton import loss
    from gist_kernels.kernels.triton.sublayers import KERNELS
    from gist_kernels.ops import loss_operations

    return loss_operations("triton", loss) | sublayer_operations(KERNELS)
