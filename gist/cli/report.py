"""``gist report``, and the report that a training writes when it ends."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gist.cli.common import RunProgress, add_command, add_device_options, console, to_stderr
from gist.data import ImageData, LabelledData, load_data, load_texts, prepare
from gist.model.wrapped import GistModel
from gist.report import write_report
from gist.runs.predictions import PREDICTIONS_FILE, measure_run
from gist.runs.run import finished_results, load_run, transforms_of
from gist.runs.text import is_text


def register(commands: Any) -> None:
    """Add the command to the parser of ``gist``."""
    parser = add_command(commands, "report", _report, "write finished runs' report.html again")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a finished run's folder")
    add_device_options(parser)


def progress_of(arguments: argparse.Namespace, name: str) -> RunProgress:
    """The progress of a run, which ends with a report unless ``--no-report`` was given."""
    return ReportingProgress(name) if arguments.report else RunProgress(name)


class ReportingProgress(RunProgress):
    """Progress of a run that writes its report at the end. Without the report the run is whole."""

    def finishes(self, model: GistModel, data: LabelledData, directory: Path) -> None:
        try:
            _write(directory, model, data)
        except Exception as error:  # whatever it is, the run is finished
            _warn(f"the run is complete, but its report could not be written: {error!r}. "
                  f"gist report {directory} tries again")  # fmt: skip


def _write(directory: Path, model: GistModel | None, data: LabelledData | None) -> None:
    started = time.perf_counter()
    path = write_report(directory, model, data)
    seconds = time.perf_counter() - started
    console.print(f"Report: {path} ({seconds:.1f} s)", highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    to_stderr.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True)


def _report(arguments: argparse.Namespace) -> None:
    for run in arguments.runs:
        results = finished_results(run)
        data = _data_of(results["config"])
        model = _model_of(run, arguments.device)
        if (
            isinstance(data, ImageData)
            and model is not None
            and not (run / PREDICTIONS_FILE).is_file()
        ):
            split = data.val if data.test is None else data.test
            if split is not None:
                prepared = prepare(split, transforms_of(run))
                _, predictions = measure_run(model, data, prepared, results["config"]["data"])
                predictions.write(run)
        _write(run, model, data)


def _data_of(config: Mapping[str, Any]) -> LabelledData | None:
    """The run's data; None, and a warning, where it can't be read now."""
    try:
        if is_text(config):
            return load_texts(config["data"])
        return load_data(config["data"], check=False)
    except (ImportError, OSError, ValueError) as error:
        _warn(f"the report shows none of the run's data: {error}")
        return None


def _model_of(run: Path, device: str) -> GistModel | None:
    """The run's model; None, and a warning, where it can't be made now."""
    try:
        return load_run(run).to(device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        _warn(f"the report has no attention: {error}")
        return None
