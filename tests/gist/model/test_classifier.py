"""Backbones that get a new classifier at gist.wrap, or none: features for a head of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
from models import backbone, images, transformers_dinov2
from torch import nn

import gist
import gist_kernels as gk

CONFIG = gist.GistConfig(gist.Adapter(rank=4, scale=0.7), token_dropout=0.0)
TARGET = torch.tensor([1, 4])
BACKBONES = {
    "timm": backbone,
    "averaged": lambda: backbone("average_pooled"),
    "pooled by attention": lambda: backbone("attention_pooled"),
    "transformers": transformers_dinov2,
}


def wrapped_twice(make):
    """The same model with its classifier, and without one; and that classifier."""
    with_head = make()
    without, head = copy.deepcopy(with_head), copy.deepcopy(gist.wrap(make()).family.heads[0])
    models = []
    for model, classes in ((with_head, None), (without, 0)):
        torch.manual_seed(2)
        models.append(gist.wrap(model, CONFIG, num_classes=classes).double().train())
    models[0].family.heads[0].load_state_dict(head.state_dict())
    return *models, models[0].family.heads[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_linear_loss_of_features_is_the_models_loss(name):
    with_head, features, head = wrapped_twice(BACKBONES[name])
    expected = gist.GistLoss()(with_head(images().double()), TARGET)
    expected.backward()
    out = features(images().double())
    assert isinstance(out, gist.GistOutput)
    own = nn.Linear(head.in_features, head.out_features).double()
    own.load_state_dict(head.state_dict())
    weights = gk.HeadWeights(own.weight, own.bias)
    loss = gk.linear_gist_loss(out.cls_logits, out.gist_logits, TARGET, weights)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own.weight.grad, head.weight.grad, rtol=1e-7, atol=1e-9)
    for name, parameter in with_head.method.named_parameters():
        found = features.method.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(features.token.weight.grad, with_head.token.weight.grad)


@pytest.mark.parametrize("name", BACKBONES)
def test_evaluation_gives_the_classifiers_input(name):
    with_head, features, head = wrapped_twice(BACKBONES[name])
    with torch.no_grad():
        found = features.eval()(images().double())
        torch.testing.assert_close(head(found), with_head.eval()(images().double()))
    counted = gist.count_parameters(features)
    assert counted.head == 0
    assert counted[:2] == gist.count_parameters(with_head)[:2]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_new_classifier_for_any_backbone(name):
    bare = BACKBONES[name]()
    gist.unwrap(gist.wrap(bare, CONFIG, num_classes=0))
    with pytest.raises(ValueError, match=r"no linear classifier.*num_classes=N"):
        gist.wrap(bare, CONFIG)
    model = gist.wrap(bare, CONFIG, num_classes=11).train()
    assert [logits.shape for logits in model(images())] == [(2, 11), (2, 11)]
    assert all(p.requires_grad for p in model.family.heads[0].parameters())
    gist.GistLoss()(model(images()), TARGET).backward()
    assert model.family.heads[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("classes", [0, 11])
def test_saved_and_loaded(classes, tmp_path):
    model = gist.wrap(backbone(), CONFIG, num_classes=classes)
    gist.save(model, tmp_path)
    headless = backbone()
    headless.reset_classifier(0)
    for fresh in (backbone(), headless):
        again = gist.load(fresh, tmp_path)
        torch.testing.assert_close(again(images()), model.eval()(images()))


@pytest.mark.parametrize("value", [-1, 2.5, True, "ten"])
def test_a_wrong_number_is_an_error_and_the_backbone_is_left_alone(value):
    model = backbone()
    head = model.head
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 0"):
        gist.wrap(model, CONFIG, num_classes=value)
    assert model.head is head
    assert all(p.requires_grad for p in model.parameters())


def test_a_separate_head_needs_a_classifier():
    with pytest.raises(ValueError, match="separate_head needs a classifier"):
        gist.wrap(backbone(), gist.GistConfig(separate_head=True), num_classes=0)
