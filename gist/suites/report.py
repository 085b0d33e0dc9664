"""A table from many records: tasks by variants, their means, and GIST's gain."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gist.files import write_atomically, write_json
from gist.methods import method_type
from gist.model.config import GistConfig
from gist.runs.text import KIND
from gist.suites.interval import Interval
from gist.suites.run import RECORD_FILE, Record, read_record
from gist.suites.tasks import SUITES
from gist_kernels.check import unknown_name

GIST = " + GIST"  # ends a variant's title


@dataclass(frozen=True)
class Row:
    """A task's accuracies or a mean of them, in [0, 1].

    Attributes:
        title: the task's name, or which mean.
        cells: seeds' mean and standard deviation by variant; None where something is missing. A
            mean's deviation is that of the seeds' means, nan where seeds differ between tasks.
        gains: the gain of each pair, such as GIST minus plain, paired by task and seed.
    """

    title: str
    group: str
    cells: dict[str, tuple[float, float] | None]
    gains: dict[str, Interval | None]


class Report:
    """The records of several variants, side by side.

    Args:
        records: as :func:`gist.suites.run.run_suite` returns them.
        tuned_apart: a method with GIST and without may differ in a task's learning rate, as when
            each was tuned by itself. The report lists the rates.
        baseline: a column's title. Gains are then those of every other column over this one; by
            default, of each method with GIST over the same without.

    Raises:
        ValueError: records that may not stand in one table; it names the difference.
    """

    def __init__(
        self, records: Sequence[Record], *, tuned_apart: bool = False, baseline: str | None = None
    ) -> None:
        if not records:
            raise ValueError("there is no record to report on")
        self.records = list(records)
        self.tuned_apart, self.baseline = tuned_apart, baseline
        self.cells: dict[str, dict[str, dict[int, Record]]] = {}
        for record in records:
            config = record["config"]
            seeds = self.cells.setdefault(variant(config), {}).setdefault(config["task"], {})
            if config["seed"] in seeds:
                raise ValueError(
                    f"two results of {variant(config)}, {config['task']}, seed {config['seed']}"
                )
            seeds[config["seed"]] = record
        self.cells = dict(sorted(self.cells.items(), key=lambda c: (c[0].removesuffix(GIST), c[0])))
        groups = {r["config"]["task"]: r["config"]["group"] for r in records}
        suite = SUITES.get(records[0]["config"]["suite"])
        order = [task.name for task in suite.tasks] if suite else sorted(groups)
        self.groups = {task: groups[task] for task in order if task in groups}
        self.missing = [task for task in order if task not in groups]
        # The two columns of each gain, by its title: the gain is the second minus the first.
        if baseline is None:
            self.pairs = {
                f"{v}: GIST - plain": (v, v + GIST) for v in self.cells if v + GIST in self.cells
            }
        elif baseline in self.cells:
            self.pairs = {f"{v} - {baseline}": (baseline, v) for v in self.cells if v != baseline}
        else:
            raise ValueError(unknown_name("baseline", baseline, self.cells))
        _check_comparable(self.cells, self.pairs.values(), {"lr"} if tuned_apart else set())

    def rows(self) -> list[Row]:
        """Tasks in the suite's order, then the mean of several, and of several groups' means."""
        by_group: dict[str, list[str]] = {}
        for task, group in self.groups.items():
            by_group.setdefault(group, []).append(task)
        over_tasks = {task: 1 / len(self.groups) for task in self.groups}
        over_groups = {
            task: 1 / len(by_group) / len(by_group[group]) for task, group in self.groups.items()
        }
        tasks = [self._row(task, group, {task: 1.0}) for task, group in self.groups.items()]
        if len(tasks) > 1:
            tasks.append(self._row(f"mean of {len(self.groups)} tasks", "", over_tasks))
        if len(by_group) > 1:
            tasks.append(self._row(f"mean of {len(by_group)} groups' means", "", over_groups))
        return tasks

    def _row(self, title: str, group: str, weights: Mapping[str, float]) -> Row:
        """The weighted mean of tasks, for each variant and pair."""

        def cell(name: str) -> tuple[float, float] | None:
            tasks = self.cells[name]
            if not weights.keys() <= tasks.keys():
                return None
            centre = sum(w * mean(map(_accuracy, tasks[t].values())) for t, w in weights.items())
            seeds = {frozenset(tasks[task]) for task in weights}
            if len(seeds) > 1 or len(tasks[next(iter(weights))]) < 2:
                return centre, math.nan
            (same,) = seeds
            return centre, stdev(
                sum(w * _accuracy(tasks[t][seed]) for t, w in weights.items()) for seed in same
            )

        def gain(first: str, second: str) -> Interval | None:
            pair = self.cells[first], self.cells[second]
            if any(task not in tasks for task in weights for tasks in pair):
                return None
            seeds = set.intersection(*(set(tasks[task]) for task in weights for tasks in pair))
            if not seeds:
                return None
            return Interval.of(
                [
                    sum(
                        w * (_accuracy(pair[1][task][seed]) - _accuracy(pair[0][task][seed]))
                        for task, w in weights.items()
                    )
                    for seed in sorted(seeds)
                ]
            )

        return Row(
            title,
            group,
            {name: cell(name) for name in self.cells},
            {title: gain(*pair) for title, pair in self.pairs.items()},
        )

    def markdown(self) -> str:
        """The table with costs and notes on how to read it.

        With more variants than tasks, the variants are the rows.
        """
        names = list(self.cells)
        blank = [""] * len(self.pairs)
        lines = [["task", "group", *names, *self.pairs]]
        for row in self.rows():
            cells = [_cell(row.cells[name]) for name in names]
            gains = [_gain(gain) for gain in row.gains.values()]
            lines.append([row.title, row.group, *cells, *gains])
        for part in ("method", "token", "head"):
            counts = [mean(r["parameters"][part] for r in self._of(name)) for name in names]
            title = f"parameters: {part}"
            if part == "head" and len(self.groups) > 1:
                title += ", mean of the tasks"
            lines.append([title, "", *(f"{c:,.0f}" for c in counts), *blank])
        times = [_duration(sum(r["seconds"] for r in self._of(name))) for name in names]
        lines.append(["time, all seeds", "", *times, *blank])
        titles = 2
        if len(lines[0]) > len(lines):
            lines = [list(line) for line in zip(*lines, strict=True)]
            del lines[1]  # groups
            lines[0][0] = "method"
            titles = 1
        head, *body = (f"| {' | '.join(line)} |" for line in lines)
        below = "|" + "---|" * titles + "---:|" * (len(lines[0]) - titles)
        notes = (f"- {note}" for note in self._notes())
        return "\n".join([head, below, *body, "", *notes]) + "\n"

    def _of(self, name: str) -> list[Record]:
        return [record for seeds in self.cells[name].values() for record in seeds.values()]

    def _notes(self) -> Iterable[str]:
        yield (
            "Test accuracy in percent: mean over the seeds, in brackets their standard deviation. "
            "Gains in points, paired by task and seed, with the 95 % interval of Student's t over "
            "the seeds (their number in brackets); it does not cover the choice of tasks or images."
        )
        for name in self.cells:
            config = self._of(name)[0]["config"]
            seeds = sorted({r["config"]["seed"] for r in self._of(name)})
            own = "its own" if config.get("kind") == KIND else "timm's"
            weights = own if config["pretrained"] else config.get("weights") or "RANDOM"
            recipe = {
                ("clean", "best"): "clean: epoch chosen on val, then trained on all, tested once",
                ("clean", "end"): "clean: the whole schedule on all images, tested once",
            }.get(
                (config["recipe"], config["stop"]),
                "released: the EPOCH WAS CHOSEN ON THE TEST IMAGES, which flatters it",
            )
            tried = max(len(r["config"]["task_settings"]["lr"]) for r in self._of(name))
            yield (
                f"{name}: {config['model']}, weights {weights}, "
                f"{config['train']['epochs']} epochs, seeds {', '.join(map(str, seeds))}. "
                f"Recipe {recipe}"
                + (f"; {tried} learning rates tried on val." if tried > 1 else ".")
            )
            if self.tuned_apart:
                rates = {
                    task: " or ".join(
                        f"{lr:g}" for lr in sorted({_rate(r) for r in seeds.values()})
                    )
                    for task, seeds in self.cells[name].items()
                }
                listed = ", ".join(
                    f"{rates[task]} ({task})" for task in self.groups if task in rates
                )
                yield f"{name}: learning rates {listed}."
            for task in self.groups:
                if task not in self.cells[name]:
                    yield f"{name} has no result of {task}: no mean."
        if self.missing:
            yield f"Not among these results: {', '.join(self.missing)}."

    def csv(self) -> str:
        """The rows of :meth:`rows` as fractions of 1, not rounded."""
        text = io.StringIO()
        head = ["task", "group"]
        for name in self.cells:
            head += [name, f"{name}: sd"]
        for title in self.pairs:
            head += [f"{title}: {part}" for part in ("mean", "low", "high", "seeds")]
        table = csv.writer(text, lineterminator="\n")
        table.writerow(head)
        for row in self.rows():
            line: list[Any] = [row.title, row.group]
            for cell in row.cells.values():
                line += cell or ("", "")
            for gain in row.gains.values():
                line += (gain.mean, gain.low, gain.high, gain.n) if gain else [""] * 4
            table.writerow(line)
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """Write report.md, report.csv, report.png and records.json.

        Raises:
            ImportError: matplotlib is missing; the other files are written.
        """
        write_atomically(folder / "report.md", self.markdown().encode())
        write_atomically(folder / "report.csv", self.csv().encode())
        write_json(folder / "records.json", self.records)
        self.plot(folder / "report.png")

    def plot(self, path: Path) -> None:
        """Draw accuracies by task, and the gains with their intervals, into a PNG.

        Raises:
            ImportError: matplotlib is missing; the text names the extra that brings it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'gist-kernels[train]'") from error
        rows = self.rows()
        places = range(len(rows), 0, -1)
        colors = {name: f"C{number}" for number, name in enumerate(self.cells)}
        height = (
            1.2 + max(0.32, 0.2 * len(self.pairs)) * len(rows) + 0.25 * math.ceil(len(colors) / 2)
        )
        figure = Figure(figsize=(10, height), layout="constrained")
        accuracy, gains = figure.subplots(1, 2, sharey=True)
        for name in self.cells:
            cells = [row.cells[name] or (math.nan,) for row in rows]
            centres = [100 * cell[0] for cell in cells]
            accuracy.plot(centres, list(places), "o", color=colors[name], label=name)
        for number, (title, (_, second)) in enumerate(self.pairs.items()):
            shift = 0.6 * ((1 + 2 * number) / (2 * len(self.pairs)) - 0.5)
            for row, y in zip(rows, places, strict=True):
                gain = row.gains[title]
                if gain is not None:
                    half = 100 * (gain.high - gain.mean)
                    gains.errorbar(
                        100 * gain.mean, y - shift, xerr=None if math.isnan(half) else half,
                        fmt="o", color=colors[second], capsize=3,
                    )  # fmt: skip
        accuracy.set_yticks(list(places), [row.title for row in rows])
        accuracy.set(xlabel="test accuracy (%)", ylim=(0.5, len(rows) + 0.5))
        over = "GIST - plain" if self.baseline is None else f"over {self.baseline}"
        gains.set(xlabel=f"{over}\npaired, points, 95 % interval over seeds")
        gains.axvline(0, color="black", linewidth=0.8)
        for axes in (accuracy, gains):
            axes.grid(alpha=0.3)
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def report(
    runs: Iterable[Path], *, tuned_apart: bool = False, baseline: str | None = None
) -> Report:
    """A :class:`Report` on every record below the folders ``runs``.

    Raises:
        FileNotFoundError: a folder without records.
        ValueError: records that may not stand in one table.
    """
    files: dict[Path, None] = {}
    for folder in runs:
        here = sorted(folder.rglob(RECORD_FILE))
        if not here:
            raise FileNotFoundError(f"{folder} has no finished result of gist vtab run")
        files |= dict.fromkeys(file.resolve() for file in here)
    records = [read_record(file.parent) for file in files]
    found = [record for record in records if record is not None]
    return Report(found, tuned_apart=tuned_apart, baseline=baseline)


