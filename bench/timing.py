"""Timing contenders against each other: in turns, in one process, with the machine named."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
# Seconds that one measurement should take at least, so that reading the clock doesn't count.
_BLOCK = 2e-3
_L2_BYTES = 256 << 20


def in_turns(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float = 10.0,
    rounds: tuple[int, int] = (5, 300),
) -> dict[str, list[float]]:
    """Seconds a call of each contender takes, once a round: what disturbs one disturbs all.

    Rounds go on for about ``seconds``, within the limits of ``rounds``. A measurement is the mean
    of a block of calls of some milliseconds; on a GPU the block is timed by the device itself,
    after a write that leaves nothing of the inputs in its cache.
    """
    measure = _on_device if device.type == "cuda" else _on_host
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):  # compile, allocate, warm up
            call()
        repeats[name] = max(1, round(_BLOCK / max(measure(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            times[name].append(measure(call, repeats[name]))
    return times


def _on_host(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _on_device(call: Call, repeats: int) -> float:
    torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def graphed(call: Call) -> Call:
    """The call as a replay of a CUDA graph: what it costs where nothing waits for Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def quantiles(times: list[float]) -> dict[str, float]:
    """Seconds: the median, and what a fifth of the rounds stayed below and above."""
    if len(times) < 2:
        return {"median": times[0], "q20": times[0], "q80": times[0]}
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": statistics.median(times), "q20": fifths[0], "q80": fifths[3]}


def ratio(of: list[float], to: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(x / y for x, y in zip(of, to, strict=True))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code, and the code's revision."""
    import triton

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = models[0] if models else processor
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "revision": revision(),
    }


def revision() -> str:
    """The commit, marked where the tree differs from it; "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
