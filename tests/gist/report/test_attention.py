"""Attention maps: the weights of a step-by-step computation, and models that have none."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, ROTARY, images, made, wrapped

import gist
from gist.report.attention import UnavailableError, attention_maps

METHOD = {"timm Eva": gist.Adapter(), "transformers DINOv3": gist.Adapter()}


def by_hand(model: gist.GistModel, pixels: torch.Tensor) -> torch.Tensor:
    """(B, N, N) weights of timm's last block, the mean over its heads, from its qkv."""
    attention = model.backbone.blocks[-1].attn
    seen = []
    hook = attention.qkv.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model.eval()(pixels)
    hook.remove()
    batch, tokens, width = seen[0].shape
    heads = attention.num_heads
    q, k, _ = seen[0].view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    return (q @ k.mT / (width // 3 // heads) ** 0.5).softmax(-1).mean(1)


@pytest.mark.parametrize("name", ["vit", "registers"])
@pytest.mark.parametrize("method", [gist.LoRA(), gist.VPT(num_tokens=2)])
def test_maps_are_the_weights_of_both_tokens(name, method):
    config = gist.GistConfig(method=method, num_tokens=2)
    model = wrapped(name, config)
    pixels = images()
    weights = by_hand(model, pixels)
    first = 1 + 2 + (4 if name == "registers" else 0)
    found = attention_maps(model, pixels)
    torch.testing.assert_close(found.cls, weights[:, 0, first : first + 16].view(2, 4, 4))
    gist_rows = weights[:, 1:3, first : first + 16].mean(1)
    torch.testing.assert_close(found.gist, gist_rows.view(2, 4, 4))


def kinds(model: gist.GistModel) -> list[tuple[object, object]]:
    """How each module computes attention: timm's flag, transformers' name."""
    return [
        (
            vars(m).get("fused_attn"),
            getattr(getattr(m, "config", None), "_attn_implementation", None),
        )
        for m in model.backbone.modules()
    ]


@pytest.mark.parametrize("family", list(FAMILIES | ROTARY))
def test_every_family_gives_maps_and_stays_as_it_was(family):
    backbone, pixels = made(family)
    model = gist.wrap(backbone, gist.GistConfig(METHOD.get(family, gist.LoRA()))).eval()
    with torch.no_grad():
        before = model(pixels)
    plan, attention = str(gist.explain(model)), kinds(model)
    assert any(kind in (True, "sdpa") for pair in attention for kind in pair)
    found = attention_maps(model, pixels)
    assert (found.cls is None) == (family == "transformers SigLIP")
    for maps in (found.cls, found.gist):
        if maps is not None:
            assert (maps > 0).all()
            assert (maps.sum((1, 2)) < 1).all()
    with torch.no_grad():
        assert model(pixels).equal(before)
    assert (str(gist.explain(model)), kinds(model)) == (plan, attention)


def test_a_model_without_such_tokens_says_so():
    config = gist.GistConfig(gist.LoRA(), gist=False)
    with pytest.raises(UnavailableError, match="pools by 'avg' and has no Gist token"):
        attention_maps(wrapped("average_pooled", config), images())
    assert attention_maps(wrapped("average_pooled"), images()).cls is None
    assert attention_maps(wrapped("vit", config), images()).gist is None
