"""transformers' SigLIP 2, whose images are patches with padding, against its own forward."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from fused_text import by_library, results

import gist

transformers = pytest.importorskip("transformers")

SHAPES = torch.tensor([[3, 4], [2, 3], [1, 5]])
LENGTHS = SHAPES.prod(1)
METHODS = {
    "adapter": gist.Adapter(rank=4, scale=0.7),
    "lora": gist.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2")),
    "biases": (gist.BitFit(), gist.LayerNormTuning()),
    "token alone": None,
}


@functools.cache
def template():
    torch.manual_seed(5)
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 96, "patch_size": 4, "num_patches": 16,
    }  # fmt: skip
    config = transformers.Siglip2Config(vision_config=sizes, num_labels=5)
    model = transformers.Siglip2ForImageClassification(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def backbone():
    return copy.deepcopy(template())


def wrapped(method="adapter", **options):
    torch.manual_seed(6)
    config = gist.GistConfig(METHODS[method], **{"token_dropout": 0.0, **options})
    model = gist.wrap(backbone(), config).double().train()
    with torch.no_grad():
        for parameter in model.method.parameters() if model.method is not None else ():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch():
    count = int(LENGTHS.max())
    patches = torch.randn(3, count, 48, generator=torch.Generator().manual_seed(7)).double()
    mask = (torch.arange(count) < LENGTHS[:, None]).int()
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": SHAPES}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_gist", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_is_transformers_function(method, use_gist, training):
    model, inputs = wrapped(method, gist=use_gist).train(training), batch()
    assert gist.explain(model).startswith("blocks 0 to 1: fused sublayers")
    found, expected = results(model, inputs), by_library(model, inputs)
    assert found[0].shape == ((2,) if use_gist and training else ()) + (3, 5)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_without_method_and_token_the_logits_are_the_backbones():
    model, inputs = wrapped("token alone", gist=False).eval(), batch()
    expected = backbone().eval()(**inputs).logits
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_an_image_is_the_same_alone_and_with_other_padding(num_tokens):
    model, inputs = wrapped(num_tokens=num_tokens), batch()
    expected = torch.stack(model(**inputs))
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][1, LENGTHS[1] :] = 9.0
    torch.testing.assert_close(torch.stack(model(**inputs)), expected, rtol=1e-9, atol=1e-9)
    for row, length in enumerate(LENGTHS):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone["pixel_values"] = alone["pixel_values"][:, :length]
        for mask in (alone["pixel_attention_mask"][:, :length], None):
            alone["pixel_attention_mask"] = mask
            found = torch.stack(model(**alone))[:, 0]
            torch.testing.assert_close(found, expected[:, row], rtol=1e-9, atol=1e-9)


def test_another_mask_runs_by_the_backbones_own_forward(monkeypatch):
    model, inputs = wrapped(), batch()
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].flip(1)
    plan = model._plan_of_call(inputs["pixel_values"], inputs)
    assert "is not 1 for a row's first patches" in plan.refusal.reason
    found, expected = results(model, inputs), by_library(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_saved_loaded_and_merged(tmp_path):
    model, inputs = wrapped("lora"), batch()
    gist.save(model, tmp_path)
    loaded = gist.load(backbone(), tmp_path)
    assert torch.equal(loaded(**inputs), model.eval()(**inputs))
    plain = gist.merge(wrapped("lora", gist=False))
    expected = wrapped("lora", gist=False).eval()(**inputs)
    torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-8, atol=1e-9)


def test_what_does_not_fit_is_refused():
    model, inputs = wrapped(), batch()
    with pytest.raises(TypeError, match="takes pixel_values, pixel_attention_mask and spatial"):
        model(pixel_values=inputs["pixel_values"])
    with pytest.raises(TypeError, match="as its image processor gives them; got .*labels"):
        model(**inputs, labels=torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be \(B, N\)"):
        model(**{**inputs, "pixel_attention_mask": torch.ones(3, 1, 12)})
    with pytest.raises(ValueError, match="pooled by their mask"):
        model.forward_head(model.forward_features(**inputs))
    for method in (gist.VPT(), gist.Convpass(), gist.SSF()):
        with pytest.raises(ValueError, match="no grid of patches"):
            gist.wrap(backbone(), gist.GistConfig(method))
