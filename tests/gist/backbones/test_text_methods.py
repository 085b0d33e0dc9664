"""PEFT methods, classifiers and initial values on text models."""

from __future__ import annotations

import copy

import pytest
import torch
from models import METHOD_CONFIGS
from models import made as made_for_images
from text_models import KINDS, made, texts

import gist

TARGET = torch.tensor([1, 4, 0])
METHODS = {
    **METHOD_CONFIGS,
    "lora, gated": gist.LoRA(rank=2, targets=("q", "k", "proj", "gate", "up", "down")),
    "several": (gist.Adapter(rank=2), gist.LoRA(rank=2), gist.LayerNormTuning()),
}
# One of each layout of blocks, and Qwen2 for its biases and its queries with keys of their own.
LAYOUTS = ("Bert", "MPNet", "DistilBert", "ModernBert, mean", "Llama", "Qwen2", "Gemma3Text")
OF_IMAGES = {"vpt", "vpt, shallow", "ssf", "convpass"}
REFUSED = {
    **{kind: {"repadapter", "lora, gated"} for kind in ("Bert", "MPNet", "DistilBert")},
    "ModernBert, mean": {"bitfit", "lora, all"},
    **{kind: {"bitfit", "lora, all", "fact", "fact, tk"} for kind in ("Llama", "Gemma3Text")},
    "Qwen2": {"lora, all"},
}
REASONS = {
    "repadapter": "RepAdapter adapts what lies between a norm and its sublayer.*; take LoRA",
    "bitfit": "BitFit finds nothing to train: .*; take another method",
    "lora, all": "'fc1' of block 0 .* is no plain linear layer .*; those that are: q, k, v",
    "lora, gated": "'gate' of block 0 .* is no plain linear layer .*; those that are: q, k, v",
    "fact": "FacT needs layers of multiples of 32 features; 'k'",
    "fact, tk": "FacT needs layers of multiples of 32 features; 'k'",
    **dict.fromkeys(OF_IMAGES, "has no patch embedding, .*; take another method"),
}
REFUSALS = [
    (kind, method) for kind in LAYOUTS for method in METHODS if method in OF_IMAGES | REFUSED[kind]
]
ALIKE = {"adapter, parallel", "adaptformer", "none", "fact, tk", "lora"}
"""Those whose hooks another method has too: they run on one encoder and one decoder."""
TRAINED = [
    *(
        (kind, method)
        for kind in LAYOUTS
        for method in METHODS
        if (kind, method) not in REFUSALS and (kind in ("Bert", "Qwen2") or method not in ALIKE)
    ),
    *((kind, m) for kind in KINDS if kind not in LAYOUTS for m in ("several", "full", "none")),
]


def trained(kind, config, steps=2):
    """A model after some steps, and its state before them."""
    model = gist.wrap(made(kind), config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), eps=1e-30)
    for _ in range(steps):
        optimizer.zero_grad()
        gist.GistLoss()(model(**texts(kind)._asdict()), TARGET).backward()
        optimizer.step()
    return model, before


@pytest.mark.parametrize(("kind", "method"), TRAINED)
def test_a_step_trains_what_the_method_names_and_a_file_keeps_it(kind, method, tmp_path):
    config = gist.GistConfig(METHODS[method])
    model, before = trained(kind, config)
    family, counted = model.family, gist.count_parameters(model)
    assert counted.method == sum(m.num_parameters(family) for m in config.methods)
    assert counted.token == 32
    trainable = model.trainable_state_dict()
    assert sum(t.numel() for t in trainable.values()) == counted.trainable
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    for name, value in model.state_dict().items():
        # What adds the same to every key moves no softmax, but by rounding.
        if name.endswith((".key.bias", ".k_lin.bias", ".attn.k.bias")):
            continue
        assert torch.equal(value, before[name]) == (name not in trainable), name

    gist.save(model.eval(), tmp_path)
    loaded = gist.load(made(kind), tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded(**texts(kind)._asdict()), model(**texts(kind)._asdict()))


