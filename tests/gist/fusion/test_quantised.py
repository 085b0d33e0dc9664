"""Fused sublayers of frozen weights that torchao has quantised, against the model's own forward."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from draws import geometric_mean
from models import backbone, images, transformers_vit
from torch import nn

import gist
import gist_kernels as gk
from gist_kernels.quantised import parts_of

torchao = pytest.importorskip("torchao", minversion="0.18")
from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    NF4Tensor,
    PerGroup,
    quantize_,
)

KINDS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    "nf4": None,
}
CONFIGS = {
    "adapter": gist.GistConfig(gist.Adapter(rank=4, scale=0.7), token_dropout=0.0),
    "adapter alone": gist.GistConfig(gist.Adapter(rank=4, scale=0.7), gist=False),
    "lora": gist.GistConfig(
        gist.LoRA(rank=3, targets=("q", "v", "proj", "fc1", "fc2")), token_dropout=0.0
    ),
    "token alone": gist.GistConfig(None, token_dropout=0.0),
    "ssf, biases": gist.GistConfig((gist.SSF(), gist.BitFit()), token_dropout=0.0),
}


def quantise(model, kind="int8"):
    """Quantise a backbone's blocks, in place."""
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and ("blocks." in name or "layer" in name):
            if kind == "nf4":
                quantised = NF4Tensor.from_tensor(layer.weight.detach(), 16, 16)
                layer.weight = nn.Parameter(quantised, requires_grad=False)
            else:
                quantize_(layer, KINDS[kind])
    return model


