"""Fused text encoders, and the same by transformers' own forward."""

from __future__ import annotations

import copy

import torch
from text_models import EAGER_ONLY, made, texts

import gist

TYPED = ("Bert", "Electra")  # whose words have token types
METHODS = {
    "adapter": gist.Adapter(rank=4, scale=0.7),
    "adapter, parallel": gist.Adapter(rank=4, scale=0.7, placement="parallel"),
    "adaptformer": gist.AdaptFormer(rank=4, dropout=0.0),
    "lora": gist.LoRA(rank=2),
    "lora of all": gist.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2")),
    "fact": gist.FacT(rank=3, dropout=0.0),
    "bitfit": gist.BitFit(),
    "norms": gist.LayerNormTuning(),
    "difffit": gist.DiffFit(),
    "token alone": None,
}


def wrapped(kind="Bert", method="adapter", *, num_tokens=1, use_gist=True, **options):
    """A trained-looking model, whose fused sublayers are to be compared with the library's."""
    config = gist.GistConfig(
        METHODS[method] if isinstance(method, str) else method,
        gist=use_gist,
        token_dropout=0.0,
        num_tokens=num_tokens,
    )
    backbone = made(kind, "eager" if kind in EAGER_ONLY else "sdpa", **options)
    torch.manual_seed(2)
    model = gist.wrap(backbone, config).train()
    with torch.no_grad():
        for parameter in model.method.parameters() if model.method is not None else ():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs_of(side, kind="Bert"):
    words = texts(kind, "right")
    if side == "no mask":
        return {"input_ids": words.input_ids}
    if side == "mask of ones":
        return {"input_ids": words.input_ids, "attention_mask": torch.ones_like(words.input_ids)}
    if kind not in TYPED:
        return words._asdict()
    return words._asdict() | {"token_type_ids": (words.input_ids > 30).long()}


def results(model, inputs):
    """Logits, and the gradient of everything that is trained."""
    model.zero_grad()
    out = model(**inputs)
    logits = out if isinstance(out, torch.Tensor) else torch.stack(out)
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def is_fused(model):
    return all(": fused " in line for line in gist.explain(model).splitlines())


def by_library(model, inputs):
    hook = model.family.encoder.register_forward_hook(lambda *_: None)
    assert "carries hooks" in gist.explain(model)
    found = results(model, inputs)
    hook.remove()
    assert is_fused(model)
    return found


def check(model, inputs):
    assert is_fused(model)
    fused = results(model, inputs)
    expected = by_library(model, inputs)
    assert all(g is None or g.abs().max() > 1e-9 for n, g in expected[1].items() if "norm" in n)
    torch.testing.assert_close(fused, expected, rtol=1e-8, atol=1e-8)


def check_halves(model, inputs):
    """Under autocast and in bf16, fused sublayers err as little as the library's own forward."""
    truth, _ = results(copy.deepcopy(model).double(), inputs)

    def errors():
        with torch.autocast("cpu", torch.bfloat16):
            yield (results(model, inputs)[0].double() - truth).norm() / truth.norm()
        half = copy.deepcopy(model)
        half.backbone.bfloat16()
        yield (results(half, inputs)[0].double() - truth).norm() / truth.norm()

    assert is_fused(model)
    fused = list(errors())
    model.family.encoder.register_forward_hook(lambda *_: None)
    for error, theirs in zip(fused, errors(), strict=True):
        assert 1e-4 < error < 2 * theirs
