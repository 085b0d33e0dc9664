"""Fixtures for every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

# Before torch is imported, and for the processes that tests start: pytest-xdist already has a
# worker on each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._device import _device_constructors

PTX = os.environ.get("GIST_TEST_PTX")  # an architecture, 80 or 90: see docs/kernels.md
if PTX:
    # As under TRITON_INTERPRET=1 kernels take CPU tensors; but Triton compiles them.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import gist_kernels.kernels.triton as triton_kernels
    triton_kernels.INTERPRETED = triton_kernels.launch.INTERPRETED = False

from gist_kernels.kernels.triton import DEVICE_TYPES, INTERPRETED  # noqa: E402

if INTERPRETED:
    from interpreter import round_to_bfloat16, save_time

    round_to_bfloat16()
    save_time()

# PyTorch remembers which functions torch.device("meta") applies to: those as they are before
# _poisoned_empty replaces some of them.
_device_constructors()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--threads", type=int, default=1, help="CPU threads of each test that does not set its own"
    )


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("triton") and "cpu" not in DEVICE_TYPES:
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


def pytest_collection_finish() -> None:
    """Garbage collections, of which a test may ask for many, skip what is there before the tests:
    a million objects of libraries and of the tests themselves."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A kernel for sm_90 may need instructions that are not interpreted; one for sm_80 none."""
    if PTX != "90":
        return (yield)
    from ptx import UnsupportedError

    try:
        return (yield)
    except UnsupportedError as error:
        pytest.skip(f"not interpreted: {error}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same without a trace of the stack, which PyTorch keeps until a GPU is used
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads(pytestconfig: pytest.Config) -> None:
    torch.set_num_threads(pytestconfig.getoption("threads"))


@pytest.fixture(autouse=True)
def _ptx(request: pytest.FixtureRequest) -> Iterator[None]:
    """With GIST_TEST_PTX, execute what Triton compiles, see tests/support/ptx."""
    if not PTX or not request.node.get_closest_marker("triton"):
        yield
        return
    from ptx.driver import executed

    seed = os.environ.get("GIST_TEST_PTX_SEED")
    with executed(int(PTX), seed=int(seed) if seed else None):
        yield


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN, so that an element nobody wrote shows in a result."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = plain(*args, **kwargs)
        if tensor.is_floating_point() and not torch.compiler.is_compiling():
            tensor.detach().fill_(torch.nan)  # a leaf may require a gradient
        return tensor

    return allocate
