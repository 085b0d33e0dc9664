"""Finished runs side by side, and their paired differences on the same images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gist.model.saving import CONFIG_FILE
from gist.report.html import Markup, flat, page, section, table, tag
from gist.report.measures import PairedDifference
from gist.report.page import percent
from gist.runs.predictions import PREDICTIONS_FILE, SPLIT_NAMES, Predictions
from gist.runs.run import finished_results
from gist.runs.text import is_text

NOT_THERE = "-"
RUNS_CAPTION = "Accuracies, trained parameters, and time of training and test"


@dataclass(frozen=True)
class Comparison:
    """Runs and the differences of all others to the first.

    Attributes:
        names: of the runs' folders; the shortest ends of their paths that differ.
        results: those of ``results.json``.
        predictions: of the same images.
        settings: for each setting that is not the same in all runs, its value in each.
        differences: of each run but the first to the first.
        notes: what a reader must know.
    """

    names: list[str]
    results: list[dict[str, Any]]
    predictions: list[Predictions]
    settings: dict[str, list[str]]
    differences: list[PairedDifference]
    notes: list[str]

    def markdown(self) -> str:
        """The tables and notes in Markdown."""
        parts = [_markdown(*self._runs()), _markdown(*self._pairs())]
        if self.settings:
            parts.insert(1, _markdown(*self._settings()))
        return "\n\n".join([*parts, *self.notes])

    def html(self) -> bytes:
        """The same as a page that loads nothing."""
        sections = [section("runs", "Runs", table(*self._runs(), RUNS_CAPTION, text_columns=3))]
        if self.settings:
            caption = "Each run's value; other settings are the same"
            differing = table(*self._settings(), caption, text_columns=1 + len(self.names))
            sections.append(section("settings", "Settings that differ", differing))
        pairs = table(*self._pairs(), f"Accuracy of each run minus that of {self.names[0]}")
        notes = [tag("p", note, class_="quiet") for note in self.notes]
        sections.append(section("differences", "Differences", pairs, *notes))
        title = f"Comparison of {len(self.names)} runs"
        return page(title, tag("h1", title), *map(Markup, sections))

    def _runs(self) -> tuple[list[str], list[list[str]]]:
        split = SPLIT_NAMES[self.predictions[0].split]
        headings = ["run", "method", "token", "trained", "validation", "test", "time"]
        rows = []
        for name, run in zip(self.names, self.results, strict=True):
            counted, val, test = run["parameters"], run["val_accuracy"], run.get("test")
            rows.append([
                name,
                _method(run["config"]["gist"]["method"]),
                "Gist" if counted["token"] else "none",
                f"{sum(counted[part] for part in ('method', 'token', 'head')):,}",
                NOT_THERE if val is None else percent(val, 2),
                NOT_THERE if test is None else percent(test["accuracy"], 2),
                f"{run['seconds']:.0f} s",
            ])  # fmt: skip
        if split == "validation":
            headings[4] = "validation (compared)"
        return headings, rows

    def _settings(self) -> tuple[list[str], list[list[str]]]:
        return ["setting", *self.names], [[key, *values] for key, values in self.settings.items()]

    def _pairs(self) -> tuple[list[str], list[list[str]]]:
        first = self.names[0]
        headings = ["difference", "points", "95 % interval", "correct here only",
                    "correct in the first only", "p (McNemar, exact)"]  # fmt: skip
        rows = [
            [
                f"{name} - {first}",
                f"{100 * found.difference:+.2f}",
                f"{100 * found.low:+.2f} to {100 * found.high:+.2f}",
                f"{found.only_second:,}",
                f"{found.only_first:,}",
                f"{found.p_value:.2g}",
            ]
            for name, found in zip(self.names[1:], self.differences, strict=True)
        ]
        return headings, rows


def compare(directories: Sequence[Path]) -> Comparison:
    """Compare finished runs by what they predict for the same images.

    Args:
        directories: two or more; all others are compared with the first.

    Raises:
        FileNotFoundError: a folder without a finished run, or without predictions.csv.
        ValueError: fewer than two runs, one twice, or runs that predicted different images, or
            items without names from data that differ; the text says how these differ.
    """
    if len(directories) < 2 or len({path.resolve() for path in directories}) < len(directories):
        raise ValueError("compare takes two or more different runs")
    results = [finished_results(directory) for directory in directories]
    predictions = [
        _predictions(directory, of_texts=is_text(run["config"]))
        for directory, run in zip(directories, results, strict=True)
    ]
    names = _short_names(directories)
    for name, other in zip(names[1:], predictions[1:], strict=True):
        _check_same_images(names[0], predictions[0], name, other)
    _check_named(names, results, predictions[0])
    flattened = [flat(run["config"]) for run in results]
    keys = list(dict.fromkeys(key for settings in flattened for key in settings))
    values = {key: [settings.get(key, NOT_THERE) for settings in flattened] for key in keys}
    first = predictions[0]
    return Comparison(
        names,
        results,
        predictions,
        {key: found for key, found in values.items() if len(set(found)) > 1},
        [PairedDifference.of(first.correct, other.correct) for other in predictions[1:]],
        [*_notes(first, results), *_unfinished(names, results)],
    )


def _notes(first: Predictions, results: Sequence[dict[str, Any]]) -> list[str]:
    items = "texts" if is_text(results[0]["config"]) else "images"
    notes = [
        f"Differences are on the same {len(first):,} {SPLIT_NAMES[first.split]} {items}. The "
        f"interval is a bootstrap over the {items}, in percentage points. It and p hold for these "
        "trained models: another seed gives others."
    ]
    if len(results) > 2:
        notes.append(f"The {len(results) - 1} p-values are not corrected for their number.")
    if first.split == "val":
        notes.append(
            f"No test {items} were predicted. Each run's best epoch was chosen on the {items} "
            "compared."
        )
    if len({run["config"].get("data_fingerprint") for run in results}) > 1:
        notes.append(
            f"The runs' data fingerprints differ: other training {items}, or files that have "
            f"changed. The compared {items} have the same names and classes."
        )
    return notes


def _unfinished(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{name} was not trained to its end: it is the best of its finished epochs."
        for name, run in zip(names, results, strict=True)
        if not run["complete"]
    ]


def _predictions(directory: Path, *, of_texts: bool) -> Predictions:
    saved = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    found = Predictions.read(directory, saved["classes"])
    if found is None:
        writes = "its gist train command" if of_texts else f"gist report {directory}"
        raise FileNotFoundError(f"{directory} has no {PREDICTIONS_FILE}; {writes} writes it")
    return found


def _check_same_images(name: str, first: Predictions, other_name: str, other: Predictions) -> None:
    """Raise a ValueError that says how the images of two runs differ."""

    def refuse(how: str) -> None:
        raise ValueError(
            f"{other_name} and {name} can't be compared image by image: {how}; compare runs that "
            "were tested on the same images"
        )

    if first.split != other.split:
        refuse(
            f"{other_name} predicted {SPLIT_NAMES[other.split]} images and {name} "
            f"{SPLIT_NAMES[first.split]} images"
        )
    if first.classes != other.classes:
        strange = sorted(set(first.classes) ^ set(other.classes))
        refuse(f"their classes differ ({', '.join(strange[:3]) or 'in their order'})")
    absent, more = (set(a.paths) - set(b.paths) for a, b in ((first, other), (other, first)))
    if absent or more or len(first) != len(other):
        sides = (name, absent), (other_name, more)
        named = [f"only {run} has {min(paths)}" for run, paths in sides if paths]
        refuse(f"{len(other):,} images against {len(first):,}; {', '.join(named) or 'repeated'}")
    if first.paths != other.paths:
        refuse("their images have another order")
    relabelled = np.flatnonzero(first.true != other.true)
    if len(relabelled):
        refuse(f"{first.paths[relabelled[0]]} has another class")


def _check_named(
    names: Sequence[str], results: Sequence[dict[str, Any]], first: Predictions
) -> None:
    """Raise a ValueError where only the data's fingerprints can tell whether items are the same.

    Texts, and images that are no files, have no names: all that is known is their order.
    """
    marks = [run["config"].get("data_fingerprint") for run in results]
    nameless = any(path.startswith("#") for path in first.paths)
    for name, mark in zip(names[1:], marks[1:], strict=True):
        if nameless and mark != marks[0]:
            raise ValueError(
                f"{name} and {names[0]} can't be compared: their data fingerprints differ, and "
                "without names of files nothing shows that they were tested on the same items"
            )


def _method(described: Any) -> str:
    methods = described if isinstance(described, list) else [described]
    return " + ".join(method["name"] for method in methods if method) or "none"


def _short_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths by which all differ."""
    parts = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruler = "|---|" + "---|" * (len(headings) - 1)
    return "\n".join([line(headings), ruler, *map(line, rows)])
