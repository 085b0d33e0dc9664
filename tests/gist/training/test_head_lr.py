"""The classifier's own learning rate: which parameters get it, and when."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from models import transformers_vit
from training import model, stripes

import gist
from gist.training import loop
from gist.training.config import TrainConfig
from gist.training.loop import fit
from gist.training.optimizer import create_optimizer

CONFIG = TrainConfig(
    epochs=3, batch_size=16, lr=1e-2, head_lr=4e-2, weight_decay=0.1, warmup_epochs=1
)


def with_separate_head():
    return model(config=gist.GistConfig(separate_head=True))


def head_alone():
    return model(config=gist.GistConfig(method=None, gist=False))


def adapted_by_peft():
    peft = pytest.importorskip("peft")
    backbone = transformers_vit()
    layers = [n for n in ("query", "q_proj") if any(n in m for m, _ in backbone.named_modules())]
    settings = peft.LoraConfig(r=2, target_modules=layers, modules_to_save=["classifier"])
    return gist.wrap(peft.get_peft_model(backbone, settings), gist.GistConfig(method=None))


def rates_of(optimizer, trained, field="lr"):
    names = {id(p): name for name, p in trained.named_parameters()}
    return {names[id(p)]: group[field] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("make", [model, with_separate_head, head_alone, adapted_by_peft])
def test_the_classifier_has_its_rate_and_all_keep_their_weight_decay(make):
    trained = make()
    optimizer = create_optimizer(trained, CONFIG)
    found = rates_of(optimizer, trained)
    assert found.keys() == trained.trainable_state_dict().keys()
    assert found == {
        name: 4e-2 if "head" in name or "classifier" in name else 1e-2 for name in found
    }
    if make is not head_alone:
        assert optimizer.param_groups[0]["lr"] == 1e-2  # the rate that is logged
    decay = partial(rates_of, trained=trained, field="weight_decay")
    assert decay(optimizer) == decay(create_optimizer(trained, replace(CONFIG, head_lr=None)))
    assert set(decay(optimizer).values()) == {0.0, 0.1}


def rates_in_training(monkeypatch, **changes):
    """Every step's rates, by the parameter."""
    trained, seen, made = model(), [], []
    config = replace(CONFIG, **changes)
    monkeypatch.setattr(
        loop, "create_optimizer", lambda *given: made.append(create_optimizer(*given)) or made[0]
    )
    fit(
        trained, stripes(50, 1), None, config,
        on_step=lambda *_: seen.append(rates_of(made[0], trained)),
    )  # fmt: skip
    assert len(seen) == 12
    return seen


def test_the_schedule_takes_each_rate_through_warm_up_and_cosine(monkeypatch):
    found = rates_in_training(monkeypatch)
    body = rates_in_training(monkeypatch, head_lr=None)
    head = rates_in_training(monkeypatch, head_lr=None, lr=4e-2)
    assert found == [
        {name: (of_head if "head" in name else of_body)[name] for name in of_body}
        for of_body, of_head in zip(body, head, strict=True)
    ]
    middle = found[6]
    assert middle["backbone.head.weight"] == pytest.approx(4 * middle["token.weight"], rel=1e-4)


def after(**changes):
    trained = model()
    fit(trained, stripes(50, 1), None, replace(CONFIG, warmup_lr=0.0, min_lr=0.0, **changes))
    return trained.trainable_state_dict()


@pytest.mark.parametrize(("lr", "head_lr"), [(1e-2, 0.0), (0.0, 1e-2)])
def test_a_rate_of_zero_trains_nothing(lr, head_lr):
    before = model().trainable_state_dict()
    for name, value in after(lr=lr, head_lr=head_lr).items():
        rate = head_lr if "head" in name else lr
        assert torch.equal(value, before[name]) == (rate == 0), name


def test_a_head_at_the_rate_of_all_trains_as_without_head_lr():
    expected = after(head_lr=None)
    assert all(torch.equal(v, expected[n]) for n, v in after(head_lr=CONFIG.lr).items())


def test_what_has_no_head_to_train_is_refused():
    frozen = model()
    frozen.get_classifier().requires_grad_(False)
    for trained in (frozen, gist.wrap(gist.unwrap(model()), num_classes=0)):
        with pytest.raises(ValueError, match=r"head_lr is 0.04, but the model trains no classif"):
            create_optimizer(trained, CONFIG)


@pytest.mark.parametrize("wrong", [-1e-3, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="head_lr must be a finite number, at least 0; it is"):
        replace(CONFIG, head_lr=wrong)
