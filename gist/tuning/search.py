"""Search of a run's settings: trials on validation images, under a budget of time or of trials."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gist.data import LabelledData
from gist.files import write_json
from gist.model.wrapped import GistModel
from gist.runs.provenance import describe_machine, git_revision, versions
from gist.runs.run import RESUME_FILE, AnyConfig, Listener, run
from gist.training.divergence import DivergedError
from gist.training.evaluation import processes
from gist.training.result import Epoch
from gist.tuning.result import Trial, Tuned
from gist.tuning.space import Candidate, Space

TUNED_FILE = "tune.json"
ENDED = ("complete", "pruned", "diverged", "abandoned")


def tune(
    config: AnyConfig,
    data: LabelledData,
    directory: Path,
    *,
    space: Space | None = None,
    minutes: float | None = None,
    trials: int | None = None,
    device: str = "cpu",
    workers: int | None = 0,
    save_every: int = 0,
    listener: Callable[[int, Candidate], AbstractContextManager[Listener]] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Tuned:
    """Search ``space`` for the settings of the best accuracy on ``data.val``.

    A trial is a run (:func:`gist.runs.run.run`) in ``trials/NUMBER``. Optuna's TPE chooses its
    settings: those of ``config`` first. With m the first epoch after the warm-up, successive
    halving ends a trial at the epochs m, 3 m, 9 m, ... unless its accuracy is among the best third
    there. ``data.test`` is not used.

    A killed search resumes by the same call, within the trial that was under way. On a CPU its
    trials are those of a search that was not killed. A call with more time or trials continues the
    search. The folder gets ``study.journal``, Optuna's, and ``tune.json`` with all trials.

    Args:
        config: everything that is not searched.
        data: ``config.data``, loaded, with validation images.
        directory: made if missing.
        space: default :class:`Space`.
        minutes: budget, of all calls together. The trial under way when it ends is unfinished.
        trials: number of them to end after, of all calls together.
        device, workers, save_every: as :func:`gist.runs.run.run`.
        listener: called with each trial's number and settings; returns a context whose value is
            the listener of its training.
        on_trial: called with each trial that ends.

    Raises:
        ValueError: neither a budget nor a number of trials, no validation images, several
            processes, or a method that does not fit the backbone.
        ImportError: Optuna is missing.
        FileExistsError: ``directory`` holds a search of other settings, data or space.
        BlockingIOError: another process is tuning in ``directory``.
        OSError: a file can't be written. Nothing that was finished is lost.
        KeyboardInterrupt: Ctrl-C. The same call resumes.
    """
    space = space or Space()
    if minutes is None and trials is None:
        raise ValueError("a search needs minutes or trials to end after")
    for name, limit in (("minutes", minutes), ("trials", trials)):
        if limit is not None and not 0 < limit < math.inf:
            raise ValueError(f"{name} must be above 0; it is {limit}")
    if data.val is None:
        raise ValueError("a search needs validation images, and there are none")
    if processes(device).num_processes > 1:
        raise ValueError("a search runs in one process; start it without a launcher")
    space.check(config)
    try:
        from gist.tuning.study import open_study
    except ImportError as error:
        raise ImportError("tuning needs Optuna: pip install 'gist-kernels[tune]'") from error
    described = config.to_dict()
    identity = {
        **described.pop("train"), **described,
        "space": space.to_dict(), "images": data.fingerprint,
    }  # fmt: skip
    circumstances = {
        "config": config.to_dict(), "space": space.to_dict(), "machine": describe_machine(device),
        "versions": versions(), "git": git_revision(),
    }  # fmt: skip
    data = replace(data, test=None)
    with open_study(
        directory,
        identity,
        seed=config.train.seed,
        first_rung=math.ceil(config.train.warmup_epochs) + 1,
        start=space.start(config),
    ) as study:

        def found() -> Tuned:
            tuned = Tuned(study.trials())
            write_json(directory / TUNED_FILE, {**tuned.to_dict(), **circumstances})
            return tuned

        while True:
            tuned = found()
            left = math.inf if minutes is None else 60 * minutes - tuned.seconds
            ended = sum(trial.state in ENDED for trial in tuned.trials)
            if left <= 0 or (trials is not None and ended >= trials):
                return tuned
            trial = study.next()
            candidate = space.draw(trial, config)
            if not trial.starts(candidate):
                continue
            heard = listener(trial.number, candidate) if listener is not None else nullcontext()
            with heard as inner:
                course = _Course(trial, config, left, inner or Listener())
                folder = directory / trial.described().folder
                try:
                    run(
                        candidate.apply(config),
                        data,
                        folder,
                        device=device,
                        workers=workers,
                        save_every=save_every,
                        listener=course,
                    )
                    state = "complete"
                except DivergedError:
                    state = "diverged"
                except _LostError:
                    state = "pruned"
                except (_TimeIsUpError, KeyboardInterrupt) as end:
                    trial.pauses(course.seconds())
                    tuned = found()
                    if isinstance(end, KeyboardInterrupt):
                        raise
                    return tuned
            trial.ends(course.seconds(), state)
            (folder / RESUME_FILE).unlink(missing_ok=True)
            gc.collect()  # a wrapped model is part of circles, and the next trial needs its memory
            if on_trial is not None:
                on_trial(trial.described())


class _LostError(Exception):
    """Successive halving ends the trial."""


class _TimeIsUpError(Exception):
    """The budget is spent."""


class _Course(Listener):
    """Reports a trial's epochs to the study, and ends the trial where the study or time says."""

    def __init__(self, trial: Any, config: AnyConfig, left: float, inner: Listener) -> None:
        self._trial, self._inner, self._left = trial, inner, left
        self._last = config.train.stop_after or config.train.epochs
        self._started = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def starts(self, model: GistModel, steps: int) -> None:
        self._inner.starts(model, steps)

    def resumes(self, step: int, history: Sequence[Epoch]) -> None:
        self._inner.resumes(step, history)
        for epoch in history:
            self._trial.report(epoch, self.seconds())
        if history:
            self._judge(history[-1])

    def step(self, step: int, loss: float) -> None:
        self._inner.step(step, loss)
        if self.seconds() > self._left:
            raise _TimeIsUpError

    def epoch(self, epoch: Epoch) -> None:
        self._inner.epoch(epoch)
        self._trial.report(epoch, self.seconds())
        self._judge(epoch)

    def _judge(self, epoch: Epoch) -> None:
        if epoch.epoch < self._last and self._trial.loses():
            raise _LostError
