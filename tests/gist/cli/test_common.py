"""The progress bar of a run."""

from __future__ import annotations

from rich.console import Console
from training import model

from gist.cli import common
from gist.training.loop import Epoch


def test_the_progress_bar_starts_where_the_run_resumes(monkeypatch):
    monkeypatch.setattr(common, "console", Console(quiet=True))
    progress = common.RunProgress("run")
    progress.starts(model(), 16)
    progress.resumes(9, [Epoch(1, 1.0, 0.25, 1.0, 1.0), Epoch(2, 1.0, 0.5, 1.0, 1.0)])
    (task,) = progress._progress.tasks
    assert (task.completed, task.total, task.fields["val"]) == (9, 16, "50.0%")
    progress.step(10, 0.5)
    assert task.completed == 10
