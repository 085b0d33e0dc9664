"""Fused sublayers of transformers' models against transformers' own forward, in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models import images
from torch import nn

import gist
import gist_kernels as gk
from gist.fusion import block as fused_block
from gist_kernels.autograd import casts

transformers = pytest.importorskip("transformers")

KINDS = {
    "ViT": ("ViT", {"intermediate_size": 96}),
    "ViT, tanh, no bias of q, k, v": (
        "ViT", {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False},
    ),
    "DINOv2": ("Dinov2", {"drop_path_rate": 0.4}),
    "DINOv2, eager attention": ("Dinov2", {"attn_implementation": "eager"}),
    "DINOv2, gated MLP": ("Dinov2", {"use_swiglu_ffn": True}),
    "SigLIP": ("Siglip", {"intermediate_size": 96}),
    "DINOv2 with registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "DINOv3": (
        "DINOv3ViT",
        {"num_register_tokens": 3, "drop_path_rate": 0.4, "intermediate_size": 96},
    ),
    "DINOv3, gated MLP": (
        "DINOv3ViT", {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 96},
    ),
}  # fmt: skip
METHODS = {
    "adapter": gist.Adapter(rank=4, scale=0.7),
    "adapter, parallel": gist.Adapter(rank=4, scale=0.7, placement="parallel"),
    "lora": gist.LoRA(rank=2),
    "lora of keys": gist.LoRA(rank=2, targets=("k",)),
    "lora of all": gist.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2")),
    "ssf": gist.SSF(),
    "bitfit": gist.BitFit(),
    "prompts": gist.VPT(num_tokens=3),
    "token alone": None,
}


@functools.cache
def template(kind):
    """A model every part of which shows in its logits, LayerScale and biases too."""
    name, options = KINDS[kind]
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"image_size": 32, "patch_size": 8, **options}
    if name == "Siglip":
        sizes = {"vision_config": sizes}
    config = getattr(transformers, name + "Config")(num_labels=5, **sizes)
    torch.manual_seed(1)
    kind = "Model" if name == "DINOv3ViT" else "ForImageClassification"
    model = getattr(transformers, name + kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrapped(kind="ViT", method="adapter", use_gist=True):
    config = gist.GistConfig(METHODS[method], gist=use_gist, token_dropout=0.0)
    backbone = copy.deepcopy(template(kind))
    torch.manual_seed(2)
    model = gist.wrap(backbone, config, num_classes=5 if kind.startswith("DINOv3") else None)
    with torch.no_grad():
        for parameter in model.method.parameters() if model.method is not None else ():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def results(model, pixels):
    """Logits, and the gradient of everything that is trained."""
    torch.manual_seed(3)
    model.zero_grad()
    out = model(pixels)
    logits = out if isinstance(out, torch.Tensor) else torch.stack(out)
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def is_fused(model):
    return gist.explain(model).startswith("blocks 0 to 1: fused sublayers")


def by_library(model, pixels):
    """By transformers' own call of the whole model, and of the blocks one by one."""
    hook = model.backbone.register_forward_hook(lambda *_: None)
    assert "carries hooks" in gist.explain(model)
    whole = results(model, pixels)
    hook.remove()
    hooks = [b.register_forward_hook(lambda *_: None) for b in model.family.blocks]
    assert "the block's own forward, for it carries hooks" in gist.explain(model)
    blocks = results(model, pixels)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(blocks, whole, rtol=1e-9, atol=1e-9)
    return whole


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (kind, method)
        for kind in KINDS
        for method in METHODS
        if not ("gated" in kind and method in ("lora of all", "ssf"))  # which find no fc1
        and not ("DINOv3" in kind and method == "prompts")  # no place among rotary positions
    ],
)
def test_gives_logits_and_gradients_of_transformers_own_forward(kind, method, train):
    model = wrapped(kind, method).double().train(train)
    assert is_fused(model)
    fused = results(model, images().double())
    expected = by_library(model, images().double())
    # In evaluation nothing reads the Gist token's own logits.
    assert any(g.abs().max() > 1e-6 for n, g in expected[1].items() if not n.endswith("classifier"))
    torch.testing.assert_close(fused, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["ViT", "DINOv2 with registers", "DINOv3"])
