"""Reports of finished runs as pages that need no network, and comparisons of runs."""

from __future__ import annotations

from pathlib import Path

from gist.data import LabelledData
from gist.files import write_atomically
from gist.model.wrapped import GistModel
from gist.report.collect import collect
from gist.report.page import report_page
from gist.runs.run import REPORT_FILE

__all__ = ["REPORT_FILE", "write_report"]


def write_report(
    directory: Path, model: GistModel | None = None, data: LabelledData | None = None
) -> Path:
    """Write a finished run's report.html: one file without scripts, which loads nothing.

    It shows curves, confusion matrix, scores of each class, worst mistakes, calibration, attention
    and settings, of the images in ``predictions.csv``.

    Args:
        directory: the run's.
        model: the run's, for attention; left in evaluation mode. None leaves attention out.
        data: the run's, for pictures. None leaves pictures and attention out.

    Returns:
        The file.

    Raises:
        FileNotFoundError: ``directory`` holds no finished run.
        ValueError: its files are not a run's.
    """
    path = directory / REPORT_FILE
    write_atomically(path, report_page(collect(directory, model, data)))
    return path
