"""The registered backends as test parameters: a new one is tested without another line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gist_kernels.backend import BACKENDS, REFERENCE
from gist_kernels.kernels.protocols import Backend
from gist_kernels.kernels.triton import INTERPRETED


def serving(family: str, *, device: str | None = None, reference: bool = False) -> list[Any]:
    """A parameter per backend with kernels of a family, marked with the backend's name.

    ``device`` skips backends that take no tensors there. ``reference`` adds the reference first.
    A backend that can't run here is a parameter too: conftest.py skips it by its marker, and
    without such a rule its tests fail. Whole sublayers are slow in Triton's interpreter: make test
    leaves them to the kernels' own tests.
    """
    parameters = [pytest.param(REFERENCE)] if reference else []
    for backend in BACKENDS:
        available = backend.unavailable is None
        if available and not backend.has(family):
            continue
        marks = [getattr(pytest.mark, backend.name)]
        if family == "sublayers" and backend.name == "triton" and INTERPRETED:
            marks.append(pytest.mark.slow)
        if device is not None and available and device not in backend.device_types:
            marks.append(pytest.mark.skip(reason=f"{backend.name} takes no {device} tensors here"))
        parameters.append(pytest.param(backend.name, marks=marks))
    return parameters


def besides_the_default(family: str) -> list[Any]:
    """As :func:`serving`, without the backend that "auto" takes for CPU tensors."""
    default = next(b.name for b in BACKENDS if b.unavailable is None and "cpu" in b.device_types)
    return [parameter for parameter in serving(family) if parameter.values != (default,)]


def device_of(name: str) -> str:
    """The type of the devices whose tensors a backend takes first."""
    found = [backend.device_types for backend in BACKENDS if backend.name == name]
    return found[0][0] if found and found[0] else "cpu"


def takes(name: str, dtype: torch.dtype) -> bool:
    """Whether a backend takes a dtype; the reference takes all."""
    found: list[Backend] = [backend for backend in BACKENDS if backend.name == name]
    return not found or dtype in found[0].dtypes