def variant(config: Mapping[str, Any]) -> str:
    """A column's title: methods, GIST, and their settings that differ from the default."""
    described, with_gist = config["gist"], config["gist"]["gist"]
    methods = described["method"] or []
    methods = [methods] if isinstance(methods, Mapping) else methods
    titles = []
    for method in methods:
        default = method_type(method["name"])().settings()
        titles.append(method["name"] + _changed(method, {**default, "name": method["name"]}))
    title = " + ".join(titles) or "linear probe"
    if "augment" in config:  # left out at its default
        title = f"augment {config['augment']}: {title}"
    if not with_gist:
        return title
    # None stands for the default of the kind of model: of images, here.
    own = {k: v for k, v in described.items() if k not in ("method", "gist") and v is not None}
    init = "words" if config.get("kind") == KIND else "uniform"
    default = asdict(GistConfig(token_init=init))
    return title + GIST + _changed({**own, **config.get("loss", {})}, default)


def _changed(settings: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """The settings that differ from the default, in brackets."""
    changed = [
        f"{key}={value}"
        for key, value in settings.items()
        if key not in default or json.dumps(value) != json.dumps(default[key])
    ]
    return f" ({', '.join(changed)})" if changed else ""


# Keys that may differ within a column, and between a method with GIST and without.
OF_A_CELL = {"task", "group", "seed", "task_settings"}
OF_A_VARIANT = {*OF_A_CELL, "gist", "loss", "augment"}


def _check_comparable(
    cells: Mapping[str, Mapping[str, Mapping[int, Record]]],
    pairs: Iterable[tuple[str, str]],
    of_a_side: set[str],
) -> None:
    """Raise ValueError unless each column, each pair and all columns' images are comparable."""
    first: dict[str, Mapping[str, Any]] = {}
    by_task: dict[tuple[str, str], Mapping[str, Any]] = {}
    images: dict[str, tuple[str, str]] = {}
    for name, tasks in cells.items():
        for task, seeds in tasks.items():
            for seed, record in seeds.items():
                config, here = record["config"], f"{name}, {task}, seed {seed}"
                settings = config["task_settings"]
                _same(f"column {name!r}", first.setdefault(name, config), config, here, OF_A_CELL)
                known = by_task.setdefault((name, task), settings)
                _same(f"task {task!r} of {name!r}", known, settings, here, set())
                mark, where = images.setdefault(task, (settings["data_fingerprint"], here))
                if mark != settings["data_fingerprint"]:
                    raise ValueError(f"{here} had other images than {where}: no common table")
    for one, other in pairs:
        _same(f"a pair with {one!r}", first[one], first[other], other, OF_A_VARIANT)
        for task in cells[one].keys() & cells[other].keys():
            known, settings = by_task[one, task], by_task[other, task]
            _same(f"task {task!r} of {one!r}", known, settings, f"{other}, {task}", of_a_side)


def _same(
    what: str, known: Mapping[str, Any], given: Mapping[str, Any], where: str, but: set[str]
) -> None:
    for key in sorted((known.keys() | given.keys()) - but):
        if known.get(key) != given.get(key):
            raise ValueError(
                f"{what} can't hold results that differ in {key}: {known.get(key)!r}, and "
                f"{given.get(key)!r} in {where}"
            )


def _rate(record: Record) -> float:
    return record["selection"]["lr"]


def _accuracy(record: Record) -> float:
    return record["test"]["accuracy"]


def _cell(cell: tuple[float, float] | None) -> str:
    if cell is None:
        return "-"
    centre, spread = cell
    return f"{100 * centre:.2f}" + ("" if math.isnan(spread) else f" ({100 * spread:.2f})")


def _gain(gain: Interval | None) -> str:
    if gain is None:
        return "-"
    ends = "" if math.isnan(gain.low) else f" [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
    return f"{100 * gain.mean:+.2f}{ends} ({gain.n})"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"
