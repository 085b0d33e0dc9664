"""The C++ backend for CPU tensors, built by CMake (CMakeLists.txt) into ``_native``.

``_native`` may be missing: an installation without a compiler is complete, only slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch  # first: _native then shares torch's OpenMP run-time and thread pool

_native: Any = None
_import_error: ImportError | None = None
try:
    _native = import_module("gist_kernels.kernels.cpu._native")
except ImportError as error:
    _import_error = error

INSTRUCTIONS_VARIABLE = "GIST_KERNELS_INSTRUCTIONS"
"""Environment variable that selects the instruction set, read when gist_kernels is imported."""


def _select_instructions(name: str) -> None:
    try:
        _native.use_instruction_set(name)
    except ValueError as error:
        raise ValueError(f"{INSTRUCTIONS_VARIABLE}: {error}") from None


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERATIONS: dict[str, Callable[..., Any]] = {}
if _native is not None:
    if requested := os.environ.get(INSTRUCTIONS_VARIABLE):
        _select_instructions(requested)

    from gist_kernels.fused import sublayer_operations
    from gist_kernels.kernels.cpu import loss
    from gist_kernels.kernels.cpu.sublayers import KERNELS
    from gist_kernels.ops import loss_operations

    OPERATIONS |= loss_operations("cpu", loss)
    OPERATIONS |= sublayer_operations(KERNELS)


def unavailable() -> str | None:
    """Why the native module can't be used, with what to do; None when it is loaded."""
    if _native is not None:
        return None
    return (
        f"the native module is missing ({_import_error}); reinstall with a C++17 compiler on the "
        "path and without GIST_KERNELS_NATIVE=0"
    )


def detail() -> str:
    """What the native module runs on here."""
    return f"C++, {_native.instruction_set()} instructions" if _native is not None else ""
