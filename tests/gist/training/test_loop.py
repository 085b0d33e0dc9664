"""fit and evaluate: they learn, keep the best epoch, repeat exactly, and end cleanly."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from devices import WithoutFloat64
from marks import slow_where
from timm.optim import list_optimizers
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import TensorDataset
from training import model, stripes

import gist
from gist.training import loop
from gist.training.config import TrainConfig
from gist.training.evaluation import evaluate
from gist.training.loop import READ_EVERY, fit
from gist.training.mixup import Mixup

TRAIN, VAL = stripes(50, 1), stripes(31, 2)
CONFIG = TrainConfig(epochs=4, batch_size=16, lr=1e-2, warmup_epochs=0.5)


@pytest.mark.parametrize("use_gist", [True, False])
def test_learns_and_reports_what_it_saw(use_gist):
    m = model(config=gist.GistConfig(gist=use_gist))
    steps, epochs = [], []
    result = fit(
        m, TRAIN, VAL, CONFIG, on_step=lambda *step: steps.append(step), on_epoch=epochs.append
    )
    assert [step for step, _ in steps] == list(range(1, 17))
    sizes = [16, 16, 16, 2]
    first = sum(size * loss for size, (_, loss) in zip(sizes, steps, strict=False)) / 50
    assert epochs[0].train_loss == pytest.approx(first)
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


def test_without_validation_the_last_epoch_is_kept_and_a_schedule_may_end_early():
    high = TrainConfig(epochs=6, batch_size=8, lr=0.3, warmup_epochs=0)
    whole, states = model(), []
    fit(
        whole,
        TRAIN,
        VAL,
        high,
        on_epoch=lambda _: states.append({k: v.clone() for k, v in state_of(whole).items()}),
    )
    for last in (2, 5):
        m = model()
        result = fit(m, TRAIN, None, replace(high, stop_after=last))
        assert result.best_epoch == len(result.history) == last
        assert {(e.val_accuracy, e.val_loss) for e in result.history} == {(None, None)}
        assert all(torch.equal(value, states[last - 1][k]) for k, value in state_of(m).items())
    for wrong in (-1, 7):
        with pytest.raises(ValueError, match=f"stop_after must be from 0 to epochs, 6; .* {wrong}"):
            replace(high, stop_after=wrong)


def state_of(m):
    return m.trainable_state_dict()


def test_equal_seeds_give_equal_bits_and_others_do_not():
    def trained(seed):
        m = model()
        fit(m, TRAIN, VAL, TrainConfig(epochs=2, batch_size=16, seed=seed))
        return m.trainable_state_dict()

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_loader_processes_change_nothing():
    def trained(workers):
        m = model()
        fit(m, TRAIN, VAL, replace(CONFIG, epochs=2), workers=workers)
        return m.trainable_state_dict()

    alone, loaded = trained(0), trained(2)
    assert all(torch.equal(alone[k], loaded[k]) for k in alone)


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


def test_a_bf16_epoch_converts_each_frozen_weight_once():
    m = model()
    frozen = m.backbone.blocks[0].mlp.fc1.weight
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        fit(m, TRAIN, VAL, TrainConfig(epochs=1, batch_size=16, lr=1e-2, precision="bf16"))
    found = [
        e for e in trace.events()
        if e.name == "aten::_to_copy" and e.input_shapes[0] == list(frozen.shape)
    ]  # fmt: skip
    assert len(found) == len(m.backbone.blocks)


def test_tf32_is_a_gpus():
    with pytest.raises(ValueError, match="tf32 needs a model on a CUDA device; it is on cpu"):
        fit(model(), TRAIN, VAL, replace(CONFIG, precision="tf32"))


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "highest"), ("tf32", "high")])
def test_precision_of_matmuls_ends_with_the_training(precision, expected):
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    found = []

    def stopped():
        with loop._matmuls(precision):
            found.append(torch.get_float32_matmul_precision())
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert found == [expected]
    assert torch.get_float32_matmul_precision() == before


def test_ema_averages_the_trainables_and_is_what_is_kept():
    m, config = model(), replace(CONFIG, ema=0.8)
    averages = {name: p.clone().double() for name, p in m.trainable_state_dict().items()}
    at_epochs, raw = [], []

    def on_step(step, loss):
        for name, p in m.trainable_state_dict().items():
            averages[name] = 0.8 * averages[name] + 0.2 * p
        raw.append(loss)

    def on_epoch(epoch):
        at_epochs.append({name: average.clone() for name, average in averages.items()})

    result = fit(m, TRAIN, VAL, config, on_step=on_step, on_epoch=on_epoch)
    for name, p in m.trainable_state_dict().items():
        torch.testing.assert_close(p.double(), at_epochs[result.best_epoch - 1][name])
    best = result.history[result.best_epoch - 1]
    measured = evaluate(m, VAL, batch_size=16)
    assert (measured.accuracy, measured.loss) == (best.val_accuracy, best.val_loss)
    without: list[float] = []
    fit(model(), TRAIN, VAL, CONFIG, on_step=lambda step, loss: without.append(loss))
    assert raw == without  # averaging changes nothing of the course


def test_gradients_are_clipped_by_their_common_norm():
    def norms(clip):
        m, found = model(), []

        def on_step(step, loss):
            grads = [p.grad for p in m.parameters() if p.grad is not None]
            found.append(torch.stack([g.norm() for g in grads]).norm().item())

        fit(m, TRAIN, VAL, replace(CONFIG, epochs=1, clip_grad_norm=clip), on_step=on_step)
        return found

    free, clipped = norms(0.0), norms(0.05)
    assert min(free) > 0.1
    assert clipped == pytest.approx([0.05] * 4, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    slow_where(
        lambda name: name not in ("adamw", "sgd", "lion", "adahessian", "fusedsgd"),
        [str(name) for name in list_optimizers()],
    ),
)
def test_every_optimizer_trains_or_is_refused_by_name(name):
    """Those that need a GPU, Apex or bitsandbytes, or second derivatives, before a step is made."""
    m, steps = model(), []
    before = torch.cat([p.detach().flatten() for p in m.parameters() if p.requires_grad])
    try:
        config = TrainConfig(epochs=2, batch_size=3, warmup_epochs=0, optimizer=name)
        fit(m, stripes(3, seed=0), None, config, on_step=lambda step, _: steps.append(step))
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
        assert name == "adahessian" or name.startswith(("bnb", "fused"))
        assert steps == []
        return
    after = torch.cat([p.detach().flatten() for p in m.parameters() if p.requires_grad])
    assert steps == [1, 2]  # ADOPT learns from the first one only
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_the_optimizer_is_timms_of_that_name():
    m = model()
    before = m.trainable_state_dict()
    before = {name: p.clone() for name, p in before.items()}
    config = TrainConfig(
        epochs=1, batch_size=50, lr=1e-3, weight_decay=0.0, warmup_epochs=0, optimizer="lion"
    )
    fit(m, TRAIN, VAL, config)
    for name, p in m.trainable_state_dict().items():  # Lion's first step: the gradient's sign
        change = (p - before[name]).abs()
        assert ((change - 1e-3).abs() < 1e-6)[change > 0].all()
        assert (change > 0).any()


@pytest.mark.parametrize("use_gist", [True, False])
def test_labels_are_smoothed(use_gist):
    config = gist.GistConfig(gist=use_gist, token_dropout=0.0)
    losses = []
    fit(
        model(config=config), TRAIN, VAL,
        TrainConfig(epochs=1, batch_size=50, label_smoothing=0.3),
        on_step=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    pixels, labels = TRAIN.tensors
    expected = gist.GistLoss(label_smoothing=0.3)(model(config=config)(pixels), labels)
    assert losses == pytest.approx([expected.item()], rel=1e-5)
    with pytest.raises(ValueError, match="label_smoothing is the default loss's"):
        fit(model(), TRAIN, VAL, TrainConfig(label_smoothing=0.3), loss=gist.GistLoss())


@pytest.mark.parametrize("images", [1, 7, 8])
@pytest.mark.parametrize("alphas", [(0.7, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_mixed_targets_are_the_shares_of_mixed_images(images, alphas):
    np.random.seed(1)
    classes = torch.arange(images) % 5
    mixing, mixed = Mixup(*alphas, num_classes=5), 0
    for _ in range(8):
        constant = classes.float()[:, None, None, None].expand(-1, 3, 12, 12).clone()
        pixels, target = mixing(constant, classes)
        assert target.shape == (images, 5)
        torch.testing.assert_close(target.sum(1), torch.ones(images))
        shares = (target * torch.arange(5)).sum(1)
        torch.testing.assert_close(pixels.mean((1, 2, 3)), shares)
        mixed += int((target.max(1).values < 0.99).sum())
        if images % 2:
            assert target[-1].max() == 1
    assert (mixed > 0) == (images > 1)


def test_the_interaction_may_grow_over_the_first_epochs():
    loss, scales = gist.GistLoss(), []
    config = replace(CONFIG, kl_warmup_epochs=1.5)
    fit(model(), TRAIN, VAL, config, loss=loss, on_step=lambda *_: scales.append(loss.kl_scale))
    assert scales == pytest.approx([min(1, step / 6) for step in range(1, 17)])
    out = gist.GistOutput(torch.randn(3, 4), torch.randn(3, 4))
    target, loss.kl_scale = torch.tensor([0, 1, 2]), 0.5
    torch.testing.assert_close(
        loss(out, target), gist.GistLoss(kl_weights=(0.375, 0.375))(out, target)
    )


def test_mixing_trains():
    m = model()
    fit(m, TRAIN, VAL, replace(CONFIG, mixup=0.3, cutmix=0.5))  # its last batch is of two
    assert evaluate(m, VAL).accuracy > 0.9


def test_late_looks_at_the_loss_change_nothing(monkeypatch):
    def course():
        steps = []
        m = model()
        result = fit(m, TRAIN, VAL, CONFIG, on_step=lambda *step: steps.append(step))
        return (
            steps,
            [e.train_loss for e in result.history],
            m.trainable_state_dict()["token.weight"],
        )

    steps, losses, token = course()
    monkeypatch.setitem(READ_EVERY, "cpu", 3)
    late_steps, late_losses, late_token = course()
    assert (steps, losses) == (late_steps, late_losses)
    assert torch.equal(token, late_token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"precision": "fp8"}, "precision must be one of fp32, tf32, bf16"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm must be"),
        ({"mixup": math.inf}, "mixup must be a finite number"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"label_smoothing": math.nan}, r"label_smoothing must be in \[0, 1\)"),
        ({"optimizer": "adamv"}, "optimizer: 'adamv' is not known; did you mean"),
        ({"optimizer": "adahessian"}, "adahessian is a second-order one.* such as adamw"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_training_and_evaluation_make_no_float64():
    config = replace(CONFIG, epochs=1, mixup=0.2, cutmix=0.5, ema=0.9, clip_grad_norm=1.0)
    expected = fit(model(), TRAIN, VAL, config).history
    with WithoutFloat64():
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1).double()
        found = fit(model(), TRAIN, VAL, config).history
    # A dispatch mode is served by the reference, whose rounding differs.
    assert found[0].val_loss == pytest.approx(expected[0].val_loss, rel=1e-3)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="no items to evaluate"):
        evaluate(model(), TensorDataset(torch.empty(0, 3, 16, 16), torch.empty(0).long()))


def test_the_earlier_places_have_the_same_names():
    from gist import evaluation, train

    assert train.fit is fit
    assert train.TrainConfig is TrainConfig
    assert evaluation.evaluate is evaluate
