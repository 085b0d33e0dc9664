"""The study on disk: Optuna's journal in the search's folder, which a kill leaves readable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from gist.files import locked, naming
from gist.training.result import Epoch
from gist.training.state import check_same
from gist.tuning.result import Trial
from gist.tuning.space import Candidate

JOURNAL_FILE = "study.journal"
LOCK_FILE = "study.lock"
NAME = "gist"
REDUCTION = 3
"""Of the trials that reach a rung, about one in this many goes on."""
MOST_STARTS = 4
"""Starts of a trial without a newly finished epoch before it is abandoned."""


_NO_PROGRESS = {"best": (None, None, None), "epochs": 0, "seconds": 0.0}
_STARTED = tuple(state for state in TrialState if state != TrialState.WAITING)


class Study:
    """The trials of one folder. One process at a time has it open.

    Args:
        study: Optuna's.
        seed: of the sampler, together with a trial's number.
    """

    def __init__(self, study: optuna.Study, seed: int) -> None:
        self._study, self._seed = study, seed

    def next(self) -> OpenTrial:
        """The unfinished trial of an earlier process, or else a new one."""
        started = self._study.get_trials(deepcopy=False, states=_STARTED)
        unfinished = [trial for trial in started if trial.state == TrialState.RUNNING]
        if unfinished:  # Optuna has no public way to continue a trial
            trial = optuna.Trial(self._study, unfinished[0]._trial_id)
        else:
            trial = self._study.ask()
        return OpenTrial(self._study, trial, self._seed)

    def trials(self) -> list[Trial]:
        """The trials that have started."""
        return [_described(t) for t in self._study.get_trials(deepcopy=False, states=_STARTED)]


class OpenTrial:
    """A trial under way. What it draws and reports is on the disk before a method returns."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, seed: int) -> None:
        self.number = trial.number
        self._study, self._trial, self._seed = study, trial, seed
        self._reported = set(study.trials[trial.number].intermediate_values)
        self._seconds = self.described().seconds

    def described(self) -> Trial:
        return _described(self._study.trials[self.number])

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return self._seeded(name).suggest_float(name, low, high, log=log)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self._seeded(name).suggest_int(name, low, high, log=log)

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        return self._seeded(name).suggest_categorical(name, choices)

    def _seeded(self, name: str) -> optuna.Trial:
        """The trial, with a generator of this parameter's own.

        A sampler's generator is not saved. So a resumed search draws what a whole one does.
        """
        entropy = (self._seed, self.number, *name.encode())
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        # The multivariate sampler draws at random what only some methods have, such as a rank.
        self._study.sampler = TPESampler(seed=seed, multivariate=False)
        return self._trial

    def starts(self, candidate: Candidate) -> bool:
        """Record a start; False if the trial has ended its process too often."""
        attributes = self._trial.user_attrs
        epochs = self.described().epochs
        before = attributes.get("starts", {"epochs": epochs, "count": 0})
        count = before["count"] + 1 if before["epochs"] == epochs else 1
        if count > MOST_STARTS:
            self._study.tell(self._trial, state=TrialState.FAIL)
            return False
        # Through JSON's types, as the journal reads them back.
        described = {**vars(candidate), "settings": dict(candidate.settings)}
        self._trial.set_user_attr("candidate", described)
        self._trial.set_user_attr("starts", {"epochs": epochs, "count": count})
        return True

    def report(self, epoch: Epoch, seconds: float) -> None:
        """Record an epoch, ``seconds`` after this process began with the trial."""
        if epoch.epoch in self._reported:
            return
        assert epoch.val_accuracy is not None
        assert epoch.val_loss is not None
        now = self.described()
        best = now.best_epoch, now.val_accuracy, now.val_loss
        if now.rank() < (epoch.val_accuracy, -epoch.val_loss):
            best = epoch.epoch, epoch.val_accuracy, epoch.val_loss
        progress = {"best": best, "epochs": epoch.epoch, "seconds": self._seconds + seconds}
        self._trial.set_user_attr(
            "progress", progress
        )  # first: a reported epoch is never read again
        self._trial.report(epoch.val_accuracy, epoch.epoch)
        self._reported.add(epoch.epoch)

    def loses(self) -> bool:
        """Whether successive halving ends the trial at the last reported epoch."""
        return self._trial.should_prune()

    def pauses(self, seconds: float) -> None:
        """Record how long this process was at the trial, which stays unfinished."""
        progress = self._trial.user_attrs.get("progress", _NO_PROGRESS)
        self._trial.set_user_attr("progress", {**progress, "seconds": self._seconds + seconds})

    def ends(self, seconds: float, state: str) -> None:
        """Record the end: "complete", "pruned" or "diverged"."""
        self.pauses(seconds)
        if state == "complete":
            self._study.tell(self._trial, self.described().val_accuracy)
            return
        self._trial.set_user_attr("diverged", state == "diverged")
        # Without an epoch, the sampler takes a pruned trial for worse than all others.
        self._study.tell(self._trial, state=TrialState.PRUNED)


