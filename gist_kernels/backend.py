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
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from gist_kernels import reference
from gist_kernels.kernels import cpu, triton
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

    def refusal(self, operation: str, device_type: str, dtype: torch.dtype) -> str | None:
        """Why this backend can't serve such a call, or None when it can."""
        if self.unavailable is not None:
            return self.unavailable
        if operation not in self.operations:
            return f"it has no {operation}"
        if self.device_types is not None and device_type not in self.device_types:
            return f"it takes {' or '.join(self.device_types)} tensors, not {device_type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it does not take {dtype}"
        return None


# In the order in which "auto" asks them: the fastest for a device first; the last one takes all.
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
        "triton",
        operations=triton.operations(),
        unavailable=triton.unavailable(),
        device_types=triton.DEVICE_TYPES,
        dtypes=triton.DTYPES,
        detail=triton.detail(),
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
    """Every backend, in the order they are asked, with what it serves here, or why it can't.

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

    What ``torch.compile`` has traced is traced anew where the choice differs; before PyTorch 2.15,
    it keeps the backend that it was traced with.

    Args:
        name: a key of :func:`backends`, or ``"auto"``, the default outside any block. It takes
            precedence over the environment variable ``GIST_KERNELS_BACKEND``, which is read when
            gist_kernels is imported.

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


def _requested() -> str:
    return _override.get() or _DEFAULT


if torch.__version__ < "2.15":  # there Dynamo can't trace a ContextVar, in 2.15 it guards on it
    # What torch.compiler.assume_constant_result does, without its import of all of Dynamo.
    _requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select(operation: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of ``operation`` for tensors with this one's device and dtype."""
    requested = _requested()
    if torch.compiler.is_compiling():  # needs no cache, and the tracer would warn of it
        return _choose(requested, operation, tensor.device.type, tensor.dtype)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        if requested not in ("auto", "reference"):
            raise RuntimeError(
                f"backend {requested!r} can't serve {operation}: it takes no part in torch.func "
                "transforms and forward-mode differentiation; the backend 'reference' does"
            )
        requested = "reference"
    return _cached_choice(requested, operation, tensor.device.type, tensor.dtype)


def serving(operation: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend that would serve such a call outside torch.func transforms."""
    found = _choose(_requested(), operation, device_type, dtype)
    return next(b.name for b in _BACKENDS if b.operations.get(operation) is found)


def _choose(
    requested: str, operation: str, device_type: str, dtype: torch.dtype
) -> Callable[..., Any]:
    if requested != "auto":
        backend = _BY_NAME[requested]
        refusal = backend.refusal(operation, device_type, dtype)
        if refusal is not None:
            raise RuntimeError(f"backend {requested!r} can't serve {operation}: {refusal}")
        return backend.operations[operation]
    return next(
        backend.operations[operation]
        for backend in _BACKENDS
        if backend.refusal(operation, device_type, dtype) is None
    )


_cached_choice = lru_cache(_choose)
_DEFAULT = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)
