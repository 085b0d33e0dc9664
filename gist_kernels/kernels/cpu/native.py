"""The native module, and which of its instruction sets is in use.

The module may be missing: an installation without a compiler is complete, only slower.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch  # noqa: F401  # first: the module then shares torch's OpenMP run-time and thread pool

INSTRUCTIONS_VARIABLE = "GIST_KERNELS_INSTRUCTIONS"
"""Environment variable that selects the instruction set, read when gist_kernels is imported."""

native: Any = None
import_error: ImportError | None = None
try:
    native = import_module("gist_kernels.kernels.cpu._native")
except ImportError as error:
    import_error = error


def select_instructions(name: str) -> None:
    """Raises ValueError where the build or the processor has no such set."""
    try:
        native.use_instruction_set(name)
    except ValueError as error:
        raise ValueError(f"{INSTRUCTIONS_VARIABLE}: {error}") from None


if native is not None and os.environ.get(INSTRUCTIONS_VARIABLE):
    select_instructions(os.environ[INSTRUCTIONS_VARIABLE])
