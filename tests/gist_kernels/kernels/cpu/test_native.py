"""The native module is built, and shares torch's threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gist_kernels.activations import ACTIVATIONS

if os.environ.get("GIST_KERNELS_NATIVE") == "0":
    pytest.skip("installed without the native module", allow_module_level=True)

# Where it was not left out on purpose, a missing module is a failure, not a skip.
from gist_kernels.kernels.cpu import _native as native
from gist_kernels.kernels.cpu.native import INSTRUCTIONS_VARIABLE


def test_instruction_set_is_one_this_processor_has():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {"amx": "amx_bf16", "avx512": "avx512bw", "avx2": "avx2"}
    assert needed.get(native.instruction_set(), "") in flags


def test_the_widest_instruction_set_is_taken_unless_another_is_chosen():
    assert native.instruction_sets()[-2:] == ["portable", "portable_bf16"]
    chosen = os.environ.get(INSTRUCTIONS_VARIABLE)
    assert native.instruction_set() == (chosen or native.instruction_sets()[0])
    with pytest.raises(ValueError, match="'mmx' is no .* it has .*portable"):
        native.use_instruction_set("mmx")


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("portable", r"^C\+\+, portable instructions; float32 matmuls by "),
        ("mmx", "ValueError: GIST_KERNELS_INSTRUCTIONS: 'mmx' is no .* it has .*portable"),
    ],
)
def test_environment_variable_chooses_the_instruction_set(name, printed):
    run = subprocess.run(
        [sys.executable, "-c", "import gist_kernels as gk; print(gk.backends()['cpu'].detail)"],
        env=os.environ | {INSTRUCTIONS_VARIABLE: name}, capture_output=True, text=True,
    )  # fmt: skip
    assert re.search(printed, run.stdout + run.stderr, re.MULTILINE)


def test_threads_follow_torch(set_threads):
    for threads in (1, 2):
        set_threads(threads)
        assert native.max_threads() == threads


def test_multiply_adds_take_time_in_proportion_to_their_number():
    """And as much as a processor needs: at most 2 x 16 of them at once, at up to 8 GHz."""

    def seconds(count):
        start = time.process_time()
        native.multiply_adds(count, 1)
        return time.process_time() - start

    few, many = (min(seconds(count) for _ in range(5)) for count in (10**7, 10**8))
    assert 5 < many / few < 20
    assert many > 10**8 / (2 * 16 * 8e9)


def test_codes_name_the_dtypes_and_activations_that_python_has():
    assert native.ACTIVATIONS.keys() == ACTIVATIONS.keys()
    assert {"float32", "bfloat16", "float16", "float64", "int64", "none"} == native.DTYPES.keys()
    assert all(hasattr(torch, name) for name in native.DTYPES if name != "none")
    assert len(set(native.DTYPES.values())) == len(native.DTYPES)
    for family in ("LOSS", "ADAPTER", "ACTIVATION", "ATTENTION"):
        assert getattr(native, f"{family}_DTYPES").items() <= native.DTYPES.items()
