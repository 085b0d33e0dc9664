"""transformers' text classifiers: where the Gist token stands, and what reads it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from text_models import DECODERS, ENCODERS, IMPLEMENTATIONS, KINDS, made, texts

import gist

TARGET = torch.tensor([1, 4, 0])
CONFIG = gist.GistConfig(gist.Adapter(rank=3, scale=0.5), token_dropout=0.0)
ONLY_TOKEN = gist.GistConfig(None, token_dropout=0.0)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_encoder = pytest.mark.parametrize("kind", ENCODERS)
every_decoder = pytest.mark.parametrize("kind", DECODERS)
every_implementation = pytest.mark.parametrize(("kind", "attention"), IMPLEMENTATIONS)


def wrapped(kind, attention="eager", config=CONFIG, **options):
    return gist.wrap(made(kind, attention, **options), config).train()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# ---- the sequence with the token, written out ---------------------------------------------------


def embedded(model, kind, ids):
    base = model.base_model
    if kind in DECODERS:
        return base.embed_tokens(ids)
    x = base.embeddings(input_ids=ids)
    return base.embeddings_project(x) if kind == "Electra" else x


def encoded(model, kind, x, positions):
    """What leaves the last block, of embedded tokens that all see each other."""
    base = model.base_model
    if kind == "DistilBert":
        return base.transformer(x, attention_mask=None).last_hidden_state
    if kind == "MPNet":
        encoder, distance = base.encoder, positions - positions.T
        bias = encoder.relative_attention_bias(encoder.relative_position_bucket(distance))
        for layer in encoder.layer:
            x = layer(x, None, bias.permute(2, 0, 1)[None])[0]
        return x
    if kind.startswith("ModernBert"):
        index = torch.arange(x.shape[1])
        near = (index[:, None] - index).abs() <= model.config.local_attention // 2
        windows = {"full_attention": None, "sliding_attention": near.log()[None, None]}
        for layer in base.layers:
            name = layer.attention_type
            rotation = base.rotary_emb(x, positions, name)
            x = layer(x, attention_mask=windows[name], position_embeddings=rotation)
        return base.final_norm(x)
    return base.encoder(x).last_hidden_state


def classified(model, kind, pooled):
    if kind in DECODERS:
        return pooled @ model.score.weight.T
    if kind == "Bert":
        return model.classifier(torch.tanh(model.bert.pooler.dense(pooled)))
    if kind == "DistilBert":
        return model.classifier(model.pre_classifier(pooled).clamp(min=0))
    if kind.startswith("ModernBert"):
        return model.classifier(model.head(pooled))
    activation = F.gelu if kind == "Electra" else torch.tanh
    return model.classifier.out_proj(activation(model.classifier.dense(pooled)))


def expected_logits(model, kind, ids, gist_tokens):
    """Both logits of one text without padding."""
    x, count = embedded(model, kind, ids), gist_tokens.shape[1]
    if kind in DECODERS:
        out = model.base_model(inputs_embeds=torch.cat((x, gist_tokens), 1), use_cache=False)[0]
        pooled, token = out[:, -1 - count], out[:, -count:].mean(1)
    else:
        positions = torch.tensor([0] * (count + 1) + list(range(1, ids.shape[1])))[None]
        out = encoded(model, kind, torch.cat((x[:, :1], gist_tokens, x[:, 1:]), 1), positions)
        words = torch.cat((out[:, :1], out[:, 1 + count :]), 1)
        pooled = words.mean(1) if kind.endswith("mean") else out[:, 0]
        token = out[:, 1 : 1 + count].mean(1)
    return classified(model, kind, pooled), classified(model, kind, token)


@every_kind
@pytest.mark.parametrize("count", [1, 3])
def test_both_logits_are_those_of_the_sequence_with_the_tokens(kind, count):
    config = gist.GistConfig(None, token_dropout=0.0, num_tokens=count)
    model, plain, text = wrapped(kind, config=config), made(kind), texts(kind).alone(1)
    out = model(**text)
    cls_logits, gist_logits = expected_logits(plain, kind, text["input_ids"], model.token.weight)
    close(out.cls_logits, cls_logits)
    close(out.gist_logits, gist_logits)
    assert (out.cls_logits - out.gist_logits).abs().max() > 1e-2


# ---- padding, masks, positions ------------------------------------------------------------------

PADDED = [
    (kind, attention, side)
    for kind, attention in IMPLEMENTATIONS
    for side in (("right", "left") if kind in DECODERS else ("right",))
]


@pytest.mark.parametrize(("kind", "attention", "side"), PADDED)
def test_a_padded_text_has_the_logits_that_it_has_alone(kind, attention, side):
    config = gist.GistConfig(CONFIG.method, token_dropout=0.0, num_tokens=2)
    model, batch = wrapped(kind, attention, config), texts(kind, side)
    out = model(**batch._asdict())
    for row in range(3):
        alone = model(**batch.alone(row))
        for together, single in zip(out, alone, strict=True):
            close(together[row : row + 1], single)
    assert (out.gist_logits[0] - out.gist_logits[1]).abs().max() > 1e-2


@every_implementation
def test_a_mask_of_ones_is_as_none(kind, attention):
    model, batch = wrapped(kind, attention), texts(kind, "none")
    for masked, unmasked in zip(model(**batch._asdict()), model(batch.input_ids), strict=True):
        close(masked, unmasked)


@every_decoder
def test_padding_on_the_right_needs_no_mask(kind):
    """Words don't see what comes after them, and the classifier finds padding by its id."""
    model, batch = wrapped(kind, "eager"), texts(kind)
    for masked, unmasked in zip(model(**batch._asdict()), model(batch.input_ids), strict=True):
        close(masked, unmasked)


