"""Timing of an operation and its peers: in turns, in one process, relative to a floor."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gist_kernels.kernels.cpu import memory

Call = Callable[[], object]

# The least seconds of one measurement, so that reading the clock doesn't count.
_BLOCK = 4e-3
# More than any GPU's last-level cache.
_FLUSHED_BYTES = 256 << 20
# The suffix of the name of a call that is timed as a CUDA graph.
GRAPH = ", graph"


def wall_clock() -> float:
    """Seconds since an arbitrary moment."""
    return time.perf_counter()


@dataclass
class Case:
    """Ours and its peers, which compute the same thing at one size."""

    sizes: dict[str, int]
    """The sizes by name; they are the axis of plots."""
    dtype: torch.dtype
    calls: dict[str, Call]
    """The calls by name. The first one is ours; ratios are relative to it."""
    parity: Callable[[], str | None]
    """Returns the error in our results, or None. With an error there are no ratios."""
    floors: dict[str, tuple[str, float]] = field(default_factory=dict)
    """For a call, another call that is its floor, and a factor.

    With ``{"ours": ("copy", 1.5)}``, the floor of "ours" is 1.5 times the time of "copy".
    """
    least_bytes: dict[str, int] = field(default_factory=dict)
    """For a call whose floor is memory traffic, the bytes that it must move."""
    varied: str | None = None
    """The size in which cases differ. Slopes are fitted along it."""
    unit: str | None = None
    """The call in whose times all are also given."""
    images: int | None = None
    """The images per call, to report images per second."""
    clock: Callable[[], float] = wall_clock
    """Tells seconds, on a CPU. ``time.process_time`` leaves out other processes, for one thread."""
    graphs: tuple[str, ...] = ()
    """The calls that are also timed as CUDA graphs, on a GPU."""
    own: tuple[str, ...] = ()
    """The calls that run our kernels without saying "ours": a change of ours changes them too."""

    def peers(self) -> list[str]:
        """The calls that a change of our kernels leaves alone."""
        others = list(self.calls)[1:]
        return [name for name in others if name not in self.own and "ours" not in name]


def run(case: Case, device: torch.device, *, seconds: float) -> dict[str, Any]:
    """The figures of a case, as written to a JSON file.

    A peer that fails, for lack of memory or of a compiler, is named with its error and takes no
    part. If ours fails, its error is the case's.
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
    results = _table(case, in_turns(calls, device, seconds=seconds, clock=case.clock), failure)
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
        "peers": case.peers(),
        **({"failed": failed} if failed else {}),
        "results": results,
    }


def _table(
    case: Case, times: dict[str, list[float]], failure: str | None, of: str = ""
) -> dict[str, Any]:
    """The figures of each call. ``times`` names the case's calls, with the suffix ``of``."""
    ours = next(iter(case.calls)) + of
    results = {}
    for name, seconds in times.items():
        call = name.removesuffix(of)
        results[name] = quantiles(seconds)
        if failure is None:
            results[name]["times_ours"] = ratio(seconds, times[ours])
            results[name]["times_ours_interval"] = interval(seconds, times[ours])
        floor, factor = case.floors.get(call, ("", 0.0))
        if floor + of in times:
            results[name]["of_floor"] = factor * ratio(times[floor + of], seconds)
        if case.unit is not None and case.unit + of in times and failure is None:
            results[name]["units"] = ratio(seconds, times[case.unit + of])
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
    clock: Callable[[], float] = wall_clock,
) -> dict[str, list[float]]:
    """Seconds per call, once per round for each of ``calls``: a disturbance affects all of them.

    Rounds are repeated for about ``seconds``, within the limits of ``rounds``. A measurement is the
    mean over a block of calls of some milliseconds. Untimed calls come first, since the previous
    one of ``calls`` leaves memory and caches in its own state. On a GPU the device itself times the
    block, after a write that evicts the inputs from its cache.
    """
    measure = _on_device if device.type == "cuda" else partial(_on_host, clock=clock)
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


def _on_host(call: Call, repeats: int, clock: Callable[[], float] = wall_clock) -> float:
    for _ in range(1 + repeats // 4):
        call()
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


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
    """The call as a replay of a CUDA graph: its cost if nothing waits for Python."""
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
    """The memory that a call takes beyond what was in use; None if the system doesn't tell.

    On a CPU it is resident memory. Memory that the process has freed but kept is returned to the
    system first: a call that reused it would seem to take none.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # resets the high-water mark of resident memory
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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # GNU C library only
    if trim is not None:
        trim(0)


def quantiles(times: list[float]) -> dict[str, float]:
    """The median and the 20 % and 80 % quantiles, in seconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": statistics.median(times), "q20": fifths[0], "q80": fifths[3]}


def ratio(of: list[float], to: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(x / y for x, y in zip(of, to, strict=True))


def interval(of: list[float], to: list[float], level: float = 0.95) -> list[float]:
    """The confidence interval of the median of the rounds' ratios, [low, high].

    Its ends are the ratios number k from below and from above, with the largest k at which the
    interval covers the median with probability ``level``: rounds fall on either side of it like
    coins (David and Nagaraja, Order Statistics, 3rd edition, section 7.1). With fewer than six
    rounds it is all of them, and covers less.
    """
    ratios = sorted(x / y for x, y in zip(of, to, strict=True))
    n, k, missed = len(ratios), 0, 0.0
    while k < (n - 1) // 2:
        missed += 2 * math.comb(n, k) / 2**n
        if missed > 1 - level:
            break
        k += 1
    k = max(k, 1)
    return [ratios[k - 1], ratios[n - k]]


def mismatch(named: Mapping[str, tuple[torch.Tensor, ...]], relative: float) -> str | None:
    """Describe the first pair (ours, exact) whose error is too large; None if all are fine.

    The error may be ``relative`` times the largest exact number, or two roundings to our dtype if
    these are more. With a third tensor, PyTorch's own in our dtype, twice PyTorch's error is added.
    """
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
