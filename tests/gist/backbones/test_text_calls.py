"""Wrapped text models in what surrounds a training: files, copies, half weights, PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from text_models import made, texts

import gist

TARGET = torch.tensor([1, 4, 0])
CONFIG = gist.GistConfig(gist.LoRA(rank=2), token_dropout=0.0)
EVERY_KIND_OF_TOKEN = ("Bert", "MPNet", "ModernBert, mean", "Llama")


def gradients(model, batch, call=None):
    """Both logits, and the gradient of every trained parameter."""
    out = (model if call is None else call)(**batch)
    loss = gist.GistLoss()(out, TARGET)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return out, torch.autograd.grad(loss, list(parameters.values()))


def assert_same(actual, expected, atol=1e-6):
    for given, wanted in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=atol)


def perturbed(kind, config=CONFIG, **options):
    model = gist.wrap(made(kind, **options), config).train()
    with torch.no_grad():
        for parameter in model.method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", EVERY_KIND_OF_TOKEN)
def test_a_copy_is_independent(kind):
    model, batch = perturbed(kind), texts(kind)._asdict()
    twin, expected = copy.deepcopy(model), model(**batch)
    with torch.no_grad():
        for parameter in twin.token.parameters():
            parameter.zero_()
    assert torch.equal(torch.stack(model(**batch)), torch.stack(expected))
    assert not torch.equal(twin(**batch).gist_logits, expected.gist_logits)


@pytest.mark.parametrize("method", [CONFIG.method, gist.Adapter(rank=2)])
@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "ModernBert, mean", "Llama", "Gemma2"])
def test_checkpointed_blocks_give_the_same_gradients(kind, method):
    model = perturbed(kind, gist.GistConfig(method, token_dropout=0.0))
    if "fused" in gist.explain(model):  # until then: the sums are of another order
        model.double()
    batch = texts(kind)._asdict()
    expected = gradients(model, batch)
    model.set_grad_checkpointing()
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.backbone.modules())
    assert_same(gradients(model, batch), expected)


def test_mpnet_has_no_checkpointing():
    with pytest.raises(ValueError, match="does not support (activation|gradient) checkpointing"):
        perturbed("MPNet").set_grad_checkpointing()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_compiled_it_gives_the_same_gradients(kind):
    model, batch = perturbed(kind, num_hidden_layers=1), texts(kind)._asdict()
    expected = gradients(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(gradients(model, batch, compiled), expected)


METHODS = [gist.LoRA(rank=2), gist.Adapter(rank=2), gist.LayerNormTuning(), gist.Full()]


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "ModernBert", "Llama"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_is_trained_of_a_half_model_is_float32(kind, method):
    model = gist.wrap(made(kind).bfloat16(), gist.GistConfig(method, token_dropout=0.0)).train()
    out, found = gradients(model, texts(kind)._asdict())
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert out.cls_logits.dtype == out.gist_logits.dtype == torch.float32
    exact = gist.wrap(made(kind), model.config).train()
    exact.load_state_dict(model.state_dict())
    wanted, _ = gradients(exact, texts(kind)._asdict())
    for given, expected in zip(out, wanted, strict=True):
        torch.testing.assert_close(
            given, expected, rtol=0.1, atol=0.1 * expected.abs().max().item()
        )


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_it_trains_under_autocast(kind):
    model, batch = perturbed(kind), texts(kind)._asdict()
    (wanted, _), scale = gradients(model, batch), 0.1
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    for given, expected in zip(out, wanted, strict=True):
        assert given.dtype == torch.bfloat16
        atol = scale * expected.abs().max().item()
        torch.testing.assert_close(given.float(), expected, rtol=scale, atol=atol)


@pytest.mark.parametrize("kind", ["Roberta", "Llama"])
def test_a_file_does_not_load_onto_other_weights(kind, tmp_path):
    gist.save(perturbed(kind), tmp_path)
    other = made(kind)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="frozen weights differ"):
        gist.load(other, tmp_path)
    with pytest.raises(ValueError, match="num_prefix_tokens|global_pool"):
        gist.load(made("Bert" if kind == "Llama" else "Llama"), tmp_path)


def test_explain_says_that_nothing_is_fused():
    said = gist.explain(perturbed("Llama"))
    assert said == (
        "blocks 0 to 1: the backbone's own forward, for a LlamaForSequenceClassification has no "
        "fused sublayers"
    )


def test_what_is_for_images_is_refused_in_words():
    model = perturbed("Bert").eval()
    with pytest.raises(ValueError, match=r"no image size, so that torch\.jit\.script does not"):
        torch.jit.script(model)
    with pytest.raises(AttributeError, match="forward_intermediates"):
        model.forward_intermediates(texts("Bert").input_ids)


# ---- HF PEFT ------------------------------------------------------------------------------------

TARGETS = {"Bert": ["query", "value"], "Roberta": ["query"], "Llama": ["q_proj", "down_proj"]}


def adapted(kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=TARGETS[kind], init_lora_weights=False
    )
    torch.manual_seed(4)
    return peft.get_peft_model(made(kind), config)


@pytest.mark.parametrize("kind", TARGETS)
def test_pefts_lora_trains_below_the_token(kind, tmp_path):
    batch = texts(kind)._asdict()
    expected = adapted(kind).eval()(**batch).logits
    plain = gist.wrap(adapted(kind), gist.GistConfig(None, gist=False)).eval()
    assert torch.equal(plain(**batch), expected)

    model = gist.wrap(adapted(kind), gist.GistConfig(None)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], eps=1e-30)
    gist.GistLoss()(model(**batch), TARGET).backward()
    optimizer.step()
    trained = model.trainable_state_dict()
    assert any("lora_A" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    gist.save(model.eval(), tmp_path)
    assert torch.equal(gist.load(adapted(kind), tmp_path)(**batch), model(**batch))
    model.reset_classifier(3)
    gist.save(model, tmp_path)
    assert torch.equal(gist.load(adapted(kind), tmp_path)(**batch), model(**batch))


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
@pytest.mark.parametrize("name", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_pefts_prompts_are_refused(kind, name):
    peft = pytest.importorskip("peft")
    config = getattr(peft, name + "Config")(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(made(kind), config)
    with pytest.raises(ValueError, match="whose prompts have no place beside a Gist token"):
        gist.wrap(model, gist.GistConfig(None))
