"""Timing contenders against each other: in turns, in one process, held against a floor."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gist_kernels.kernels.cpu import memory

Call = Callable[[], object]

# Seconds that one measurement should take at least, so that reading the clock doesn't count.
_BLOCK = 4e-3
# More than any GPU's last-level cache.
_FLUSHED_BYTES = 256 << 20
# Behind the name of a call that is timed as a CUDA graph.
GRAPH = ", graph"


@dataclass
class Case:
    """Contenders that compute the same thing at one size."""

    sizes: dict[str, int]
    """By name: the axis of plots."""
    dtype: torch.dtype
    calls: dict[str, Call]
    """The first one is ours: ratios are to it."""
    parity: Callable[[], str | None]
    """What is wrong with our results here, None if nothing. Then there is no ratio."""
    floors: dict[str, tuple[str, float]] = field(default_factory=dict)
    """For a contender, the call that does the least it could do, and how often it would have to:
    ``{"ours": ("copy", 1.5)}`` is held against 1.5 times the time of the call "copy"."""
    least_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes that a contender can't avoid to move, where that is its floor."""
    varied: str | None = None
    """Which of the sizes is the one that cases differ in: slopes are fitted along it."""
    images: int | None = None
    """How many every call goes through, where images a second are asked for."""
    graphs: tuple[str, ...] = ()
    """The calls that are timed as CUDA graphs too, on a GPU."""


def run(case: Case, device: torch.device, *, seconds: float) -> dict[str, Any]:
    """A case's figures, as they go into a JSON file.

    A contender that fails, for want of memory or of a compiler, is named with its error and takes
    no part. Where ours fails, that is the case's error.
    """
    failure, failed = case.parity(), {}
    ours = next(iter(case.calls))

    def working(calls: Mapping[str, Call], prepare: Callable[[Call], Call], of: str) -> Any:
        found = {}
        for name, call in calls.items():
            try:
                found[name + of] = prepare(call)
                found[name + of]()
            except Exception as error:
                if name == ours:
                    raise
                found.pop(name + of, None)
                failed[name + of] = f"{type(error).__name__}: {error}".splitlines()[0]
        return found

    calls = working(case.calls, lambda call: call, "")
    results = _table(case, in_turns(calls, device, seconds=seconds), failure)
    for name, call in calls.items():
        results[name]["peak_bytes"] = peak_bytes(call, device)
    if case.graphs and device.type == "cuda":
        # With their floors, in the same form.
        floors = [case.floors[name][0] for name in case.graphs if name in case.floors]
        chosen = {name: calls[name] for name in (*case.graphs, *floors) if name in calls}
        graphs = working(chosen, graphed, GRAPH)
        results |= _table(case, in_turns(graphs, device, seconds=seconds), failure, GRAPH)
    return {
        "sizes": case.sizes,
        **({"varied": case.varied} if case.varied else {}),
        "dtype": str(case.dtype).removeprefix("torch."),
        "parity": failure or "ok",
        **({"failed": failed} if failed else {}),
        "results": results,
    }


def _table(
    case: Case, times: dict[str, list[float]], failure: str | None, of: str = ""
) -> dict[str, Any]:
    """Each contender's figures; the names in ``times`` are those of the case's calls with ``of``
    behind them."""
    ours = next(iter(case.calls)) + of
    results = {}
    for name, seconds in times.items():
        call = name.removesuffix(of)
        results[name] = quantiles(seconds)
        if failure is None:
            results[name]["times_ours"] = ratio(seconds, times[ours])
        floor, factor = case.floors.get(call, ("", 0.0))
        if floor + of in times:
            results[name]["of_floor"] = factor * ratio(times[floor + of], seconds)
        if call in case.least_bytes:
            results[name]["least_bytes"] = case.least_bytes[call]
        if case.images is not None:
            results[name]["images_per_second"] = case.images / results[name]["median"]
    return results


def in_turns(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float = 10.0,
    rounds: tuple[int, int] = (5, 300),
) -> dict[str, list[float]]:
    """Seconds a call of each contender takes, once a round: what disturbs one disturbs all.

    Rounds go on for about ``seconds``, within the limits of ``rounds``. A measurement is the mean
    of a block of calls of some milliseconds, after some that are not timed: they find memory and
    caches as the contender before left them. On a GPU the device itself times the block, after a
    write that leaves nothing of the inputs in its cache.
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
    for _ in range(1 + repeats // 4):
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _on_device(call: Call, repeats: int) -> float:
    call()
    torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda").zero_()
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


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """What a call takes beyond what was there before; None where the system doesn't tell.

    On a CPU that is resident memory. What the process had freed and kept for itself is given back
    first: a call that used it again would seem to take none.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the high-water mark of resident memory starts anew
    except OSError:
        return None

    def kibibytes(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1])

    _give_back_freed_memory()
    reset.write_text("5")
    before = kibibytes("VmRSS")
    call()
    return max(0, kibibytes("VmHWM") - before) * 1024


def _give_back_freed_memory() -> None:
    memory.release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
    if trim is not None:
        trim(0)


def quantiles(times: list[float]) -> dict[str, float]:
    """Seconds: the median, and what a fifth of the rounds stayed below and above."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": statistics.median(times), "q20": fifths[0], "q80": fifths[3]}


def ratio(of: list[float], to: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(x / y for x, y in zip(of, to, strict=True))


def mismatch(named: Mapping[str, tuple[torch.Tensor, ...]], relative: float) -> str | None:
    """The first of these (ours, exact) that differs by more than ``relative`` times the largest
    exact number, or than two roundings to our dtype, in words. Of (ours, exact, PyTorch's own in
    our dtype), ours may also have twice PyTorch's error."""
    for name, (ours, exact, *theirs) in named.items():
        eps = torch.finfo(ours.dtype).eps
        tolerance = max(relative, 2 * eps) * exact.abs().max().item()
        tolerance += sum(2 * _error(other, exact) for other in theirs)
        error = _error(ours, exact)
        if not error <= tolerance < math.inf:  # also where one is nan
            return f"{name} is off by {error:.3g}, where {tolerance:.3g} is allowed"
    return None


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return (found.double() - exact.double()).abs().max().item()