@pytest.mark.parametrize(("kind", "method"), REFUSALS)
def test_methods_that_do_not_fit_are_refused_in_words(kind, method):
    model = made(kind)
    with pytest.raises(ValueError, match=REASONS[method]):
        gist.wrap(model, gist.GistConfig(METHODS[method]))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert METHODS[method].name not in gist.available_methods(model) or method.startswith("lora")


# ---- equations ----------------------------------------------------------------------------------


def perturbed(kind, method):
    model = gist.wrap(made(kind), gist.GistConfig(method, gist=False)).eval()
    with torch.no_grad():
        for parameter in model.method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def update(bottleneck, x):
    hidden = torch.nn.functional.gelu(x @ bottleneck.down.weight.T + bottleneck.down.bias)
    return bottleneck.scale * (hidden @ bottleneck.up.weight.T + bottleneck.up.bias)


def test_an_adapter_in_a_post_norm_block_is_added_before_the_norm():
    model = perturbed("Bert", gist.Adapter(rank=3, scale=0.7, placement="parallel"))
    x, plain = torch.randn(2, 5, 32), made("Bert")
    given = x
    for own, layer, wrapped in zip(
        model.method, plain.bert.encoder.layer, model.backbone.bert.encoder.layer, strict=True
    ):
        out = layer.attention
        h = out.output.dense(out.self(x)[0])
        x = out.output.LayerNorm(x + h + update(own["attention"], x))
        h = layer.output.dense(layer.intermediate(x))
        x = layer.output.LayerNorm(x + h + update(own["mlp"], x))
        given = wrapped(given)
        torch.testing.assert_close(given, x, rtol=0, atol=1e-5)


def test_an_adapter_beside_a_norm_on_both_sides_is_added_behind_it():
    model = perturbed("Gemma3Text", gist.Adapter(rank=3, scale=0.7))
    x, plain = torch.randn(2, 5, 32), made("Gemma3Text").model
    positions = torch.arange(5)[None]
    rotation = plain.rotary_emb(x, positions, plain.config.layer_types[0])
    given = {"position_embeddings": rotation, "attention_mask": None}
    for own, layer, wrapped in zip(
        model.method, plain.layers, model.backbone.model.layers, strict=True
    ):
        expected = layer.post_attention_layernorm(
            layer.self_attn(layer.input_layernorm(x), **given)[0]
        )
        h = x + expected + update(own, x)
        mlp = layer.mlp(layer.pre_feedforward_layernorm(h))
        expected = h + layer.post_feedforward_layernorm(mlp) + update(own, h)
        torch.testing.assert_close(wrapped(x, **given), expected, rtol=0, atol=1e-5)


MERGED = [
    ("Bert", gist.LoRA(rank=2, targets=("q", "v", "proj", "fc1", "fc2"))),
    ("Bert", gist.FacT(rank=2, dropout=0.0)),
    ("Bert", gist.DiffFit()),
    ("Roberta", gist.LoRA(rank=2)),
    ("ModernBert", gist.LoRA(rank=2, targets=("k", "v", "gate", "up", "down"))),
    ("ModernBert", gist.RepAdapter(dropout=0.0)),
    ("Llama", gist.LoRA(rank=2, targets=("q", "v", "proj", "gate", "down"))),
    ("Llama", gist.RepAdapter(dropout=0.0)),
    ("Llama", gist.DiffFit()),
    ("Qwen2", gist.FacT(rank=2, dropout=0.0)),
]


@pytest.mark.parametrize(("kind", "method"), MERGED)
def test_merged_weights_give_the_same_logits(kind, method):
    batch, model = texts(kind)._asdict(), perturbed(kind, method)
    merged = gist.merge(model)
    torch.testing.assert_close(merged(**batch).logits, model(**batch), rtol=0, atol=1e-5)
    assert (made(kind)(**batch).logits - model(**batch)).abs().max() > 1e-2
    assert type(merged) is type(made(kind))


