"""The machine of a measurement: its name and versions, and its measured limits."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import measure
from gist_kernels.kernels.cpu.linear import by_onednn, linear

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def machine(device: torch.device) -> dict[str, Any]:
    """Names and versions, and the revision of the code."""
    on_gpu = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor_name(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "revision": _revision(),
    }
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}


def limits(device: torch.device) -> dict[str, float]:
    """Measured limits that no call on this machine can exceed.

    These are the bytes per second that a large copy reads and writes, the FLOP per second of a
    large matmul, and the seconds of the smallest operation.
    """
    on_gpu = device.type == "cuda"
    source = torch.ones((1 << 30 if on_gpu else 1 << 27) // 4, device=device)
    to = torch.empty_like(source)
    size = 8192 if on_gpu else 1024
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    one = torch.ones(1, device=device)
    calls = {
        "copy": lambda: to.copy_(source),
        "product": lambda: a @ b,
        "least": lambda: one.add_(1),
    }
    if not on_gpu:
        calls["product, oneDNN"] = lambda: by_onednn(a, b, None)
    times = measure.in_turns(calls, device, seconds=2.0)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    median["product"] = min(median["product"], median.get("product, oneDNN", math.inf))
    return {
        "copy_bytes_per_second": 2 * source.numel() * 4 / median["copy"],
        f"{str(dtype).removeprefix('torch.')}_flop_per_second": 2 * size**3 / median["product"],
        "smallest_operation_seconds": median["least"],
    }


def linear_of(device: torch.device) -> Linear:
    """The fastest matmul with a frozen weight that this package has on a device."""
    return linear if device.type == "cpu" else F.linear


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _revision() -> str:
    """The commit, marked where the tree differs from it; "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
