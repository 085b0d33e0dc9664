"""Factors against peers over time: the versions of bench/results in git, drawn for the docs.

``python -m bench.history`` prints how many points each file has and draws those with two or more.
A point is a commit that changed a file's cases. A file that is not committed yet is the last point.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import size_text

ROOT = Path(__file__).parents[1]
FIGURE = Path("docs/figures/history.svg")

# By file, the peers whose factors are drawn, as the file names them.
PEERS = {
    "adapter": ("modules", "modules, torch.compile"),
    "attention": ("SDPA",),
    "attention-bf16": ("SDPA",),
    "divergence": ("eager", "torch.compile"),
    "linear-loss": ("log-softmax", "torch.compile"),
    "loss": ("released", "torch.compile"),
    "step": ("released", "released, torch.compile"),
    "step-bert": ("own forward",),
    "step-bf16": ("released", "released, torch.compile", "own forward"),
    "step-other-models": ("own forward", "own forward, torch.compile"),
}
STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class Point:
    """A measurement: the date of its commit, the revision it ran, and how long peers took."""

    date: str
    revision: str
    factors: dict[tuple[str, str], float]
    """By case and peer, the median of each round's time over ours."""


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _versions(root: Path, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file's dates and contents, oldest first."""
    log = _git(root, "log", "--reverse", "--diff-filter=AM", "--format=%h %cs", "--", file)
    for line in log.splitlines():
        commit, date = line.split()
        yield date, json.loads(_git(root, "show", f"{commit}:{file}"))
    yield "not committed", json.loads((root / file).read_text())


def _point(date: str, run: dict[str, Any], peers: tuple[str, ...]) -> Point:
    factors = {
        (size_text(case["sizes"]), peer): case["results"][peer]["times_ours"]
        for case in run["cases"]
        for peer in peers
        if "times_ours" in case["results"].get(peer, {})
    }
    return Point(date, run["machine"]["revision"], factors)


def history(root: Path, file: str) -> list[Point]:
    """The points of a JSON file, oldest first. A version without another figure is none."""
    points: list[Point] = []
    for date, run in _versions(root, file):
        point = _point(date, run, PEERS[Path(file).stem])
        if not points or point.factors != points[-1].factors:
            points.append(point)
    return points


def histories(root: Path) -> dict[str, list[Point]]:
    """By machine and benchmark, such as "cpu-amd-epyc/step".

    Raises:
        RuntimeError: ``root`` is no clone, or a shallow one, whose history ends early.
    """
    if _git(root, "rev-parse", "--is-shallow-repository").strip() == "true":
        raise RuntimeError("the clone is shallow: git fetch --unshallow")
    results = root / "bench" / "results"
    return {
        f"{path.parent.name}/{path.stem}": history(root, path.relative_to(root).as_posix())
        for path in sorted(results.glob("*/*.json"))
        if path.stem in PEERS
    }


def draw(found: dict[str, list[Point]], to: Path) -> None:
    """A panel for each file: a colour for each case, a style for each peer."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "history"}):  # the same file each time
        figure = Figure(figsize=(7, 3.4 * len(found)), layout="constrained")
        panels = figure.subplots(len(found), squeeze=False).flat
        for (name, points), panel in zip(found.items(), panels, strict=True):
            labels = [f"{point.date}\n{point.revision}" for point in points]
            cases = list(dict.fromkeys(case for case, _ in points[-1].factors))
            peers = list(dict.fromkeys(peer for _, peer in points[-1].factors))
            for case, peer in points[-1].factors:
                values = [point.factors.get((case, peer), float("nan")) for point in points]
                colour, style = f"C{cases.index(case)}", STYLES[peers.index(peer)]
                panel.plot(labels, values, style, color=colour, marker="o", label=f"{case}: {peer}")
            panel.axhline(1, color="gray", linewidth=0.8)
            panel.set(title=name, ylabel="time, x gist's")
            panel.set_ylim(bottom=0)
            panel.margins(x=0.1)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small")
        to.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(to, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.history", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository's root")
    root = parser.parse_args(arguments).root
    try:
        found = histories(root)
    except RuntimeError as error:
        sys.exit(str(error))
    for name, points in found.items():
        dates = " to ".join(dict.fromkeys((points[0].date, points[-1].date)))
        print(f"{name}: {len(points)} point{'s' * (len(points) > 1)}, {dates}")
    drawn = {name: points for name, points in found.items() if len(points) > 1}
    if drawn:
        draw(drawn, root / FIGURE)
        print(f"drawn: {FIGURE}")


if __name__ == "__main__":
    main()
