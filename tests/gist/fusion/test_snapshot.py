"""A plan is made once for each state of a model, and again after whatever may change it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from models import backbone, images, wrapped
from torch import nn

import gist

CHANGES = {
    "training mode": lambda model: model.train(not model.training),
    "a part's training mode": lambda model: model.backbone.blocks[1].attn.attn_drop.train(),
    "a hook": lambda model: model.backbone.blocks[0].mlp.register_forward_hook(print),
    "a pre-hook": lambda model: model.backbone.norm.register_forward_pre_hook(print),
    "a backward hook": lambda model: model.backbone.head.register_full_backward_hook(print),
    "a forward": lambda model: setattr(model.backbone.blocks[0].attn, "forward", print),
    "a part": lambda model: setattr(model.backbone.blocks[0].mlp, "drop1", nn.Identity()),
    "a further part": lambda model: model.backbone.blocks[2].add_module("more", nn.Identity()),
    "a parameter": lambda model: setattr(
        model.backbone.blocks[0].mlp.fc1, "weight", nn.Parameter(torch.ones(192, 48))
    ),
    "no bias": lambda model: setattr(model.backbone.blocks[0].mlp.fc1, "bias", None),
    "a flag": lambda model: model.backbone.pos_embed.requires_grad_(True),
    "a number": lambda model: setattr(model.backbone.blocks[1].norm2, "eps", 1e-3),
    "a dtype": lambda model: model.backbone.blocks[0].double(),
    "a device": lambda model: model.to("meta"),
    "a class": lambda model: torch.utils.swap_tensors(
        model.backbone.blocks[0].mlp.fc1.weight,
        nn.Parameter(torch.ones(192, 48).as_subclass(type("Other", (torch.Tensor,), {}))),
    ),
    "a method's parameter": lambda model: setattr(
        model.method[0].up, "weight", nn.Parameter(torch.ones(48, 4))
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_another_plan(change):
    model = wrapped().eval()
    before = model.plan()
    assert model.plan() is before
    CHANGES[change](model)
    after = model.plan()
    assert after is not before
    assert model.plan() is after


def test_values_make_no_other_plan():
    model = wrapped().train()
    model(images())
    before = model.plan()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
            parameter.data = parameter.data.clone()
    model(images()).cls_logits.sum().backward()
    assert model.plan() is before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [gist.Adapter(), gist.BitFit(), gist.LoRA(), gist.SSF()])
@pytest.mark.parametrize("written", ["in place", "in data", "as data"])
def test_a_kept_plan_reads_what_was_written_since(method, dtype, written):
    model = gist.wrap(backbone().to(dtype), gist.GistConfig(method=method)).eval()
    batch = images().to(dtype)
    before, kept = model(batch), model.plan()
    for parameter in model.parameters():
        if written == "in place":
            with torch.no_grad():
                parameter.mul_(1.25)
        elif written == "in data":
            parameter.data.mul_(1.25)
        else:
            parameter.data = 1.25 * parameter.data
    found = model(batch)
    assert model.plan() is kept
    assert torch.equal(found, copy.deepcopy(model)(batch))  # by a plan of its own
    assert not torch.equal(found, before)


def test_a_kept_plan_reads_a_buffer_set_since():
    model = wrapped("eva02").eval()
    model(images())
    attn = model.backbone.blocks[0].attn
    attn.k_bias = torch.linspace(-3, 3, len(attn.k_bias))
    assert torch.equal(model(images()), copy.deepcopy(model)(images()))


def test_a_class_patched_after_a_call_makes_another_plan(monkeypatch):
    model = wrapped().eval()
    before = model.plan()
    kind = type(model.backbone.blocks[0].attn)
    monkeypatch.setattr(kind, "forward", kind.forward.__get__)
    assert model.plan() is not before


def test_a_copy_plans_with_its_own_weights():
    model = wrapped().eval()
    expected = model(images())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(images()), expected)


def test_replaced_weights_are_kept_no_longer_than_until_the_next_call():
    model = wrapped().eval()
    model(images())
    layer = model.backbone.blocks[0].mlp.fc1
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    model(images())
    gc.collect()
    assert old() is None
