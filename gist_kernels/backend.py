"""The choice of the backend that serves a call: automatic, visible, overridable.

:data:`BACKENDS` is the only list of backends. ``"auto"`` asks them in order of speed and ends at
``"reference"``, the plain PyTorch operations, which take everything. A backend requested by name
serves the call or raises. It never falls back silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from gist_kernels.check import unknown_name
from gist_kernels.kernels import cpu, triton
from gist_kernels.kernels.protocols import OPERATIONS, Backend
from gist_kernels.tracing import under_transform

ENVIRONMENT_VARIABLE = "GIST_KERNELS_BACKEND"
REFERENCE = "reference"

# In the order in which "auto" asks them: the fastest for a device first.
BACKENDS: tuple[Backend, ...] = (cpu.BACKEND, triton.BACKEND)
_override: ContextVar[str | None] = ContextVar("gist_kernels_backend", default=None)


def _by_name() -> dict[str, Backend]:
    return {backend.name: backend for backend in BACKENDS}


class BackendInfo(NamedTuple):
    """One backend as :func:`backends` reports it."""

    available: bool
    detail: str
    """The hardware and software it runs on here, or why it can't run."""
    operations: tuple[str, ...]
    """The operations it serves; another backend serves the rest."""


def backends() -> dict[str, BackendInfo]:
    """Every backend, in the order of asking, with its operations, or the reason why it can't run.

    >>> import gist_kernels
    >>> gist_kernels.backends()["reference"].available
    True
    """
    found = {
        backend.name: BackendInfo(
            available=backend.unavailable is None,
            detail=backend.unavailable or backend.detail(),
            operations=_operations(backend),
        )
        for backend in BACKENDS
    }
    every = tuple(sorted(name for names in OPERATIONS.values() for name in names))
    return found | {REFERENCE: BackendInfo(True, "plain PyTorch, any device", every)}


def _operations(backend: Backend) -> tuple[str, ...]:
    served = (names for family, names in OPERATIONS.items() if backend.has(family))
    return tuple(sorted(name for names in served for name in names))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the ``with`` block by one backend, in this thread or task.

    Changing the backend re-traces code that ``torch.compile`` has traced. Before PyTorch 2.15, such
    code keeps the backend of its first trace.

    Args:
        name: a key of :func:`backends`, or ``"auto"``, the default outside any block. The name
            takes precedence over the environment variable ``GIST_KERNELS_BACKEND``, which is read
            when gist_kernels is imported.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: raised by an operation that the backend can't serve.
    """
    token = _override.set(_checked(name, "name"))
    try:
        yield
    finally:
        _override.reset(token)


def _checked(name: str, argument: str) -> str:
    known = ("auto", *_by_name(), REFERENCE)
    if name not in known:
        raise ValueError(unknown_name(argument, name, known))
    return name


def _requested() -> str:
    return _override.get() or _DEFAULT


if torch.__version__ < "2.15":  # there Dynamo can't trace a ContextVar, in 2.15 it guards on it
    # What torch.compiler.assume_constant_result does, without its import of all of Dynamo.
    _requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select(family: str, tensor: torch.Tensor) -> Any:
    """The kernels of a family that serve tensors with this tensor's device and dtype.

    ``family`` is a key of :data:`~gist_kernels.kernels.protocols.OPERATIONS`. None stands for the
    reference.

    Raises:
        RuntimeError: the backend requested by name can't serve such tensors.
    """
    requested = _requested()
    if torch.compiler.is_compiling():  # needs no cache, and the tracer would warn of it
        return _choose(requested, family, tensor.device, tensor.dtype)
    if under_transform():
        if requested not in ("auto", REFERENCE):
            raise RuntimeError(
                f"backend {requested!r} can't serve this call: it takes no part in torch.func "
                "transforms and forward-mode differentiation; the backend 'reference' does"
            )
        return None
    return _cached_choice(requested, family, tensor.device, tensor.dtype)


def serving(family: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend that would serve such a call outside torch.func transforms."""
    chosen = _choose_backend(_requested(), family, device_type, dtype)
    return REFERENCE if chosen is None else chosen.name


def _choose(requested: str, family: str, device: torch.device, dtype: torch.dtype) -> Any:
    chosen = _choose_backend(requested, family, device.type, dtype)
    return None if chosen is None else chosen.kernels(family)


def _choose_backend(
    requested: str, family: str, device_type: str, dtype: torch.dtype
) -> Backend | None:
    for backend in BACKENDS:
        if requested in ("auto", backend.name):
            refusal = backend.refusal(family, device_type, dtype)
            if refusal is None:
                return backend
            if requested != "auto":
                raise RuntimeError(f"backend {requested!r} can't serve this call: {refusal}")
    return None


_cached_choice = lru_cache(_choose)
_DEFAULT = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)
