"""Modules replaced after wrap: a method that would have no effect raises, by its module's name."""

from __future__ import annotations

import copy

import pytest
import torch
from models import METHOD_CONFIGS, backbone, images, made, wrapped
from torch import nn

import gist
from gist.methods.adapter import Bottleneck
from gist.untouched import written_forward


def replace(model, path, new):
    owner, _, name = path.rpartition(".")
    setattr(model.backbone.get_submodule(owner), name, new)


LOSING = [
    ("adapter", "blocks.0.norm1", nn.LayerNorm(48)),
    ("adapter", "blocks.1.drop_path2", nn.Identity()),
    ("adapter, sequential", "blocks.1.mlp.fc2", nn.Linear(192, 48)),
    ("lora", "blocks.1.attn.qkv", nn.Linear(48, 144)),
    ("repadapter", "blocks.1.norm2", nn.LayerNorm(48)),
    ("convpass", "patch_embed.proj", nn.Conv2d(3, 48, 16, 16)),
    ("difffit", "blocks.0.mlp.fc2", nn.Linear(192, 48)),
    ("ssf", "patch_embed.proj", nn.Conv2d(3, 48, 16, 16)),
    ("fact", "blocks.0.attn.proj", nn.Linear(48, 48)),
    ("none", "norm", nn.LayerNorm(48)),
]


@pytest.mark.parametrize(("method", "path", "new"), LOSING)
def test_a_replaced_module_that_had_a_hook_is_named(method, path, new):
    model = gist.wrap(made("timm ViT-Ti")[0], gist.GistConfig(METHOD_CONFIGS[method]))
    replace(model, path, copy.deepcopy(new))
    said = f"backbone.{path} was replaced, or its hooks were removed"
    calls = [model, model.forward_features, model.forward_intermediates, gist.merge]
    calls.append(torch.compile(model, backend="eager", fullgraph=True))
    for call in calls[: 5 if method == "lora" else 4]:
        with pytest.raises(RuntimeError, match=f"{said}.*replace modules before gist.wrap"):
            call(model if call is gist.merge else images())
    assert gist.explain(model).startswith(
        f"blocks 0 to 1: none, a call raises an error, for {said}"
    )
    gist.wrap(gist.unwrap(model))(images())  # the way out that the message names


def test_removed_hooks_are_named():
    model = wrapped()
    model.backbone.blocks[2].norm2._forward_hooks.clear()
    with pytest.raises(
        RuntimeError, match=r"backbone.blocks.2.norm2 .* Bottleneck.at_norm is lost"
    ):
        model(images())


def test_a_replaced_part_of_the_method_is_named():
    model = wrapped()
    model.method[1] = Bottleneck(gist.Adapter(rank=2), model.family)
    with pytest.raises(
        RuntimeError, match=r"the Bottleneck with the hook on backbone.blocks.1 was"
    ):
        model(images())


@pytest.mark.parametrize("around", [nn.Sequential, copy.deepcopy])
def test_what_keeps_its_hooks_may_be_replaced(around):
    model = wrapped("vit", gist.GistConfig(gist.LoRA(rank=2), token_dropout=0.0)).eval()
    expected = model(images())
    kept = around(model.backbone.blocks[1].attn.qkv)
    if around is copy.deepcopy:  # of all, with the method
        model = around(model)
    else:
        replace(model, "blocks.1.attn.qkv", kept)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)


def test_modules_that_no_hook_is_on_may_be_replaced():
    model = wrapped("vit", gist.GistConfig(gist.LoRA(rank=2), token_dropout=0.0)).eval()
    torch.manual_seed(0)
    replace(model, "blocks.1.norm1", nn.LayerNorm(48, elementwise_affine=False))
    logits = model(images())
    model.backbone.norm.register_forward_hook(lambda *_: None)  # then by the backbone's own forward
    torch.testing.assert_close(model(images()), logits, rtol=1e-4, atol=1e-4)


def test_one_module_in_two_places_is_refused():
    def one_block(vit):
        vit.blocks[2] = vit.blocks[0]

    def one_layer(vit):
        vit.blocks[2].mlp.fc1 = vit.blocks[0].mlp.fc1

    def one_norm(vit):
        vit.blocks[1].norm2 = vit.blocks[1].norm1

    for change, named in (
        (one_block, "block 0 and block 2"),
        (one_layer, "fc1 of block 0 and fc1 of block 2"),
        (one_norm, "norm 1 of block 1 and norm 2 of block 1"),
    ):
        vit = backbone()
        change(vit)
        expected = vit.eval()(images())
        with pytest.raises(ValueError, match=f"one module in two places, {named}; give each its"):
            gist.wrap(vit)
        assert torch.equal(vit(images()), expected)


def test_blocks_called_in_another_order_are_not_fused():
    class Reversed(nn.Sequential):
        def forward(self, x):
            for block in reversed(list(self)):
                x = block(x)
            return x

    model = wrapped("vit", gist.GistConfig(None, gist=False)).eval()
    in_order = model(images())
    model.backbone.blocks = Reversed(*model.backbone.blocks)
    assert "for its blocks are not a plain nn.Sequential" in gist.explain(model)
    torch.testing.assert_close(model(images()), model.backbone(images()))
    assert not torch.allclose(model(images()), in_order, atol=1e-2)


def test_a_forward_replaced_before_gist_is_imported_is_known(monkeypatch):
    class Part(nn.Module):
        def forward(self, x):
            return x

    own = Part.forward
    assert written_forward(Part) is own
    monkeypatch.setattr(Part, "forward", lambda self, x: -x)
    assert written_forward(Part) is None
    monkeypatch.setattr(Part, "forward", nn.Identity.forward)
    assert written_forward(Part) is None
