"""Patience ends a training, records that it did, and does so after a kill too."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import in_processes, kill_at, model, stripes, train_in, trained_in

from gist.training.config import TrainConfig
from gist.training.loop import fit
from gist.training.result import Epoch, FitResult

# Four steps an epoch. Every image is right from epoch 2 on, so that epoch 4 is the last.
CONFIG = TrainConfig(epochs=9, batch_size=16, lr=1e-2, warmup_epochs=0.5, seed=5, patience=2)


def accuracies(result: FitResult) -> list[float | None]:
    return [epoch.val_accuracy for epoch in result.history]


def test_ends_after_that_many_epochs_without_a_better_accuracy():
    whole = fit(model(), stripes(50, 1), stripes(31, 2), replace(CONFIG, patience=0))
    assert (len(whole.history), whole.stopped_early) == (9, False)
    result = fit(model(), stripes(50, 1), stripes(31, 2), CONFIG)
    measured = accuracies(result)
    assert measured == accuracies(whole)[: len(measured)]  # the schedule is the same
    first_best = measured.index(max(measured))
    assert len(measured) == first_best + 1 + CONFIG.patience < 9
    assert result.stopped_early
    assert not result.interrupted
    # Among equal accuracies the lowest loss is kept, as without patience.
    best = max(result.history, key=lambda e: (e.val_accuracy, -e.val_loss))
    assert result.best_epoch == best.epoch


def test_a_last_epoch_is_no_early_stop():
    result = fit(model(), stripes(50, 1), stripes(31, 2), replace(CONFIG, stop_after=4))
    assert (len(result.history), result.stopped_early) == (4, False)


@pytest.mark.parametrize(
    ("measured", "stale"),
    [([], 0), ([0.5], 0), ([0.5, 0.5, 0.5], 2), ([0.5, 0.4, 0.6], 0), ([0.2, 0.9, 0.8, 0.9], 2)],
)
def test_an_equal_accuracy_is_no_better_one(measured, stale):
    history = [Epoch(i, 1.0, value, 1.0 / i, 0.0) for i, value in enumerate(measured, start=1)]
    assert FitResult(history).stale_epochs() == stale


def train(directory: Path, kill: int | None = None) -> None:
    train_in(directory, CONFIG, on_step=kill_at(kill) if kill else None)


@pytest.mark.slow
def test_a_killed_training_stops_at_the_same_epoch_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_processes(train, whole) == [0]
    assert in_processes(train, killed, 11) == [-signal.SIGKILL]
    assert in_processes(train, killed) == [0]
    assert in_processes(train, killed) == [0]  # its state says that it has stopped
    expected, found = trained_in(whole), trained_in(killed)
    assert len(expected["history"]) < CONFIG.epochs
    assert found.pop("went_on_after") == [4 * len(expected["history"])]
    weights = found.pop("trainables")
    assert all(torch.equal(weights[name], w) for name, w in expected["trainables"].items())
    assert found == {key: expected[key] for key in found}


def test_needs_validation_images():
    with pytest.raises(ValueError, match="patience needs validation images"):
        fit(model(), stripes(50, 1), None, CONFIG)
    with pytest.raises(ValueError, match="patience must be at least 0"):
        replace(CONFIG, patience=-1)