@every_decoder
@pytest.mark.parametrize("side", ["right", "left"])
def test_explicit_positions_are_extended(kind, side):
    model, batch = wrapped(kind), texts(kind, side)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    out = model(**batch._asdict(), position_ids=positions)
    for given, default in zip(out, model(**batch._asdict()), strict=True):
        close(given, default)
    with pytest.raises(ValueError, match="position_ids need attention_mask beside them"):
        model(batch.input_ids, position_ids=positions)


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_ids_may_be_int32_and_masks_bool(kind):
    model, (ids, mask) = wrapped(kind), texts(kind)
    for given, default in zip(model(ids.int(), attention_mask=mask.bool()),
                              model(ids, attention_mask=mask), strict=True):  # fmt: skip
        assert torch.equal(given, default)


@pytest.mark.parametrize("kind", ["ModernBert", "Bert"])
def test_explicit_positions_of_an_encoder_are_the_words(kind):
    model, batch = wrapped(kind), texts(kind)
    positions = torch.arange(9)[None]
    for mask in (batch.attention_mask, None):
        out = model(batch.input_ids, attention_mask=mask, position_ids=positions)
        for given, default in zip(out, model(batch.input_ids, attention_mask=mask), strict=True):
            close(given, default)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
def test_the_token_follows_what_the_classifier_reads(kind):
    """A text that ends with the token of padding, which the classifier skips, is cut before it."""
    model = wrapped(kind)
    ids = texts(kind).input_ids[:1].clone()
    ids[0, -2:] = 0
    out, cut = model(ids, attention_mask=torch.ones_like(ids)), model(ids[:, :-2])
    close(out.gist_logits, cut.gist_logits)
    close(out.cls_logits, cut.cls_logits)
    without_padding = wrapped(kind, config=ONLY_TOKEN, pad_token_id=None)
    token = without_padding.token.weight
    expected = expected_logits(made(kind, pad_token_id=None), kind, ids, token)
    close(torch.stack(without_padding(ids)), torch.stack(expected))


# ---- the plain model ----------------------------------------------------------------------------


@every_implementation
def test_without_token_the_logits_are_the_models_own(kind, attention):
    config = gist.GistConfig(None, gist=False)
    for side in ("right", "left", "none"):
        plain, batch = made(kind, attention), texts(kind, side)
        expected = plain(**batch._asdict()).logits
        model = gist.wrap(plain, config).eval()
        close(model(**batch._asdict()), expected)
        model.family.encoder.register_forward_hook(lambda *_: None)  # no block is fused
        assert torch.equal(model(**batch._asdict()), expected)


@every_kind
def test_unwrapped_it_is_the_model_it_was(kind):
    plain, batch = made(kind), texts(kind)._asdict()
    pristine, before = copy.deepcopy(plain), plain(**batch).logits
    model = gist.wrap(plain, ONLY_TOKEN)
    assert gist.unwrap(model) is plain
    assert torch.equal(plain(**batch).logits, before)
    assert plain.state_dict().keys() == pristine.state_dict().keys()
    for part in plain.modules():
        for kept in (name for name in vars(part) if "_hooks" in name):
            assert not getattr(part, kept), kept
    gist.wrap(plain)