def test_a_decoders_token_leaves_a_merged_model_and_an_encoders_can_not():
    config = gist.GistConfig(gist.LoRA(rank=2))
    model, _ = trained("Llama", config)
    batch = texts("Llama")._asdict()
    merged = gist.merge(model.eval())
    torch.testing.assert_close(merged(**batch).logits, model(**batch), rtol=0, atol=1e-5)
    encoder = gist.wrap(made("Bert"), config)
    with pytest.raises(ValueError, match="drop_token=True leaves it out, which is not exact"):
        gist.merge(encoder)
    assert type(gist.merge(encoder, drop_token=True)) is type(made("Bert"))


# ---- classifiers --------------------------------------------------------------------------------

HEADS = ("Bert", "Roberta", "Electra", "MPNet", "DistilBert", "ModernBert", "Llama")


@pytest.mark.parametrize("kind", HEADS)
def test_a_new_classifier_and_none(kind):
    batch = texts(kind)._asdict()
    model = gist.wrap(made(kind), gist.GistConfig(None), num_classes=7).train()
    assert model.num_classes == model.backbone.config.num_labels == 7
    assert model(**batch).gist_logits.shape == model.eval()(**batch).shape == (3, 7)
    last = model.family.logit_layers[0]
    assert (last.bias is None) == (kind == "Llama")

    model = gist.wrap(made(kind), gist.GistConfig(None, token_dropout=0.0), num_classes=0).train()
    features = model(**batch)
    assert features.gist_logits.shape == (3, 32)
    last = made(kind).get_submodule(model.family.last_layer)
    same = gist.wrap(made(kind), model.config).train()
    same.token.load_state_dict(model.token.state_dict())
    for given, logits in zip(features, same(**batch), strict=True):
        torch.testing.assert_close(last(given), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_a_separate_head_starts_as_the_whole_shared_one(kind):
    batch = texts(kind)._asdict()
    config = gist.GistConfig(None, separate_head=True, token_dropout=0.0)
    model = gist.wrap(made(kind), config).train()
    shared = gist.wrap(made(kind), gist.GistConfig(None, token_dropout=0.0)).train()
    shared.token.load_state_dict(model.token.state_dict())
    torch.testing.assert_close(model(**batch).gist_logits, shared(**batch).gist_logits)
    assert gist.count_parameters(model).head == 2 * gist.count_parameters(shared).head
    model(**batch).gist_logits.sum().backward()
    heads = [p for head in model.family.heads for p in head.parameters()]
    assert all(p.grad is None for p in heads)
    assert all(p.grad is not None for p in model.gist_head.parameters())


# ---- initial values -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Bert", "Electra", "ModernBert", "Llama", "Gemma2"])
def test_tokens_start_among_the_words(kind):
    model = made(kind)
    base, ids = model.base_model, torch.arange(60)
    if kind in ("Llama", "Gemma2"):
        rows = base.embed_tokens(ids)
        assert kind == "Llama" or not torch.equal(rows, base.embed_tokens.weight)  # it scales
    else:
        norm = base.embeddings.norm if kind == "ModernBert" else base.embeddings.LayerNorm
        rows = norm(base.get_input_embeddings()(ids))
        rows = base.embeddings_project(rows) if kind == "Electra" else rows
    token = gist.wrap(model, gist.GistConfig(None, num_tokens=4000)).token.weight[0]
    mean, std = rows.mean(0), rows.std(0, correction=0)
    assert ((token.mean(0) - mean).abs() < 6 * std / 4000**0.5).all()
    torch.testing.assert_close(token.std(0), std, rtol=0.08, atol=0)


def test_initial_values_of_the_other_kind_of_model_are_refused():
    with pytest.raises(ValueError, match="token_init='words' is for text models"):
        gist.wrap(made_for_images("timm ViT-Ti")[0], gist.GistConfig(token_init="words"))
    plain = made("Bert")
    with pytest.raises(ValueError, match="token_init='class' is for images"):
        gist.wrap(plain, gist.GistConfig(token_init="class"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    token = gist.wrap(copy.deepcopy(plain), gist.GistConfig(token_init="uniform")).token.weight
    assert token.abs().max() <= 0.5
