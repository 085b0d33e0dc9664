"""Results of benchmarks: as a table, as JSON, as plots, and merged into Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

Case = dict[str, Any]
"""What ``measure.run`` returns."""
Run = dict[str, Any]
"""{"benchmark", "machine", "limits", "absent": {peer: reason}, "cases": [measure.run(...)]}"""


def size_text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


# "New" is memory that one call takes beyond what the process holds before it.
def print_head(run: Run, to: TextIO | None = None) -> None:
    print(f"\n# {run['benchmark']}", file=to)
    print(", ".join(f"{key} {value}" for key, value in run["machine"].items()), file=to)
    print(", ".join(f"{key} {value:.3g}" for key, value in run["limits"].items()), file=to)
    for name, reason in run["absent"].items():
        print(f"{name} takes no part: {reason}", file=to)
    columns = ("median ms", "20 %", "80 %", "x ours", "of floor", "new MB", "images/s", "units")
    print(f"{'':<26}{'':<28}" + "".join(f"{column:>11}" for column in columns), file=to)


def print_case(case: dict[str, Any], to: TextIO | None = None) -> None:
    if case["parity"] != "ok":
        print(f"{size_text(case['sizes'])}: {case['parity']}; hence no ratios", file=to)
    for name, error in case.get("failed", {}).items():
        print(f"{size_text(case['sizes'])}: {name} failed: {error}", file=to)
    for name, result in case["results"].items():
        cells = [f"{1e3 * result[key]:.4g}" for key in ("median", "q20", "q80")]
        cells.append(f"{result['times_ours']:.2f}" if "times_ours" in result else "")
        cells.append(f"{result['of_floor']:.0%}" if "of_floor" in result else "")
        peak = result.get("peak_bytes")
        cells.append("" if peak is None else f"{peak / 1e6:.1f}")
        cells.append(_images_per_second(result))
        cells.append(_units(result))
        line = "".join(f"{cell:>11}" for cell in cells)
        print(f"{size_text(case['sizes']):<26}{name:<28}{line}", file=to, flush=True)


def save(run: Run, folder: Path) -> Path:
    """Write the cases so far. An interrupted benchmark leaves a complete file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run['benchmark']}.json"
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(run, indent=2) + "\n")
    unfinished.replace(path)
    return path


def load(folders: list[Path]) -> list[Run]:
    runs = []
    for folder in folders:
        found = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
        if not found:
            raise FileNotFoundError(f"{folder} holds no results (*.json); run a benchmark first")
        runs += [json.loads(path.read_text()) for path in found]
    return runs


def plot(run: Run, folder: Path) -> list[Path]:
    """Time against size, each contender a line; and the share of the floor, where there is one."""
    from matplotlib.figure import Figure

    labels = [size_text(case["sizes"]) for case in run["cases"]]
    kinds = {
        "time": ("median", 1e3, "milliseconds, forward and backward", "log"),
        "floor": ("of_floor", 1, "share of the floor", "linear"),
    }
    written = []
    for kind, (key, factor, title, scale) in kinds.items():
        names = {n for case in run["cases"] for n, r in case["results"].items() if key in r}
        if not names:
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for name in sorted(names):
            values = [case["results"].get(name, {}).get(key, math.nan) for case in run["cases"]]
            axes.plot(labels, [factor * value for value in values], marker="o", label=name)
        axes.set_yscale(scale)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        axes.set_ylabel(title)
        axes.tick_params(axis="x", rotation=20)
        axes.set_title(f"{run['benchmark']}, {run['machine']['device']}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        written.append(folder / f"{run['benchmark']}-{kind}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _images_per_second(result: dict[str, float]) -> str:
    return f"{result['images_per_second']:.0f}" if "images_per_second" in result else ""


def _units(result: dict[str, float]) -> str:
    return f"{result['units']:.2f}" if "units" in result else ""


def markdown(runs: list[Run]) -> str:
    """The runs as one Markdown text: a table for each benchmark on each machine."""
    parts = []
    for run in runs:
        machine = run["machine"]
        about = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "device")
        parts.append(f"### {run['benchmark']}: {machine['device']}\n\n{about}.")
        for key, value in run["limits"].items():
            parts[-1] += f" {key.replace('_', ' ').capitalize()}: {value:.3g}."
        for name, reason in run["absent"].items():
            parts[-1] += f" {name} takes no part: {reason}."
        lines = [
            "| size | dtype | contender | ms (20 to 80 %) | times ours | of floor | new MB |"
            " images/s | units |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for case in run["cases"]:
            for name, result in case["results"].items():
                median, low, high = (1e3 * result[key] for key in ("median", "q20", "q80"))
                times = f"{result['times_ours']:.2f}" if "times_ours" in result else "no parity"
                floor = f"{result['of_floor']:.0%}" if "of_floor" in result else ""
                peak = result.get("peak_bytes")
                lines.append(
                    f"| {size_text(case['sizes'])} | {case['dtype']} | {name} "
                    f"| {median:.4g} ({low:.4g} to {high:.4g}) | {times} | {floor} "
                    f"| {'' if peak is None else f'{peak / 1e6:.1f}'} "
                    f"| {_images_per_second(result)} | {_units(result)} |"
                )
        parts.append("\n".join(lines))
        parts += [
            f"{size_text(case['sizes'])}: {name} failed: {error}"
            for case in run["cases"]
            for name, error in case.get("failed", {}).items()
        ]
        parts += [slope_text(slope) for slope in slopes(run)]
    return "\n\n".join(parts) + "\n"


def slopes(run: Run) -> list[dict[str, Any]]:
    """Of cases that vary one size: time = overhead + slope * size, fitted to relative errors."""
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for case in run["cases"]:
        axis = case.get("varied")
        if axis is None:
            continue
        fixed = ", ".join(f"{name} {n}" for name, n in case["sizes"].items() if name != axis)
        for name, result in case["results"].items():
            points = groups.setdefault((name, f"{axis} ({fixed})"), [])
            points.append((case["sizes"][axis], result["median"]))
    return [
        {"contender": name, "axis": axis, **_fit(points)} for (name, axis), points in groups.items()
    ]


def _fit(points: list[tuple[int, float]]) -> dict[str, float]:
    # Weighted by 1 / time^2, small sizes count as much as large ones.
    weights = [1 / t**2 for _, t in points]
    total = sum(weights)
    mean_n = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
    mean_t = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
    slope = sum(
        w * (n - mean_n) * (t - mean_t) for w, (n, t) in zip(weights, points, strict=True)
    ) / sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, points, strict=True))
    overhead = mean_t - slope * mean_n
    (n0, t0), (n1, t1) = points[-2:]
    return {
        "overhead_seconds": overhead,
        "seconds_per_unit": slope,
        "takes_over_at": overhead / slope,
        "exponent_at_the_end": math.log(t1 / t0) / math.log(n1 / n0),
    }


def slope_text(slope: dict[str, Any]) -> str:
    """In words; the fitted line only where the cost does not grow faster than that size."""
    text = f"{slope['contender']} against {slope['axis']}: "
    if slope["exponent_at_the_end"] < 1.25 and slope["overhead_seconds"] > 0:
        text += (
            f"{1e6 * slope['overhead_seconds']:.1f} us + {1e9 * slope['seconds_per_unit']:.3g} ns "
            f"each; the size takes over at {slope['takes_over_at']:.3g}; "
        )
    return text + f"at the end, time grows with its power {slope['exponent_at_the_end']:.2f}."
