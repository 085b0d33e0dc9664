"""Which cases of a large test `make test` leaves to `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_where(slow: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases as pytest's parameters, marked slow where slow(*case) is true."""

    def parameter(case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=[pytest.mark.slow] if slow(*values) else [])

    return [parameter(case) for case in cases]
