"""The search: budget, pruning, resuming, and what it refuses. Trainings here are scripted."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training import in_processes

from gist.data import ImageData
from gist.runs.run import RESUME_FILE, RunConfig
from gist.training.config import TrainConfig
from gist.training.divergence import DivergedError
from gist.training.result import Epoch
from gist.tuning import Space, Tuned, search, tune

EPOCHS = 6  # successive halving looks at epochs 1 and 3
CONFIG = RunConfig("images", "test_vit", train=TrainConfig(epochs=EPOCHS, warmup_epochs=0, seed=3))
SPACE = Space(methods=("lora", "ssf"))


class Labels(list):
    @property
    def labels(self):
        return list(self)


DATA = ImageData("d", ("a", "b"), Labels([0, 1]), Labels([0, 1]), Labels([0, 1]), "fingerprint")


def of_the_rate(config: RunConfig, number: int) -> list[float]:
    """Accuracies by epoch: the closer the learning rate to 0.01, the better."""
    lr = config.train.lr
    best = max(0.0, 1 - abs(lr - 0.01) / max(lr, 0.01))
    return [best * (1 + epoch) / EPOCHS for epoch in range(EPOCHS)]


class Scripted:
    """Stands in for a run: its epochs' accuracies are given, and it resumes as a run does.

    Args:
        script: from config and trial number to accuracies by epoch; it may raise.
        before: called with trial number and epoch before each epoch.
    """

    def __init__(
        self,
        script: Callable[[RunConfig, int], Sequence[float]] = of_the_rate,
        before: Callable[[int, int], None] = lambda number, epoch: None,
    ) -> None:
        self.script, self.before = script, before
        self.numbers: list[int] = []

    def __call__(self, config, data, directory, *, listener, **options: Any) -> None:
        assert data.test is None
        number = int(directory.name)
        self.numbers.append(number)
        directory.mkdir(parents=True, exist_ok=True)
        state = directory / RESUME_FILE
        history = json.loads(state.read_text()) if state.is_file() else []
        if history:
            listener.resumes(len(history), [Epoch(*epoch) for epoch in history])
        for accuracy in self.script(config, number)[len(history) :]:
            epoch = len(history) + 1
            self.before(number, epoch)
            listener.step(epoch, 1.0)
            history.append((epoch, 1.0, accuracy, 1 - accuracy, 0.0))
            state.write_text(json.dumps(history))
            listener.epoch(Epoch(*history[-1]))


def searched(directory: Path, run: Scripted, **options: Any) -> Tuned:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "run", run)
        patch.setattr(search, "git_revision", lambda: None)
        patch.setattr("gist.tuning.space.check_model", lambda config: None)
        settings = {"space": SPACE, "trials": 9, **options}
        return tune(CONFIG, DATA, directory, **settings)


def timeless(tuned: Tuned) -> list[Any]:
    return [replace(trial, seconds=0.0) for trial in tuned.trials]


def test_finds_the_best_rate_from_the_configs_own_on(tmp_path):
    tuned = searched(tmp_path, Scripted())
    assert [trial.number for trial in tuned.trials] == list(range(9))
    first = tuned.trials[0]
    assert (first.candidate.lr, first.candidate.method) == (1e-3, "lora")
    assert first.candidate.settings == {"rank": 8, "alpha": 8.0}
    assert first.state == "complete"
    assert len({trial.candidate.lr for trial in tuned.trials}) == 9
    assert {trial.candidate.method for trial in tuned.trials} == {"lora", "ssf"}
    best = tuned.best
    assert best.state == "complete"
    assert best.val_accuracy == max(t.val_accuracy for t in tuned.trials if t.epochs == EPOCHS)
    assert best.val_accuracy == of_the_rate(best.candidate.apply(CONFIG), 0)[-1]
    assert (best.epochs, best.best_epoch) == (EPOCHS, EPOCHS)
    written = json.loads((tmp_path / "tune.json").read_text())
    assert written["best"] == best.number
    assert [t["candidate"]["lr"] for t in written["trials"]] == [
        trial.candidate.lr for trial in tuned.trials
    ]
    assert written["config"]["train"]["epochs"] == EPOCHS


def test_ends_what_is_not_among_the_best_third(tmp_path):
    levels = [0.5, 0.4, 0.6, 0.45, 0.7, 0.1]
    tuned = searched(tmp_path, Scripted(lambda config, n: [levels[n]] * EPOCHS), trials=6)
    # The best so far goes on until three have come; then the best third of those so far.
    assert [(t.state, t.epochs) for t in tuned.trials] == [
        ("complete", 6), ("pruned", 1), ("complete", 6), ("pruned", 1), ("complete", 6),
        ("pruned", 1),
    ]  # fmt: skip
    left = [path.parent.name for path in tmp_path.rglob(RESUME_FILE)]
    assert left == []
    assert tuned.best.number == 4


def test_a_trial_that_diverges_is_one_of_the_trials(tmp_path):
    def script(config, number):
        if number == 1:
            raise DivergedError("the loss is nan")
        return of_the_rate(config, number)

    tuned = searched(tmp_path, Scripted(script), trials=3)
    assert [trial.state for trial in tuned.trials][:2] == ["complete", "diverged"]
    assert (tuned.trials[1].epochs, tuned.trials[1].val_accuracy) == (0, None)
    assert tuned.best.number != 1


def test_a_trials_model_is_gone_when_the_next_one_starts(tmp_path):
    class Circle:
        def __init__(self):
            self.itself = self

    models = []

    def script(config, number):
        assert [model() for model in models] == [None] * number
        models.append(weakref.ref(Circle()))
        return of_the_rate(config, number)

    searched(tmp_path, Scripted(script), trials=3)
    assert len(models) == 3


def test_the_seed_decides_the_trials(tmp_path):
    first, again = (searched(tmp_path / name, Scripted(), trials=5) for name in "ab")
    assert timeless(first) == timeless(again)
    with pytest.MonkeyPatch.context() as patch:
        seeded = replace(CONFIG, train=replace(CONFIG.train, seed=4))
        patch.setattr(sys.modules[__name__], "CONFIG", seeded)
        other = searched(tmp_path / "c", Scripted(), trials=5)
    rates = [[trial.candidate.lr for trial in tuned.trials[1:]] for tuned in (first, other)]
    assert not set(rates[0]) & set(rates[1])


def interrupt_at(where: tuple[int, int]) -> Callable[[int, int], None]:
    def before(number: int, epoch: int) -> None:
        if (number, epoch) == where:
            raise KeyboardInterrupt

    return before


def test_an_interrupted_search_goes_on_with_the_same_trials(tmp_path):
    whole = searched(tmp_path / "whole", Scripted())
    assert "pruned" in {trial.state for trial in whole.trials}
    for where in ((0, 1), (2, 3), (2, 3), (7, 1)):
        if where[1] <= whole.trials[where[0]].epochs:
            with pytest.raises(KeyboardInterrupt):
                searched(tmp_path / "cut", Scripted(before=interrupt_at(where)))
            shown = json.loads((tmp_path / "cut" / "tune.json").read_text())
            assert shown["trials"][-1]["state"] == "unfinished"
    run = Scripted()
    assert timeless(searched(tmp_path / "cut", run)) == timeless(whole)
    assert run.numbers[0] == 7
    done = Scripted()
    assert timeless(searched(tmp_path / "cut", done)) == timeless(whole)
    assert done.numbers == []  # it was all done
    assert len(searched(tmp_path / "cut", done, trials=11).trials) == 11


def test_the_budget_is_that_of_all_calls(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(search.time, "monotonic", lambda: now[0])

    def before(number, epoch):
        now[0] += 10.0

    constant = lambda config, number: [0.5] * EPOCHS  # noqa: E731
    options = {"trials": None, "minutes": 1.6}  # 96 s: a trial of 60 s, and 3.6 epochs
    tuned = searched(tmp_path, Scripted(constant, before), **options)
    assert [(t.state, t.epochs, t.seconds) for t in tuned.trials] == [
        ("complete", 6, 60.0), ("unfinished", 3, 40.0),
    ]  # fmt: skip
    assert tuned.best.number == 0
    again = Scripted(constant, before)
    assert timeless(searched(tmp_path, again, **options)) == timeless(tuned)
    assert again.numbers == []
    more = searched(tmp_path, again, trials=2, minutes=3)
    assert again.numbers == [1]
    assert [(t.state, t.seconds) for t in more.trials] == [("complete", 60.0), ("complete", 70.0)]


def test_without_a_complete_trial_the_best_so_far_counts(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(search.time, "monotonic", lambda: now[0])

    def before(number, epoch):
        now[0] += 10.0

    tuned = searched(tmp_path, Scripted(before=before), trials=None, minutes=0.5)
    assert (tuned.best.number, tuned.best.state, tuned.best.epochs) == (0, "unfinished", 3)
    none = searched(tmp_path / "b", Scripted(before=before), trials=None, minutes=0.1)
    assert none.best is None


def test_a_trial_that_ends_its_process_again_and_again_is_abandoned(tmp_path):
    def before(number, epoch):
        if (number, epoch) == (1, 2):
            raise RuntimeError("out of memory")

    run = Scripted(lambda config, n: [0.5] * EPOCHS, before)
    failed = 0
    while True:
        try:
            tuned = searched(tmp_path, run, trials=3)
            break
        except RuntimeError:
            failed += 1
    assert failed == 5  # once after a new epoch, then four times without one
    assert [trial.state for trial in tuned.trials] == ["complete", "abandoned", "complete"]


@pytest.mark.parametrize(
    ("config", "data", "space", "named"),
    [
        (replace(CONFIG, model="test_vit2"), DATA, SPACE, "model"),
        (CONFIG, replace(DATA, fingerprint="other"), SPACE, "images"),
        (CONFIG, DATA, Space(methods=("lora",)), "space"),
        (replace(CONFIG, train=replace(CONFIG.train, epochs=7, seed=4)), DATA, SPACE,
         "epochs, seed"),
    ],
)  # fmt: skip
def test_another_search_is_refused(config, data, space, named, tmp_path):
    searched(tmp_path, Scripted(), trials=1)
    before = (tmp_path / "study.journal").read_bytes()
    with pytest.raises(FileExistsError, match=rf"holds another study \(it differs in {named}\)"):
        tune(config, data, tmp_path, space=space, trials=1)
    assert (tmp_path / "study.journal").read_bytes() == before


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DATA, {}, "needs minutes or trials"),
        (DATA, {"minutes": 0}, "minutes must be above 0"),
        (DATA, {"trials": -1}, "trials must be above 0"),
        (replace(DATA, val=None), {"trials": 1}, "needs validation images"),
    ],
)
def test_what_can_not_be_searched_is_refused(data, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tune(CONFIG, data, tmp_path / "out", space=SPACE, **options)
    assert not (tmp_path / "out").exists()


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "gist.tuning.study", raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'gist-kernels\[tune\]'"):
        tune(CONFIG, DATA, tmp_path, space=SPACE, trials=1)


@pytest.mark.parametrize("cut", [b'{"op_code":8,"wor', b"\xff"])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    searched(tmp_path, Scripted(), trials=2)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(cut)
    assert len(searched(tmp_path, Scripted(), trials=3).trials) == 3
    assert len(searched(tmp_path, Scripted(), trials=4).trials) == 4


def test_a_journal_of_something_else_is_named(tmp_path):
    (tmp_path / "study.journal").write_text("no journal\n{}\n")
    with pytest.raises(ValueError, match=r"study\.journal is not a study"):
        searched(tmp_path, Scripted(), trials=1)


def kill_at(where: tuple[int, int]) -> Callable[[int, int], None]:
    def before(number: int, epoch: int) -> None:
        if (number, epoch) == where:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def killed(directory: Path, where: tuple[int, int]) -> None:
    searched(directory, Scripted(before=kill_at(where)))


def killed_in_the_journal(directory: Path, line: int) -> None:
    """Dies in the middle of writing the journal's n-th line."""
    from gist.tuning.study import _Journal

    append, written = _Journal.append_logs, []

    def append_(self, logs):
        written.append(logs)
        if len(written) == line:
            with open(self._path, "ab") as file:
                file.write(json.dumps(logs[0]).encode()[:30])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, logs)

    _Journal.append_logs = append_
    searched(directory, Scripted())


def refused_while_open(directory: Path) -> None:
    with pytest.raises(BlockingIOError, match="another process is tuning in this folder"):
        searched(directory, Scripted())


def on_a_full_disk(directory: Path) -> None:
    """No file may grow beyond what the journal has after the first trial."""

    def before(number, epoch):
        if (number, epoch) == (1, 1):
            size = (directory / "study.journal").stat().st_size
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(OSError, match=r"File too large.*study\.journal"):
        searched(directory, Scripted(before=before))


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_with_the_same_trials(tmp_path):
    whole, cut = timeless(searched(tmp_path / "whole", Scripted())), tmp_path / "cut"
    assert in_processes(killed, cut, (0, 4)) == [-signal.SIGKILL]
    for line in (1, 6, 11):  # the start of a trial, its progress, its end
        assert in_processes(killed_in_the_journal, cut, line) == [-signal.SIGKILL]
    assert in_processes(on_a_full_disk, cut) == [0]

    def before(number, epoch):  # while the last call has the study open
        if (number, epoch) == (8, 1):
            assert in_processes(refused_while_open, cut) == [0]

    assert timeless(searched(cut, Scripted(before=before))) == whole
