"""Fixtures of the native kernels' tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that the native kernels are compiled for and this processor has; or the chosen one."""
    yield from _in_use(request.param)


@pytest.fixture(params=["amx", "portable_bf16"])
def bf16_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for those that multiply bf16 numbers, which only attention does."""
    yield from _in_use(request.param)


def _in_use(name: str) -> Iterator[str]:
    from gist_kernels.kernels.cpu import _native as native
    from gist_kernels.kernels.cpu.native import INSTRUCTIONS_VARIABLE

    if os.environ.get(INSTRUCTIONS_VARIABLE, name) != name:
        pytest.skip(f"{INSTRUCTIONS_VARIABLE} chooses another")
    before = native.instruction_set()
    try:
        native.use_instruction_set(name)
    except ValueError:
        pytest.skip(f"this processor has no {name}")
    yield name
    native.use_instruction_set(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
