"""A training that diverges ends with advice, and loses nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch.utils.data import TensorDataset
from training import model, stripes, train_in

from gist.training.config import TrainConfig
from gist.training.divergence import FAR, IN_A_ROW, DivergedError, LossWatch
from gist.training.evaluation import evaluate
from gist.training.loop import fit
from gist.training.state import ResumeFile

CONFIG = TrainConfig(epochs=6, batch_size=16, lr=1e-2, warmup_epochs=0)
GUESS = math.log(3)


def checked(losses: list[float], config: TrainConfig = CONFIG) -> LossWatch:
    watch = LossWatch(config, classes=3)
    for step, loss in enumerate(losses, start=1):
        watch.check(loss, step, epoch=1 + step // 10, lr=0.02)
    return watch


def test_a_loss_far_above_its_start_for_long_is_named():
    far = 1.01 * FAR * 2.2
    checked([2.2, *[far] * (IN_A_ROW - 1), 1.0, *[far] * (IN_A_ROW - 1)])  # spikes pass
    with pytest.raises(DivergedError) as raised:
        checked([2.2, *[far] * IN_A_ROW])
    text = str(raised.value)
    assert "at step 21 (epoch 3), with a learning rate of 0.02" in text
    assert "above 22 for 20 steps in a row; it started at 2.2" in text
    assert "Lower lr, to 0.001 for example." in text
    assert "set clip_grad_norm to 1 and set warmup_epochs to 1 or more" in text


def test_the_start_counts_as_a_guess_at_least():
    checked([1e-6, *[0.9 * FAR * GUESS] * 99])  # a classifier that came with the backbone
    with pytest.raises(DivergedError):
        checked([1e-6, *[1.1 * FAR * GUESS] * 99])


def test_a_loss_that_grows_by_itself_need_only_be_finite():
    growing = replace(CONFIG, kl_warmup_epochs=2)
    checked([1.0, *[1e6] * 99], growing)
    with pytest.raises(DivergedError, match="the loss is inf"):
        checked([1.0, math.inf], growing)


def test_advice_names_only_what_is_not_set_yet():
    careful = replace(CONFIG, clip_grad_norm=1.0, warmup_epochs=2)
    with pytest.raises(DivergedError) as raised:
        checked([1.0, math.nan], careful)
    assert "Lower lr" in str(raised.value)
    assert "If that does not help" not in str(raised.value)


def test_a_first_loss_that_is_not_finite_is_not_the_learning_rates():
    with pytest.raises(DivergedError, match="it never was finite. Look for values") as raised:
        checked([math.nan])
    assert "Lower lr" not in str(raised.value)


def test_the_best_epoch_and_the_saved_state_are_kept(tmp_path):
    trained, train, val = model(), stripes(48, 1), stripes(31, 2)
    resume_file = ResumeFile(tmp_path / "resume.pt", {})
    measured = []

    def on_epoch(epoch):
        measured.append(epoch)
        if epoch.epoch == 2:
            next(iter(trained.trainable_state_dict().values())).fill_(math.nan)

    with pytest.raises(DivergedError, match=r"nan at step 7 \(epoch 3\).*Kept is epoch") as raised:
        fit(trained, train, val, CONFIG, resume_file=resume_file, on_epoch=on_epoch)
    result = raised.value.result
    assert result.history == measured
    kept = measured[result.best_epoch - 1]
    assert evaluate(trained, val).accuracy == kept.val_accuracy
    assert len(resume_file.load()["history"]) == 2


def test_without_a_finished_epoch_that_is_said():
    pixels, labels = stripes(48, 1).tensors
    broken = TensorDataset(pixels.clone().fill_(math.nan), labels)
    with pytest.raises(DivergedError, match=r"No epoch was finished\.$") as raised:
        fit(model(), broken, None, CONFIG)
    assert raised.value.result.best_epoch is None


def test_the_count_goes_on_after_a_resume(tmp_path, monkeypatch):
    """A start far below every later loss; the training is interrupted between two of them."""
    monkeypatch.setattr("gist.training.divergence.FAR", 0.0)  # every loss is far above 0

    def interrupt(step, loss):
        if step == 14:
            raise KeyboardInterrupt

    config = replace(CONFIG, epochs=9)  # of three steps
    assert train_in(tmp_path, config, images=48, on_step=interrupt).interrupted
    with pytest.raises(DivergedError, match="at step 20 "):
        train_in(tmp_path, config, images=48)


def test_a_state_from_before_this_check_resumes(tmp_path):
    resume_file = ResumeFile(tmp_path / "resume.pt", {})
    short = replace(CONFIG, epochs=2)
    fit(model(), stripes(48, 1), None, replace(short, stop_after=1), resume_file=resume_file)
    state = resume_file.load()
    del state["watch"]
    resume_file.save({k: v for k, v in state.items() if k not in ("format", "identity")})
    resumed = fit(model(), stripes(48, 1), None, short, resume_file=resume_file)
    assert len(resumed.history) == 2