@pytest.mark.parametrize("method", ["adapter", "lora", "token alone"])
def test_without_a_gist_token(kind, method):
    model = wrapped(kind, method, use_gist=False).double().train()
    assert is_fused(model)
    fused = results(model, images().double())
    torch.testing.assert_close(fused, by_library(model, images().double()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["ViT", "DINOv2", "DINOv3"])
def test_all_features_are_those_of_transformers(kind):
    model = wrapped(kind).double().eval()
    fused = model.forward_features(images().double())
    with torch.no_grad():
        expected = model.family.features(images().double())
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["adapter", "lora", "ssf", "bitfit"])
@pytest.mark.parametrize("kind", ["ViT", "DINOv2 with registers"])
def test_autocast_is_as_near_to_float64_as_transformers_is(kind, method):
    model = wrapped(kind, method).train()
    truth, gradients = results(copy.deepcopy(model).double(), images().double())

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images()).cls_logits.dtype is torch.bfloat16
            torch.manual_seed(3)
            out = model(images())
        model.zero_grad()
        logits = torch.stack(out)
        logits.double().square().sum().backward()
        of = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double()
        true = torch.cat([g.flatten() for g in gradients.values()])
        return (logits - truth).norm() / truth.norm() + (of - true).norm() / true.norm()

    assert is_fused(model)
    fused = error()
    model.backbone.register_forward_hook(lambda *_: None)
    assert 1e-4 < fused < 1.5 * error()


def test_images_of_another_size_are_taken_or_refused_as_by_transformers():
    vit, dinov2 = wrapped("ViT").eval(), wrapped("DINOv2").eval()
    with pytest.raises(ValueError, match=r"Input image size \(40\*40\) doesn't match"):
        vit(images(size=40))
    logits = dinov2(images(size=40))
    dinov2.backbone.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(logits, dinov2(images(size=40)), rtol=1e-5, atol=1e-5)


def test_half_models_take_images_of_any_dtype():
    model = wrapped("ViT", "adapter").eval()
    model.backbone.bfloat16()
    assert is_fused(model)
    logits = model(images())
    model.backbone.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(logits, model(images()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["ViT", "DINOv2", "DINOv3"])
def test_a_checkpointed_block_is_recomputed_once_fused_or_not(kind):
    """DINOv2's drop-path draws the same again."""
    expected = results(wrapped(kind).double().train(), images().double())
    model = wrapped(kind).double().train()
    model.set_grad_checkpointing()
    assert is_fused(model)
    torch.testing.assert_close(results(model, images().double()), expected, rtol=1e-9, atol=1e-9)
    calls = []
    norm = model.family.parts(1).norms[0]
    norm.register_forward_pre_hook(lambda *_: calls.append("block 1"))
    assert "block 1: the block's own forward" in gist.explain(model)
    torch.testing.assert_close(results(model, images().double()), expected, rtol=1e-9, atol=1e-9)
    assert calls == ["block 1", "block 1"]


def test_checkpointed_blocks_are_run_twice(monkeypatch):
    model = wrapped("ViT").train()
    run, calls = fused_block.run, []
    monkeypatch.setattr(
        fused_block, "run", lambda *args, **options: (calls.append(1), run(*args, **options))[1]
    )
    results(model, images())
    assert len(calls) == 2
    for block in model.family.blocks:
        block.gradient_checkpointing = block is model.family.blocks[0]  # as with every_n_layers=2
    results(model, images())
    assert len(calls) == 2 + 3
    model.eval()
    results(model, images())
    assert len(calls) == 2 + 3 + 2


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_models_stay_fused(autocast):
    if gk.backend.serving("sublayers", "cpu", torch.float32) == "reference":
        pytest.skip("no backend serves the sublayers here")
    model = wrapped("DINOv2 with registers", "lora").train()
    sublayers = []

    def note(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        sublayers.append(sum("_adapter_attention" in n or "_adapter_mlp" in n for n in names))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=note)
    found = []
    for call in (compiled, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), gk.cached_casts():
            logits = torch.stack(call(images()))
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append((logits.detach(), torch.autograd.grad(logits.square().sum(), trained)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert sublayers == [4]


def test_a_saved_adapter_loads_into_a_fresh_backbone(tmp_path):
    model = wrapped("DINOv2", "lora").eval()
    gist.save(model, tmp_path)
    loaded = gist.load(copy.deepcopy(template("DINOv2")), tmp_path)
    assert is_fused(loaded)
    assert torch.equal(loaded(images()), model(images()))


def test_dinov3_gets_a_classifier_and_keeps_it(tmp_path):
    with pytest.raises(ValueError, match=r"has no linear classifier.*num_classes=N"):
        gist.wrap(copy.deepcopy(template("DINOv3")))
    model = wrapped("DINOv3").eval()
    expected = model(images())
    gist.save(model, tmp_path)
    loaded = gist.load(copy.deepcopy(template("DINOv3")), tmp_path)
    assert torch.equal(loaded(images()), expected)
    backbone = gist.unwrap(model)
    assert backbone.classifier.out_features == 5
    assert torch.equal(backbone(images())[0], template("DINOv3").eval()(images())[0])
    features = gist.wrap(backbone, gist.GistConfig(None), num_classes=0).eval()
    torch.testing.assert_close(
        features(images()), features.forward_features(images())[:, 0], rtol=1e-5, atol=1e-5
    )


# ---- what is not fused -------------------------------------------------------------------------


def replaced(path, part):
    def change(model):
        owner, _, name = path.rpartition(".")
        owner = model.family.blocks[0].get_submodule(owner)
        new = copy.deepcopy(part).train(owner.training)
        new._forward_hooks.update(getattr(owner, name)._forward_hooks)
        new._forward_pre_hooks.update(getattr(owner, name)._forward_pre_hooks)
        setattr(owner, name, new)

    return change


def attribute(path, name, value):
    return lambda model: setattr(model.family.blocks[0].get_submodule(path), name, value)


def of_config(name, value):
    return lambda model: setattr(model.backbone.config, name, value)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("ViT", replaced("dropout", nn.Dropout(0.1)), "its block has dropout"),
        ("ViT", replaced("layernorm_before", nn.RMSNorm(48)), "its norm is a RMSNorm"),
        ("ViT", replaced("mlp.activation_fn", nn.Tanh()), "its MLP's activation is a Tanh"),
        ("ViT", replaced("mlp", nn.Linear(48, 48)), "its MLP is a Linear"),
        ("ViT", replaced("attention.k_proj", nn.Sequential()), "projections are not plain linears"),
        ("ViT", replaced("attention.k_proj", nn.Linear(48, 24)), "heads don't make up"),
        ("ViT", attribute("attention", "attention_dropout", 0.1), "its attention has dropout"),
        ("ViT", attribute("attention", "is_causal", True), "its attention is causal"),
        ("DINOv2", replaced("layer_scale1", nn.Identity()), "its layer scale is a Identity"),
        ("DINOv2", replaced("drop_path", nn.Dropout(0.0)), "its drop-path is a Dropout"),
    ],
)
def test_a_block_that_does_not_match_says_why(kind, change, reason):
    model = wrapped(kind, "token alone").train()
    assert is_fused(model)
    change(model)
    first, second = gist.explain(model).splitlines()
    assert reason in first
    assert second == "block 1: fused sublayers, served by 'cpu'"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_config("_attn_implementation", "flex_attention"), "implementation is 'flex_attention'"),
        (of_config("output_hidden_states", True), "asks for attentions or hidden states"),
        (of_config("is_causal", True), "its attention is causal"),
        (
            lambda model: setattr(model.family.encoder, "forward", lambda *_: None),
            "the forward of its ViTModel was replaced",
        ),
        (
            lambda model: model.family.encoder.register_forward_hook(lambda *_: None),
            "it carries hooks that are not gist's outside of its blocks",
        ),
    ],
)
def test_a_model_that_does_not_match_says_why(change, reason):
    model = wrapped("ViT").train()
    assert is_fused(model)
    change(model)
    said = gist.explain(model)
    assert "the backbone's own forward, for " in said
    assert reason in said