@pytest.mark.parametrize(("kind", "attention"), [i for i in IMPLEMENTATIONS if i[0] in DECODERS])
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_a_decoders_evaluation_is_the_plain_models(kind, attention, side):
    plain, batch = made(kind, attention), texts(kind, side)._asdict()
    expected = plain(**batch).logits
    model = gist.wrap(plain, ONLY_TOKEN)
    assert torch.equal(model.eval()(**batch), expected)
    assert torch.equal(model.forward_features(**batch), plain.base_model(**batch)[0])
    close(model.train()(**batch).cls_logits, expected)


@every_decoder
def test_a_decoders_words_do_not_see_the_token(kind):
    model = wrapped(kind, config=ONLY_TOKEN)
    out = model(**texts(kind)._asdict())
    (seen,) = torch.autograd.grad(out.cls_logits.sum(), model.token.weight, allow_unused=True,
                                  materialize_grads=True, retain_graph=True)  # fmt: skip
    assert (seen == 0).all()
    (own,) = torch.autograd.grad(out.gist_logits.square().sum(), model.token.weight)
    assert own.abs().max() > 1e-3


@every_encoder
def test_an_encoders_words_see_the_token(kind):
    model, batch = wrapped(kind, config=ONLY_TOKEN), texts(kind)._asdict()
    plain = made(kind)(**batch).logits
    out = model(**batch)
    close(model.eval()(**batch), out.cls_logits)
    assert (out.cls_logits - plain).abs().max() > 1e-3
    assert model.forward_features(**batch).shape == (3, 10, 32)
    (seen,) = torch.autograd.grad(out.cls_logits.square().sum(), model.token.weight)
    assert seen.abs().max() > 1e-3


# ---- inputs and models that are refused ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_inputs_that_have_no_place_are_refused(kind):
    model, batch = wrapped(kind), texts(kind)
    for name, message in (
        ("labels", "labels go to the loss"),
        ("inputs_embeds", "give input_ids"),
        ("past_key_values", "classified in one call"),
    ):
        with pytest.raises(TypeError, match=message):
            model(batch.input_ids, **{name: torch.zeros(3)})
    with pytest.raises(TypeError, match="give input_ids once, .* got attention_mask"):
        model(attention_mask=batch.attention_mask)
    with pytest.raises(TypeError, match="give input_ids once"):
        model(batch.input_ids, input_ids=batch.input_ids)
    with pytest.raises(
        ValueError, match=r"attention_mask must be \(B, N\).*; it is \(3, 1, 9, 9\)"
    ):
        model(batch.input_ids, attention_mask=torch.ones(3, 1, 9, 9))
    if kind == "Llama":
        with pytest.raises(ValueError, match="pooled by its padding"):
            model.forward_head(torch.zeros(3, 10, 32))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Bert", {"problem_type": "regression"}, "is for regression"),
        ("Llama", {"problem_type": "multi_label_classification"}, "is for multi_label"),
        ("Roberta", {"num_labels": 1}, "has one output, which is regression"),
        ("Roberta", {"is_decoder": True}, "causal attention .config.is_decoder."),
        ("Gemma3Text", {"use_bidirectional_attention": True}, "attention that is not causal"),
    ],
)
def test_models_without_two_distributions_of_classes_are_refused(kind, options, message):
    model = made(kind, **options)
    with pytest.raises(ValueError, match=message):
        gist.wrap(model)
    assert all(p.requires_grad for p in model.parameters())


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60,
         "intermediate_size": 64, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ("GPT2", "GPT2ForSequenceClassification", "gives its blocks' output the shape of the ids"),
        ("Albert", "AlbertForSequenceClassification", "no test has run with a Gist token"),
        ("Deberta", "DebertaForSequenceClassification", "attention is of relative positions"),
        ("Llama", "LlamaForCausalLM", "predicts tokens, for which GIST is not defined"),
        ("Bert", "BertForMaskedLM", "load it by AutoModelForSequenceClassification"),
        ("Bert", "BertModel", "or a text classifier, such as BertForSequenceClassification"),
    ],
)
def test_other_models_are_refused_in_words(config, kind, message):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4} if config == "GPT2" else SIZES
    model = getattr(transformers, kind)(getattr(transformers, config + "Config")(**sizes))
    with pytest.raises(TypeError, match=message):
        gist.wrap(model)


def test_a_wrapped_model_is_not_wrapped_again():
    for kind in ("Bert", "Llama"):
        plain = made(kind)
        gist.wrap(plain, ONLY_TOKEN)
        with pytest.raises(ValueError, match="carries hooks"):
            gist.wrap(plain, ONLY_TOKEN)


def test_the_name_of_the_input_is_transformers():
    assert wrapped("Bert").family.main_input_name == "input_ids"
    assert wrapped("Llama").backbone.main_input_name == "input_ids"
