"""Results of runs as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from gist.runs.text import is_text

Results = Mapping[str, Any]


def table(runs: Mapping[str, Results], title: str) -> Table:
    """One row per run: accuracies, trained parameters, training throughput, time."""
    result = Table(title=title)
    result.add_column("run")
    item = "texts" if any(is_text(run["config"]) for run in runs.values()) else "images"
    headings = ("test", "val", "method", "token", "head", f"{item}/s", "time")
    for heading in headings:
        result.add_column(heading, justify="right")
    for name, run in runs.items():
        parameters = run["parameters"]
        test = run.get("test")
        result.add_row(
            name,
            f"{test['accuracy']:.1%}" if test else "-",
            "-" if run["val_accuracy"] is None else f"{run['val_accuracy']:.1%}",
            *(f"{parameters[part]:,}" for part in ("method", "token", "head")),
            f"{run['fit']['images_per_second']:.0f}",
            f"{run['seconds']:.0f} s",
        )
    return result


def _percent(accuracy: float | None) -> float:
    """nan, which draws nothing, without validation images."""
    return math.nan if accuracy is None else 100 * accuracy


def plot(runs: Mapping[str, Results], path: Path, title: str) -> None:
    """Draw validation accuracy and training loss by epoch, one line per run, into a PNG.

    Raises:
        ImportError: matplotlib is missing; the text names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'gist-kernels[train]'") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for name, run in runs.items():
        history = run["fit"]["history"]
        epochs = [epoch["epoch"] for epoch in history]
        (line,) = accuracy.plot(
            epochs, [_percent(epoch["val_accuracy"]) for epoch in history], label=name
        )
        best = run["fit"]["best_epoch"]
        if run["val_accuracy"] is not None:
            accuracy.plot(best, 100 * run["val_accuracy"], "o", color=line.get_color())
        loss.plot(epochs, [epoch["train_loss"] for epoch in history], label=name)
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)")
    accuracy.set_title("accuracy (dot: the epoch kept)", fontsize=10)
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    loss.set_title("loss (GIST's has four terms, the others' one)", fontsize=10)
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    accuracy.legend()
    # A folder's name need be neither UTF-8 nor free of the sign that starts a formula.
    figure.suptitle(title.encode(errors="backslashreplace").decode().replace("$", r"\$"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
