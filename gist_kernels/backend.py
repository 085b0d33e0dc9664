"""Which implementation serves a call: automatic, visible, overridable.

A backend is a table of operations with the devices and dtypes it takes. ``"auto"`` asks them in
order of speed and ends at ``"reference"``, which takes everything. A backend asked for by name
either serves the call or raises: it never hands it on silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gist_kernels import cpu, reference
from gist_kernels.suggest import unknown_name

ENVIRONMENT_VARIABLE = "GIST_KERNELS_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One row of the table: what a backend is called, what it offers, what it takes."""

    name: str
    operations: Mapping[str, Callable[..., Any]]
    unavailable: str | None = None
    """Why it can't run on this machine; None where it can."""
    device_types: tuple[str, ...] | None = None
    """Devices it takes, as in ``tensor.device.type``; None takes every device."""
    dtypes: tuple[torch.dtype, ...] | None = None
    detail: str = ""

    def refusal(self, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend can't serve such a call, or None when it can."""
        if self.unavailable is not None:
            return self.unavailable
        if operation not in self.operations:
            return f"it has no {operation}"
        if self.device_types is not None and device.type not in self.device_types:
            return f"it takes {' or '.join(self.device_types)} tensors, not {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it does not take {dtype}"
        return None


# Fastest first; the last one takes every call.
_BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu",
        operations=cpu.OPERATIONS,
        unavailable=cpu.unavailable(),
        device_types=("cpu",),
        dtypes=cpu.DTYPES,
        detail=cpu.detail(),
    ),
    Backend(
        "reference",
        operations=reference.OPERATIONS,
        detail="plain PyTorch, any device",
    ),
)
_BY_NAME = {backend.name: backend for backend in _BACKENDS}
_override: ContextVar[str | None] = ContextVar("gist_kernels_backend", default=None)


class BackendInfo(NamedTuple):
    """One backend as :func:`backends` reports it."""

    available: bool
    detail: str
    """What it runs on here, or why it can't."""
    operations: tuple[str, ...]
    """The operations it serves; another backend serves the rest."""


def backends() -> dict[str, BackendInfo]:
    """Every backend, fastest first, with what it serves here, or why it can't.

    >>> backends()["reference"].available
    True
    """
    return {
        backend.name: BackendInfo(
            available=backend.unavailable is None,
            detail=backend.unavailable or backend.detail,
            operations=tuple(sorted(backend.operations)),
        )
        for backend in _BACKENDS
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the ``with`` block by one backend, in this thread or task.

    Args:
        name: a key of :func:`backends`, or ``"auto"``, the default outside any block. It takes
            precedence over the environment variable ``GIST_KERNELS_BACKEND``.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: from the operation called, where the backend can't serve it.
    """
    token = _override.set(_checked(name, "name"))
    try:
        yield
    finally:
        _override.reset(token)


def _checked(name: str, argument: str) -> str:
    if name != "auto" and name not in _BY_NAME:
        raise ValueError(unknown_name(argument, name, ("auto", *_BY_NAME)))
    return name


def select(operation: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of ``operation`` for tensors with this one's device and dtype."""
    requested = _override.get()
    if requested is None:
        from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
        requested = _checked(from_environment, ENVIRONMENT_VARIABLE) if from_environment else "auto"
    if requested != "auto":
        backend = _BY_NAME[requested]
        refusal = backend.refusal(operation, tensor.device, tensor.dtype)
        if refusal is not None:
            raise RuntimeError(f"backend {requested!r} can't serve {operation}: {refusal}")
        return backend.operations[operation]
    return next(
        backend.operations[operation]
        for backend in _BACKENDS
        if backend.refusal(operation, tensor.device, tensor.dtype) is None
    )
