"""Rows that don't count lie in memory that the process may not read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's mprotect")

# A row is two pages. Rows are more than a group, and the first and the last are left out.
PROGRAM = """
import ctypes, mmap, sys
import torch
import gist_kernels as gk

protect = ctypes.CDLL(None).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
torch.set_num_threads(1)
rows, classes = 11, mmap.PAGESIZE // 2
counts = torch.arange(rows) % 3 == 1
ignoring = torch.where(counts, torch.arange(rows), -100)

def side():
    block = mmap.mmap(-1, 4 * rows * classes)
    found = torch.frombuffer(block, dtype=torch.float32).view(rows, classes).normal_()
    for row in range(rows):
        if not counts[row]:
            assert protect(found[row].data_ptr(), 4 * classes, 0) == 0
    return found.requires_grad_()

a, b = side(), side()
for name, loss in {
    "kl": lambda: gk.bidirectional_kl(a, b, mask=counts),
    "jsd": lambda: gk.jensen_shannon(a, b, mask=counts),
    "loss": lambda: gk.gist_loss(a, b, torch.arange(rows), mask=counts),
    "ignored": lambda: gk.gist_loss(a, b, ignoring, label_smoothing=0.1),
    "at once": lambda: gk.gist_loss_and_grad(a, b, ignoring),
}.items():
    print(name, flush=True)
    found = loss()
    gradients = found[1:] if name == "at once" else torch.autograd.grad(found, (a, b))
    for gradient in gradients:
        assert not gradient[~counts].any()
        assert gradient[counts].any(1).all()
print("done", flush=True)
if "control" in sys.argv:
    gk.bidirectional_kl(a, b)
"""


def run(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ
        | {"GIST_KERNELS_INSTRUCTIONS": instruction_set, "GIST_KERNELS_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_rows_that_do_not_count_are_not_read(instruction_set):
    result = run(instruction_set, "control")
    assert result.stdout.split("\n")[-2] == "done", result.stderr
    assert result.returncode == -signal.SIGSEGV  # without a mask they are
