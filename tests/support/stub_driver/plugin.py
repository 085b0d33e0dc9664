"""pytest on the stub driver: ``-p stub_driver.plugin``, with ``PYTHONPATH=tests/support``.

The tests marked ``gpu`` then launch, and their kernels compute nothing. With ``PYTHONOPTIMIZE=1``
and ``--assert=plain`` no result is compared either: the tests then go through all of their
launches, which leaves every binary in Triton's cache. ``make gpu-cache`` is that.
"""

from __future__ import annotations

from typing import Any

import pytest

import stub_driver

stub_driver.install()

import draws  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

_compiled, _found = [], []


def _count(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
    (_found if cache_hit else _compiled).append(metadata["hash"])


triton.knobs.compilation.listener = _count
if not __debug__:
    torch.testing.assert_close = lambda *args, **kwargs: None
    draws.assert_within_bounds = lambda drawn: drawn(0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.own_markers = [
            mark
            for mark in item.own_markers
            if mark.name != "skip" or mark.kwargs.get("reason") != "no CUDA or ROCm device"
        ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    workeroutput = getattr(session.config, "workeroutput", None)
    if workeroutput is not None:
        workeroutput["binaries"] = _compiled, _found
    elif not __debug__:  # what the tests say of results means nothing
        session.exitstatus = 0 if _compiled or _found else 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    compiled, found = getattr(node, "workeroutput", {}).get("binaries", ((), ()))
    _compiled.extend(compiled)
    _found.extend(found)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    compiled, found = set(_compiled), set(_found) - set(_compiled)
    terminalreporter.write_line(
        f"stub driver, Triton {triton.__version__}: {len(compiled)} binaries compiled, "
        f"{len(found)} from the cache {triton.knobs.cache.dir}"
    )