def _described(trial: FrozenTrial) -> Trial:
    attributes = trial.user_attrs
    candidate = attributes.get("candidate")
    progress = attributes.get("progress", _NO_PROGRESS)
    best_epoch, accuracy, loss = progress["best"]
    state = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "diverged" if attributes.get("diverged") else "pruned",
        TrialState.FAIL: "abandoned",
    }.get(trial.state, "unfinished")
    return Trial(
        number=trial.number,
        state=state,
        candidate=None if candidate is None else Candidate(**candidate),
        epochs=progress["epochs"],
        best_epoch=best_epoch,
        val_accuracy=accuracy,
        val_loss=loss,
        seconds=progress["seconds"],
        folder=f"trials/{trial.number:03d}",
    )


@contextmanager
def open_study(
    directory: Path,
    identity: Mapping[str, Any],
    *,
    seed: int,
    first_rung: int,
    start: Mapping[str, Any],
) -> Iterator[Study]:
    """The study of a folder, made if missing.

    Args:
        identity: JSON values that decide the trials' outcomes.
        seed: of the sampler.
        first_rung: the epoch at which successive halving first ends trials.
        start: parameters of the first trial.

    Raises:
        BlockingIOError: another process has it open.
        FileExistsError: it is a study of another identity, which stays as it is.
        OSError: a file can't be written; the text names it.
        ValueError: the journal can't be read.
    """
    identity = json.loads(json.dumps(identity))
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with locked(directory, "tuning", LOCK_FILE):
            path = directory / JOURNAL_FILE
            _mend(path)
            pruner = SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=REDUCTION)
            try:
                study = _loaded(JournalStorage(_Journal(path)), pruner)
            except (ValueError, LookupError) as error:
                raise ValueError(
                    f"{path} is not a study that this version reads; delete its folder to start "
                    f"again ({error})"
                ) from error
            if "identity" in study.user_attrs:
                check_same(identity, study.user_attrs["identity"], directory, "study")
            else:
                study.set_user_attr("identity", identity)
            if not study.get_trials(deepcopy=False):
                study.enqueue_trial(dict(start))
            yield Study(study, seed)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _loaded(storage: JournalStorage, pruner: SuccessiveHalvingPruner) -> optuna.Study:
    """The journal's study. Optuna's ``load_if_exists`` would write to a journal that has one."""
    try:
        return optuna.load_study(study_name=NAME, storage=storage, pruner=pruner)
    except KeyError:
        return optuna.create_study(
            study_name=NAME, storage=storage, pruner=pruner, direction="maximize"
        )


class _NoLock:
    """The study's lock stands in: one that a killed process held would be waited for."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None: ...


class _Journal(JournalFileBackend):
    """Optuna's file of JSON lines. An error of the disk names it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with naming(path):
            super().__init__(str(path), _NoLock())  # type: ignore[arg-type]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with naming(self._path):
            super().append_logs(logs)


def _mend(path: Path) -> None:
    """Cut off a last line that a kill or a full disk left unfinished."""
    if not path.is_file():
        return
    whole = path.read_bytes().rpartition(b"\n")
    if whole[2]:
        with naming(path):
            os.truncate(path, len(whole[0]) + len(whole[1]))