def wrapped(config="adapter", kind="int8", model=None):
    model = model if model is not None else backbone(embed_dim=64, num_heads=4)
    model = gist.wrap(quantise(model, kind), CONFIGS[config])
    with torch.no_grad():
        for parameter in model.method.parameters() if model.method is not None else ():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def results(model, pixels, autocast=False):
    """Logits, and the gradient of everything that is trained."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(pixels)
    logits = out if isinstance(out, torch.Tensor) else torch.stack(out)
    logits.float().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), **grads}


def errors(found, exact):
    assert found.keys() == exact.keys()
    return torch.stack([(found[n] - exact[n]).norm() / exact[n].norm() for n in exact])


def is_fused(model):
    return ": fused sublayers, served by" in gist.explain(model).splitlines()[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_and_gradients_are_those_of_the_own_forward(config, kind, training, own_forward):
    model = wrapped(config, kind).train(training)
    # In evaluation the token has no logits of its own, and a last block's adapter all the same.
    assert is_fused(model)
    fused = results(model, images())
    own_forward()
    del model._plan
    assert not is_fused(model)
    assert errors(fused, results(model, images())).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_separate_queries_keys_and_values(kind, own_forward):
    torch.manual_seed(1)
    model = wrapped("adapter", kind, transformers_vit())
    assert is_fused(model)
    fused = results(model, images())
    own_forward()
    del model._plan
    assert errors(fused, results(model, images())).max() < 1e-5


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_each_backend_takes_quantised_weights(backend, own_forward):
    model = wrapped()
    with gk.use_backend(backend):
        found = results(model, images())
    own_forward()
    del model._plan
    assert errors(found, results(model, images())).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", ["adapter", "lora"])
def test_autocast_rounds_as_the_own_forward_does(config, kind, own_forward):
    model = wrapped(config, kind)
    draws = images(16).split(2)
    fused = [results(model, pixels, autocast=True) for pixels in draws]
    own_forward()
    del model._plan
    own = [results(model, pixels, autocast=True) for pixels in draws]
    exact = [results(model, pixels) for pixels in draws]
    ours, general = (
        torch.stack([errors(f, e) for f, e in zip(found, exact, strict=True)])
        for found in (fused, own)
    )
    assert geometric_mean(ours.norm(dim=1) / general.norm(dim=1)) <= 1.5


def test_a_backbone_converted_to_bfloat16_after_it_was_quantised(own_forward):
    model = wrapped("adapter")  # whose int8 weights stay float32's, says torchao
    model.backbone.bfloat16()
    assert is_fused(model)
    fused = results(model, images().bfloat16())
    own_forward()
    del model._plan
    assert errors(fused, results(model, images().bfloat16())).max() < 0.1


# ---- memory


def kept_bytes(call):
    """What a call allocates and does not free: a graph that it returns, or a cache."""
    gc.collect()
    gc.disable()  # what others left is no memory of this pass
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            kept = call()
    finally:
        gc.enable()
    events = profile.profiler.kineto_results.events()
    del kept
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_keeps_no_dequantised_weight(kind, own_forward):
    plain = gist.wrap(backbone(embed_dim=64, num_heads=4), CONFIGS["adapter"]).train()
    model = wrapped("adapter", kind)
    least = 4 * 64 * 64  # bytes of the smallest dequantised weight

    def more_than_plain():
        return kept_bytes(lambda: model(images(1))) - kept_bytes(lambda: plain(images(1)))

    def step():
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(torch.stack(model(images(1))).sum(), trained)

    assert abs(more_than_plain()) < least / 4
    assert abs(kept_bytes(step)) < least / 4
    assert abs(more_than_plain()) < least / 4
    if kind == "int8":  # the own forward's graph does keep them, and the count shows it
        own_forward()
        del model._plan, plain._plan
        assert more_than_plain() > 3 * 10 * least


@pytest.mark.parametrize("kind, share", [("int8", 0.30), ("int4", 0.45), ("nf4", 0.20)])
def test_bytes_of_the_frozen_weights(kind, share):
    def frozen(model):
        return sum(
            part.nbytes
            for parameter in model.family.model.parameters()
            if not parameter.requires_grad
            for part in parts_of(parameter).values()
        )

    sizes = {"embed_dim": 128, "num_heads": 4}
    plain = gist.wrap(backbone(**sizes))
    model = wrapped("adapter", kind, backbone(**sizes))
    assert frozen(model) <= share * frozen(plain)


# ---- states of a model


def test_a_model_quantised_after_wrap_is_planned_again():
    model = gist.wrap(backbone(embed_dim=64, num_heads=4), CONFIGS["adapter"]).train()
    before = results(model, images())
    quantise(model.backbone)
    assert is_fused(model)
    found = errors(results(model, images()), before)
    assert 1e-4 < found.max() < 0.5  # of int8's rounding


def test_weights_changed_before_backward_are_refused():
    model = wrapped()
    out = model(images())
    model.backbone.blocks[1].mlp.fc1.weight.qdata.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out[0].sum().backward()


def test_quantised_inputs_run_by_the_own_forward():
    model = backbone(embed_dim=64, num_heads=4)
    config = Int8DynamicActivationInt8WeightConfig()
    quantize_(model.blocks[1], config)
    said = gist.explain(gist.wrap(model, CONFIGS["adapter"])).splitlines()
    assert "own forward, for its Int8Tensors quantise or scale their layer's input" in said[1]
    assert "fused" in said[0]
    assert "fused" in said[2]


def test_public_operations_refuse_quantised_weights():
    block = quantise(backbone(embed_dim=64, num_heads=4)).blocks[0]
    norm = gk.NormWeights(block.norm2.weight.detach(), None, 1e-6)
    weights = gk.MlpWeights(block.mlp.fc1.weight, None, block.mlp.fc2.weight, None)
    with pytest.raises(TypeError, match="mlp.fc1_weight is a quantised Int8Tensor"):
        gk.adapter_mlp(torch.randn(1, 2, 64), norm, weights)


def test_wrap_refuses_to_train_quantised_weights():
    every = backbone(embed_dim=64, num_heads=4)
    quantize_(every, KINDS["int8"])
    before = {name: p.requires_grad for name, p in every.named_parameters()}
    with pytest.raises(ValueError, match="classifier is quantised, and can't be trained"):
        gist.wrap(every)
    assert {name: p.requires_grad for name, p in every.named_parameters()} == before
    assert is_fused(gist.wrap(every, num_classes=5))
    with pytest.raises(ValueError, match="quantised weights can't be trained"):
        gist.wrap(quantise(backbone(embed_dim=64, num_heads=4)), gist.GistConfig(gist.Full()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_saved_and_loaded(kind, tmp_path):
    plain = backbone(embed_dim=64, num_heads=4)
    model = wrapped("lora", kind, copy.deepcopy(plain)).eval()
    gist.save(model, tmp_path)
    loaded = gist.load(quantise(copy.deepcopy(plain), kind), tmp_path)
    assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(ValueError, match="its frozen weights differ"):
        gist.load(copy.deepcopy(plain), tmp_path)
    other = quantise(copy.deepcopy(plain), kind)
    next(iter(parts_of(other.blocks[0].mlp.fc1.weight).values())).view(-1)[0] ^= 1
    with pytest.raises(ValueError, match="its frozen weights differ"):
        gist.load(other, tmp_path)


def test_merge_says_how_to_merge_instead(tmp_path):
    plain = backbone(embed_dim=64, num_heads=4)
    model = wrapped("lora", model=copy.deepcopy(plain)).eval()
    with pytest.raises(ValueError, match="quantised weights can't be merged into") as raised:
        gist.merge(model, drop_token=True)
    assert "check_weights=False" in str(raised.value)
    gist.save(model, tmp_path)
    merged = gist.merge(gist.load(plain, tmp_path, check_weights=False), drop_token=True)
    assert merged(images()).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["adapter", "adapter alone", "lora"])
def test_torch_compile_takes_the_reference(config):
    model = wrapped(config)
    expected = results(model, images())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    out = compiled(images())
    logits = out if isinstance(out, torch.Tensor) else torch.stack(out)
    logits.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert errors({"logits": logits.detach(), **grads}, expected).max() < 1e-5
