"""Fused sublayers of BERT and its kin against transformers' own forward, in float64."""

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
from text_models import texts

import gist

pytest.importorskip("transformers")

KINDS = ("Bert", "Roberta", "XLMRoberta", "Electra")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("side", ["right", "no mask", "mask of ones"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_of_every_kind(kind, side, train):
    check(wrapped(kind).double().train(train), inputs_of(side))


@pytest.mark.parametrize("method", METHODS)
def test_logits_and_gradients_of_every_method(method):
    check(wrapped("Bert", method).double(), inputs_of("right"))


@pytest.mark.parametrize("kind", ["Bert", "Electra"])
def test_several_tokens_and_none(kind):
    check(wrapped(kind, num_tokens=3).double(), inputs_of("right"))
    check(wrapped(kind, "lora", use_gist=False).double(), inputs_of("right"))


def test_fused_calls_are_made(monkeypatch):
    """That the comparisons above are of two paths."""
    from gist.fusion import block

    calls = []
    run = block.run
    monkeypatch.setattr(
        block, "run",
        lambda *args, **options: (calls.append(options["lengths"]), run(*args, **options))[1],
    )  # fmt: skip
    model = wrapped()
    model(**inputs_of("right"))
    assert [lengths.tolist() for lengths in calls] == 2 * [[10, 8, 5]]
    by_library(model, inputs_of("right"))
    assert len(calls) == 2
    model(**inputs_of("no mask"))
    assert calls[2:] == [None, None]


def test_dropout_of_embeddings_and_classifier_draws_what_the_library_draws():
    model = wrapped("Bert", "lora", use_gist=False).double()
    model.backbone.bert.embeddings.dropout.p = 0.3
    model.backbone.dropout.p = 0.3
    torch.manual_seed(5)
    fused = results(model, inputs_of("right"))
    torch.manual_seed(5)
    torch.testing.assert_close(fused, by_library(model, inputs_of("right")), rtol=1e-8, atol=1e-8)


def test_features_of_words_are_those_of_transformers():
    model = wrapped().double().eval()
    inputs = inputs_of("right")
    fused = model.forward_features(**inputs)
    hook = model.family.encoder.register_forward_hook(lambda *_: None)
    expected = model.forward_features(**inputs)
    hook.remove()
    words = F.pad(inputs["attention_mask"], (1, 0), value=1).bool()
    torch.testing.assert_close(fused[words], expected[words], rtol=1e-8, atol=1e-8)


def test_checkpointed_blocks_stay_fused():
    model = wrapped("Roberta", "lora").double()
    expected = results(model, inputs_of("right"))
    for block in model.family.blocks:
        block.gradient_checkpointing = True
    assert is_fused(model)
    torch.testing.assert_close(results(model, inputs_of("right")), expected, rtol=1e-9, atol=1e-9)
    model.set_grad_checkpointing()  # by transformers, which puts a hook on the embedding
    assert "carries hooks that are not gist's outside of its blocks" in gist.explain(model)
    torch.testing.assert_close(results(model, inputs_of("right")), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["adapter", "norms"])
def test_autocast_and_half_models_are_near_to_float64(method):
    model = wrapped("Bert", method)
    inputs = inputs_of("right")
    check_halves(model, inputs)


def test_compiled_calls_are_fused_with_a_mask_and_without():
    model = wrapped("Bert", "lora")
    names = []

    def note(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=note)
    for side in ("no mask", "right"):
        names.clear()
        inputs = inputs_of(side)
        torch.testing.assert_close(tuple(compiled(**inputs)), tuple(model(**inputs)))
        assert sum("_adapter_attention" in name or "_adapter_mlp" in name for name in names) == 4
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, 3] = 0
    with pytest.raises(ValueError, match="row 1 differs. Pad on the right"):
        compiled(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "train"), [("Bert", True), ("Electra", False)])
def test_compiled_logits_and_gradients_are_those_of_eager_mode(kind, train):
    model = wrapped(kind).double().train(train)
    torch._dynamo.reset()
    for width in (9, 8):  # the second compiles for any length
        inputs = {name: value[:, :width] for name, value in inputs_of("right").items()}
        expected = results(model, inputs)
        model.compile(fullgraph=True, backend="aot_eager")
        found = results(model, inputs)
        model._compiled_call_impl = None
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# ---- what is not fused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 1, 1, 1, 1, 1, 1, 1, 1]] * 3,
        [[1, 1, 1, 0, 1, 1, 1, 1, 1]] * 3,
        [[1] * 9, [1] * 9, [0] + [1] * 8],
    ],
)
def test_other_masks_run_by_the_library(mask, monkeypatch):
    from gist.fusion import block

    monkeypatch.setattr(block, "run", None)
    model = wrapped()
    out = model(texts("Bert", "none").input_ids, attention_mask=torch.tensor(mask))
    assert all(logits.isfinite().all() for logits in out)


@pytest.mark.parametrize("shape", [(3, 12), (3, 5), (1, 9), (4, 9)])
def test_a_mask_of_another_shape_reaches_no_kernel(shape, monkeypatch):
    from gist.fusion import block

    monkeypatch.setattr(block, "run", None)
    words, mask = texts("Bert", "none").input_ids, torch.ones(shape, dtype=torch.long)
    model = wrapped().eval()
    try:
        out = model(words, attention_mask=mask)
    except (RuntimeError, ValueError):
        return  # as transformers says
    assert out.isfinite().all()


def test_outputs_that_are_asked_for_run_by_the_library(monkeypatch):
    from gist.fusion import block

    monkeypatch.setattr(block, "run", None)
    model = wrapped()
    assert model(texts("Bert", "none").input_ids, output_attentions=True).cls_logits.shape == (3, 5)


def change_config(name, value):
    return lambda model: setattr(model.backbone.config, name, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_config("_attn_implementation", "flex_attention"), "is 'flex_attention'"),
        (change_config("output_hidden_states", True), "asks for attentions or hidden states"),
        (
            lambda model: setattr(model.family.blocks[1].output.dropout, "p", 0.1),
            "block 1 can't be fused: its block has dropout",
        ),
        (
            lambda model: setattr(model.family.blocks[0].attention.self.dropout, "p", 0.1),
            "block 0 can't be fused: its attention has dropout",
        ),
        (
            lambda model: setattr(
                model.family.blocks[0].intermediate, "intermediate_act_fn", torch.nn.Tanh()
            ),
            "its MLP's activation is a Tanh",
        ),
        (
            lambda model: model.family.blocks[0].register_forward_hook(lambda *_: None),
            "block 0 can't be fused: it carries hooks that are not gist's",
        ),
        (
            lambda model: setattr(model.family.blocks[0], "forward", lambda *_: None),
            "block 0 can't be fused: its BertLayer has a forward of its own",
        ),
        (
            lambda model: setattr(model.family.encoder, "forward", lambda *_: None),
            "the forward of its BertModel was replaced",
        ),
    ],
)
def test_a_model_that_does_not_match_says_why(change, reason):
    model = wrapped()
    assert is_fused(model)
    change(model)
    said = gist.explain(model)
    assert "the backbone's own forward, for " in said
    assert reason in said