def test_attention_that_someone_registered_is_not_fused(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *_, **__: None)
    assert "another function was registered for its 'sdpa'" in gist.explain(wrapped("ViT"))


def test_forwards_that_someone_patched_are_not_fused(monkeypatch):
    from gist.fusion.transformers_parts import library_forward

    model = wrapped("ViT").train()
    assert is_fused(model)
    for kind in {type(part) for part in model.backbone.modules() if "ViT" in type(part).__name__}:
        if kind.__name__ in ("ViTEmbeddings", "ViTPatchEmbeddings"):
            continue  # which the fused forward calls

        @functools.wraps(kind.forward)  # as transformers' own decorators do
        def patched(*args, own=kind.forward, **options):
            return own(*args, **options)

        monkeypatch.setattr(kind, "forward", patched)
        assert "has a forward of its own" in gist.explain(model), kind
        assert library_forward(kind) is None  # had it been so before gist was imported
        monkeypatch.undo()
        assert library_forward(kind) is kind.forward
        assert is_fused(model)


# ---- joined weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_cached_casts_joins_each_blocks_weights_once(autocast, monkeypatch):
    model = wrapped("ViT").train()
    joined = []
    cat = torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda tensors, *args, **options: (
            joined.extend(t for t in tensors[:1] if t.shape == (48, 48)),
            cat(tensors, *args, **options),
        )[1],
    )  # fmt: skip

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = torch.stack(model(images()))
        out.sum().backward()
        return out.detach()

    expected = step()
    assert len(joined) == 2
    with gk.cached_casts():
        torch.testing.assert_close(step(), expected, rtol=0, atol=0)
        assert len(joined) == 4
        assert torch.equal(step(), expected)
        assert len(joined) == 4
        kept = [value for key, (_, value) in casts._casts.get().items() if len(key) == 4]
        assert [value.shape for value in kept] == [(144, 48)] * 2
        assert {value.dtype for value in kept} == {torch.bfloat16 if autocast else torch.float32}
    with torch.no_grad():
        model.family.blocks[0].attention.q_proj.weight.data.mul_(1.5)
    assert not torch.equal(step(), expected)  # seen at once outside of the block
