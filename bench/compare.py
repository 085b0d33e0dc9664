"""A run against an older one of the same machine: has a call of ours become slower?

Times of two runs can't be compared, as the machine is never the same twice. Ratios can: each run
times ours and its peers in turns. Ours has become slower where its ratios to all peers have grown,
each by more than the confidence intervals of both runs (``measure.interval``). A peer that has
become faster changes its own ratio alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench.report import Case, Run, size_text


@dataclass(frozen=True)
class Change:
    """Of one case: how much longer ours takes than before, as a factor."""

    name: str
    peer: str
    """The peer against which the change is least certain."""
    factor: float
    low: float
    high: float

    def verdict(self, tolerance: float) -> str:
        if self.low > 1 + tolerance:
            return "slower"
        return "faster" if self.high < 1 / (1 + tolerance) else "alike"

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.factor:.2f}x the time of before "
            f"({self.low:.2f} to {self.high:.2f}), against {self.peer}"
        )


def load(path: Path, new: Run) -> Run:
    """The older run of the same benchmark.

    Raises ValueError where it is of another benchmark or machine, or lacks intervals.
    """
    try:
        old: Run = json.loads(path.read_text())
        cases, machine, benchmark = old["cases"], old["machine"], old["benchmark"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of gist bench ({error!r})") from None
    if benchmark != new["benchmark"]:
        raise ValueError(f"{path} is of the benchmark {benchmark}, not of {new['benchmark']}")
    for key in ("device", "threads"):
        if machine[key] != new["machine"][key]:
            raise ValueError(
                f"{path} was measured with {key} {machine[key]}, not {new['machine'][key]}: "
                "ratios to peers differ between machines. Run the older code here"
            )
    if not all("peers" in case for case in cases):
        raise ValueError(f"{path} was saved before ratios had intervals: run the older code again")
    return old


def changes(old: Run, new: Run) -> tuple[list[Change], list[str]]:
    """The change of every case that both runs have, and the names of those without one."""

    def key(case: Case) -> tuple[str, str, str]:
        return size_text(case["sizes"]), case["dtype"], next(iter(case["results"]))

    before = {key(case): case for case in old["cases"]}
    found, without = [], []
    for case in new["cases"]:
        name = f"{new['benchmark']}, {size_text(case['sizes'])}, {case['dtype']}"
        change = _change(name, before[key(case)], case) if key(case) in before else None
        if change is None:
            without.append(name)
        else:
            found.append(change)
    return found, without


def _change(name: str, old: Case, new: Case) -> Change | None:
    if old["parity"] != "ok" or new["parity"] != "ok":
        return None
    found = []
    for peer in new["peers"]:
        before, after = (case["results"].get(peer) for case in (old, new))
        if before is None or after is None:
            continue
        # A peer's time in units of ours: the larger, the faster is ours.
        low, high = after["times_ours_interval"]
        old_low, old_high = before["times_ours_interval"]
        factor = before["times_ours"] / after["times_ours"]
        found.append(Change(name, peer, factor, old_low / high, old_high / low))
    if not found:
        return None
    # All ratios must have grown, or all have shrunk: the change nearest to none decides.
    return min(found, key=lambda change: max(change.low, 1 / change.high))
