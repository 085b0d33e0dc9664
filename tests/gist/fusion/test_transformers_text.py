"""Fused DistilBERT, MPNet and ModernBERT against transformers' own forward, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused_text import (
    METHODS,
    by_library,
    check,
    check_halves,
    inputs_of,
    is_fused,
    results,
    wrapped,
)
from text_models import made, texts

import gist

pytest.importorskip("transformers")

KINDS = {
    "DistilBert": ("DistilBert", {}),
    "MPNet": ("MPNet", {}),
    "ModernBert": ("ModernBert", {}),  # whose texts are longer than its window
    "ModernBert, wide": ("ModernBert", {"local_attention": 64}),
}
GATED = gist.LoRA(rank=2, targets=("k", "proj", "up", "down"))


@pytest.fixture(autouse=True)
def rotate_in_float64(monkeypatch):
    """transformers' ModernBERT rotates in float32, whatever the dtype of the model."""
    from transformers.models.modernbert import modeling_modernbert as modernbert

    def rotated(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(part * cos + modernbert.rotate_half(part) * sin for part in (q, k))

    monkeypatch.setattr(modernbert, "apply_rotary_pos_emb", rotated)


def model_of(name, method="adapter", **options):
    kind, config = KINDS[name]
    return wrapped(kind, method, **config, **options)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("side", ["right", "no mask", "mask of ones"])
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradients_of_every_kind(name, side, train):
    check(model_of(name).double().train(train), inputs_of(side, KINDS[name][0]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradients_of_every_method(name, method):
    modern = name.startswith("ModernBert")
    if modern and method == "lora of all":
        method = GATED
    if modern and method == "bitfit":
        with pytest.raises(ValueError, match="nothing to train"):
            model_of(name, method)
        return
    check(model_of(name, method).double(), inputs_of("right", KINDS[name][0]))


@pytest.mark.parametrize("name", KINDS)
def test_several_tokens_and_none(name):
    inputs = inputs_of("right", KINDS[name][0])
    check(model_of(name, num_tokens=3).double(), inputs)
    check(model_of(name, "lora", use_gist=False).double(), inputs)


@pytest.mark.parametrize("name", KINDS)
def test_features_of_words_are_those_of_transformers(name):
    model, inputs = model_of(name).double().eval(), inputs_of("right", KINDS[name][0])
    fused = model.forward_features(**inputs)
    assert fused.isfinite().all()  # padding out of every word's sight, too
    hook = model.family.encoder.register_forward_hook(lambda *_: None)
    expected = model.forward_features(**inputs)
    hook.remove()
    words = F.pad(inputs["attention_mask"], (1, 0), value=1).bool()
    torch.testing.assert_close(fused[words], expected[words], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", KINDS)
def test_each_block_takes_the_attention_it_should(name, monkeypatch):
    from gist.fusion import block

    calls, run = [], block.run

    def noted(*args, **options):
        calls.append((options["scores"] is None, options["lengths"] is None))
        return run(*args, **options)

    monkeypatch.setattr(block, "run", noted)
    model, inputs = model_of(name), inputs_of("right", KINDS[name][0])
    model(**inputs)
    fused = {"MPNet": [False, False], "ModernBert": [True, False]}.get(name, [True, True])
    assert calls == [(each, name == "MPNet") for each in fused]
    by_library(model, inputs)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["DistilBert", "MPNet", "ModernBert"])
def test_autocast_and_half_models_are_near_to_float64(name):
    model, inputs = model_of(name), inputs_of("right", KINDS[name][0])
    check_halves(model, inputs)


def test_mpnet_stays_fused_with_any_mask():
    holes = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 1, 1]] * 3)
    check(wrapped("MPNet").double(), {**inputs_of("no mask", "MPNet"), "attention_mask": holes})


def test_one_word_has_no_position_to_turn():
    model = wrapped("ModernBert").double()
    check(model, {"input_ids": torch.tensor([[7], [9]])})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DistilBert", "MPNet", "ModernBert"])
def test_compiled_logits_and_gradients_are_those_of_eager_mode(name):
    model = model_of(name).double()
    torch._dynamo.reset()
    for width in (9, 8):  # the second compiles for any length
        inputs = inputs_of("right", KINDS[name][0])
        inputs = {name: value[:, :width] for name, value in inputs.items()}
        expected = results(model, inputs)
        model.compile(fullgraph=True, backend="aot_eager")
        found = results(model, inputs)
        model._compiled_call_impl = None
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# ---- what is said ------------------------------------------------------------------------------


def test_explain_says_which_attention_runs():
    assert gist.explain(wrapped("MPNet")) == (
        "blocks 0 to 1: fused MLP, served by 'cpu', attention by PyTorch's, "
        "for its scores have a bias"
    )
    assert gist.explain(wrapped("ModernBert")).splitlines() == [
        "block 0: fused sublayers, served by 'cpu'",
        "block 1: fused sublayers, served by 'cpu', attention by PyTorch's, beyond 5 tokens",
    ]


def test_a_position_of_modernbert_runs_by_the_library(monkeypatch):
    from gist.fusion import block

    monkeypatch.setattr(block, "run", None)
    words = texts("ModernBert", "none").input_ids
    positions = torch.arange(9)[None] + 5
    assert wrapped("ModernBert")(words, position_ids=positions).cls_logits.isfinite().all()


def set_dropout(path):
    return lambda model: setattr(model.family.blocks[1].get_submodule(path), "p", 0.1)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("DistilBert", set_dropout("attention.dropout"), "its attention has dropout"),
        ("DistilBert", set_dropout("ffn.dropout"), "its block has dropout"),
        ("MPNet", set_dropout("attention.attn.dropout"), "its attention has dropout"),
        ("MPNet", set_dropout("attention.dropout"), "its block has dropout"),
        ("MPNet", set_dropout("output.dropout"), "its block has dropout"),
        ("ModernBert", set_dropout("mlp.drop"), "its block has dropout"),
        (
            "ModernBert",
            lambda model: setattr(model.family.blocks[0].attn, "attention_dropout", 0.1),
            "block 0 can't be fused: its attention has dropout",
        ),
        (
            "DistilBert",
            lambda model: setattr(model.family.encoder.transformer, "forward", lambda *_: None),
            "the forward of its Transformer was replaced",
        ),
    ],
)
def test_a_model_that_does_not_match_says_why(kind, change, reason):
    model = wrapped(kind)
    assert is_fused(model)
    change(model)
    assert reason in gist.explain(model)
    assert not is_fused(model)


def test_a_mean_over_the_words_runs_by_the_library():
    model = gist.wrap(made("ModernBert, mean", "sdpa"), gist.GistConfig(gist.LoRA(rank=2)))
    assert "it pools the mean of its words" in gist.explain(model)


def test_scaled_rotary_positions_run_by_the_library():
    model = wrapped("ModernBert")
    model.family.encoder.rotary_emb.rope_type["full_attention"] = "yarn"
    assert "its rotary positions are scaled" in gist.explain(model)
