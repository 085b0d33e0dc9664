"""Launches of the Triton kernels as a CUDA driver gets them, without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stub_driver
import torch

from gist_kernels.kernels import triton as gpu

SUPPORT = Path(stub_driver.__file__).parents[1]
REASON = stub_driver.unusable()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.skipif(gpu.INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a device: it takes the launches"
    ),
]


@pytest.mark.parametrize("checks", ["check_launches.py", "check_step.py"])
def test_launches(checks):
    """In a process of its own, which has a driver."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "stub_driver.plugin"),
        *("-p", "no:cacheprovider", str(SUPPORT / "stub_driver" / checks)),
    ]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "binaries compiled" in ran.stdout
