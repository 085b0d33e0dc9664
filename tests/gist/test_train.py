"""fit and evaluate: they learn, keep the best epoch, repeat exactly, and end cleanly."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import TensorDataset
from training import model, stripes

import gist
from gist.evaluation import evaluate
from gist.train import TrainConfig, fit

TRAIN, VAL = stripes(50, 1), stripes(31, 2)
CONFIG = TrainConfig(epochs=4, batch_size=16, lr=1e-2, warmup_epochs=0.5)


@pytest.mark.parametrize("use_gist", [True, False])
def test_learns_and_reports_what_it_saw(use_gist):
    m = model(config=gist.GistConfig(gist=use_gist))
    steps, epochs = [], []
    result = fit(
        m, TRAIN, VAL, CONFIG, on_step=lambda s, loss: steps.append(s), on_epoch=epochs.append
    )
    assert steps == list(range(1, 17))  # four batches an epoch, the last of two images
    assert epochs == result.history
    assert [e.epoch for e in epochs] == [1, 2, 3, 4]
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert not result.interrupted
    measured = evaluate(m, VAL, batch_size=8)
    assert measured.accuracy > 0.9
    assert measured.images == 31


def test_the_best_epoch_is_the_one_kept():
    m = model()
    # A rate this high spoils later epochs, so that the last one is not the best.
    result = fit(m, TRAIN, VAL, TrainConfig(epochs=6, batch_size=8, lr=0.3, warmup_epochs=0))
    best = max(result.history, key=lambda e: (e.val_accuracy, -e.val_loss))
    assert result.best_epoch == best.epoch
    kept = evaluate(m, VAL)
    assert kept.accuracy == best.val_accuracy
    assert kept.loss == pytest.approx(best.val_loss, rel=1e-5)
    assert best.val_loss < max(e.val_loss for e in result.history)


def test_equal_seeds_give_equal_bits_and_others_do_not():
    def trained(seed):
        m = model()
        fit(m, TRAIN, VAL, TrainConfig(epochs=2, batch_size=16, seed=seed))
        return m.trainable_state_dict()

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_frozen_weights_stay_bit_identical():
    m = model()
    before = {n: p.clone() for n, p in m.named_parameters() if not p.requires_grad}
    fit(m, TRAIN, VAL, CONFIG)
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters() if n in before)


def test_interruption_keeps_the_best_finished_epoch():
    m = model()

    def interrupt(step, loss):
        if step == 10:  # in the third epoch
            raise KeyboardInterrupt

    result = fit(m, TRAIN, VAL, CONFIG, on_step=interrupt)
    assert result.interrupted
    assert len(result.history) == 2
    best = result.history[result.best_epoch - 1]
    assert evaluate(m, VAL).accuracy == best.val_accuracy


def test_interruption_before_the_first_epoch_ends():
    def interrupt(step, loss):
        raise KeyboardInterrupt

    result = fit(model(), TRAIN, VAL, CONFIG, on_step=interrupt)
    assert (result.interrupted, result.best_epoch, result.history) == (True, None, [])


def test_a_loss_that_is_not_finite_is_named():
    pixels, labels = TRAIN.tensors
    broken = TensorDataset(pixels.clone().index_fill_(0, torch.tensor([0]), math.nan), labels)
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        fit(model(), broken, VAL, CONFIG)


def test_evaluation_counts_every_image_once():
    m = model().eval()
    pixels, labels = VAL.tensors
    with torch.no_grad():
        logits = m(pixels)
    exact = torch.nn.functional.cross_entropy(logits, labels).item()
    for batch_size in (1, 7, 31, 64):
        measured = evaluate(m, VAL, batch_size=batch_size)
        assert measured.images == 31
        assert measured.loss == pytest.approx(exact, rel=1e-5)
        assert measured.accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_bf16_trains():
    m = model()
    fit(m, TRAIN, VAL, TrainConfig(epochs=4, batch_size=16, lr=1e-2, precision="bf16"))
    assert evaluate(m, VAL).accuracy > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
