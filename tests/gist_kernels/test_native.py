"""The native module is built, and shares torch's threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if os.environ.get("GIST_KERNELS_NATIVE") == "0":
    pytest.skip("installed without the native module", allow_module_level=True)

# Where it was not left out on purpose, a missing module is a failure, not a skip.
from gist_kernels.cpu import _native as native


def test_instruction_set_is_one_this_processor_has():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {"avx512": "avx512bw", "avx2": "avx2", "portable": ""}
    assert needed[native.instruction_set()] in flags


def test_threads_follow_torch(set_threads):
    for threads in (1, 2):
        set_threads(threads)
        assert native.max_threads() == threads
