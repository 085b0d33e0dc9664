"""Half backbones: what is trained is float32, and is converted where it is used."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from devices import WithoutFloat64
from models import FAMILIES, ROTARY, backbone, images, made

import gist

METHODS = [
    gist.Adapter(rank=4),
    gist.AdaptFormer(rank=4, dropout=0.0),
    gist.BitFit(),
    gist.Convpass(dropout=0.0),
    gist.DiffFit(),
    gist.FacT(dropout=0.0),
    gist.Full(),
    gist.LayerNormTuning(),
    gist.LoRA(rank=2),
    gist.RepAdapter(rank=4, dropout=0.0),
    gist.SSF(),
    gist.VPT(),
]
TARGET = torch.tensor([3, 4])
HALVES = [torch.float16, torch.bfloat16]


def config(method) -> gist.GistConfig:
    return gist.GistConfig(method, token_dropout=0.0)


def wrapped_half(method, dtype) -> gist.GistModel:
    torch.manual_seed(3)
    return gist.wrap(backbone().to(dtype), config(method))


def twin_of(model: gist.GistModel, method, dtype) -> gist.GistModel:
    """The same parameters in another dtype throughout."""
    twin = gist.wrap(backbone(), config(method)).to(dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def by_hooks(model: gist.GistModel) -> gist.GistModel:
    """With a hook of the user's on every block: blocks then run by their own forward."""
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda *_: None)
    return model


def gradients(model, pixels):
    loss = gist.GistLoss()(model.train()(pixels), TARGET)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()))
    return loss.double(), dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_trained_is_float32_and_has_the_gradients_of_float64(
    method, dtype, autocast, fused
):
    model = wrapped_half(method, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == (set() if method.name == "full" else {dtype})
    _, exact = gradients(twin_of(model, method, torch.float64), images().double())
    with torch.autocast("cpu", dtype):
        _, mixed = gradients(twin_of(model, method, torch.float32), images())
    model = model if fused else by_hooks(model)
    with torch.autocast("cpu", dtype, enabled=autocast):
        _, found = gradients(model, images().to(dtype))
    assert all(found[name].dtype is torch.float32 for name in found)
    # A float32 backbone under autocast rounds everything but the residual stream.
    ours, theirs = (distance(some, exact) for some in (found, mixed))
    assert ours < 2 * theirs


def distance(found, exact) -> float:
    return sum((found[name] - exact[name]).square().sum() for name in exact).sqrt().item()


@pytest.mark.parametrize("method", [gist.BitFit(), gist.LayerNormTuning(), gist.Adapter(rank=4)])
@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"])
def test_other_families_train_in_float32_too(method, name):
    size = 28 if "patch14" in name else 32
    half = timm.create_model(name, num_classes=7, img_size=size, depth=2).bfloat16()
    model = gist.wrap(half, config(method))
    loss, found = gradients(model, images(size=size).bfloat16())
    assert loss.isfinite()
    assert all(g.dtype is torch.float32 and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("family", [*FAMILIES, *ROTARY])
@pytest.mark.parametrize("method", [gist.BitFit(), gist.LayerNormTuning(), gist.Full()])
def test_checkpointed_blocks_convert_at_use_when_run_again(method, family):
    backbone, pixels = made(family)
    model = gist.wrap(backbone.bfloat16(), config(method))
    model.family.output_norm.register_forward_hook(lambda *_: None)  # no block is fused
    _, kept = gradients(model, pixels.bfloat16())
    model.set_grad_checkpointing()
    _, found = gradients(model, pixels.bfloat16())
    assert kept.keys() == found.keys()
    for name, gradient in kept.items():
        assert torch.equal(found[name], gradient), name


def test_pruning_keeps_what_converts_to_float32():
    model = wrapped_half(gist.BitFit(), torch.bfloat16)
    model.prune_intermediate_layers([0, 1], prune_head=False)
    model.set_grad_checkpointing()
    loss, _ = gradients(by_hooks(model), images().bfloat16())
    assert model(images().bfloat16()).cls_logits.dtype is torch.float32
    assert loss.isfinite()


def test_a_float32_head_gives_float32_logits_and_follows_reset_classifier():
    model = gist.wrap(
        backbone().bfloat16(), gist.GistConfig(gist.Adapter(rank=4), separate_head=True)
    )
    for count in (7, 4):
        model.reset_classifier(count)
        assert model.backbone.head.weight.dtype is model.gist_head.weight.dtype is torch.float32
        assert {logits.dtype for logits in model.train()(images().bfloat16())} == {torch.float32}
        assert len(model.backbone.head._forward_pre_hooks) == 1
    logits = model.eval()(images().bfloat16())
    torch.testing.assert_close(copy.deepcopy(model)(images().bfloat16()), logits)
    assert model.backbone(images().bfloat16()).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images()).dtype is torch.bfloat16


@pytest.mark.parametrize("method", [gist.Adapter(rank=4), gist.BitFit()])
def test_a_grad_scaler_unscales_a_half_backbone(method):
    model = wrapped_half(method, torch.float16).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.clone() for p in trained]
    scaler, optimizer = (
        torch.amp.GradScaler("cpu", init_scale=64.0),
        torch.optim.SGD(trained, lr=0.1),
    )
    with torch.autocast("cpu", torch.float16):
        loss = gist.GistLoss()(model(images().half()), TARGET)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.isfinite().all() for p in trained)
    scaler.step(optimizer)
    assert all(
        not torch.equal(p, old) for p, old in zip(trained, before, strict=True) if p.grad.any()
    )


def test_small_steps_are_not_lost():
    """100 steps of 2**-12 onto weights of which bfloat16 resolves 2**-8."""
    model = wrapped_half(gist.LayerNormTuning(), torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, lr=2**-12)
    for _ in range(100):
        for p in trained:
            p.grad = -torch.ones_like(p)
        optimizer.step()
    for p, old in zip(trained, before, strict=True):
        torch.testing.assert_close(p - old, torch.full_like(p, 100 * 2**-12), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [gist.Adapter(rank=4), gist.BitFit(), gist.LoRA(rank=2)])
def test_saving_and_loading_keep_float32(tmp_path, method):
    model = wrapped_half(method, torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(2**-12 * torch.randn_like(p))
    gist.save(model, tmp_path)
    loaded = gist.load(backbone().bfloat16(), tmp_path)
    expected = model.trainable_state_dict()
    assert loaded.trainable_state_dict().keys() == expected.keys()
    for name, p in loaded.trainable_state_dict().items():
        assert p.dtype is torch.float32
        assert torch.equal(p, expected[name])


@pytest.mark.parametrize("method", [gist.LoRA(rank=2), gist.BitFit(), None])
def test_a_merged_half_backbone_is_half_throughout(method):
    model = wrapped_half(method, torch.bfloat16).eval()
    merged = gist.merge(model, drop_token=True)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in merged.modules())
    assert merged(images().bfloat16()).dtype is torch.bfloat16


def test_compiled_with_float32_biases():
    model = wrapped_half(gist.BitFit(), torch.bfloat16).eval()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(
        compiled(images().bfloat16()), by_hooks(model)(images().bfloat16()), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("method", [gist.LoRA(rank=2), gist.SSF(), gist.FacT(), gist.RepAdapter()])
def test_merging_makes_no_float64_on_a_device_without_it(monkeypatch, method):
    model = gist.wrap(backbone(), config(method)).eval()
    with torch.no_grad():
        for p in model.method.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected = gist.merge(model, drop_token=True)
    with WithoutFloat64(), pytest.raises(TypeError, match="float64"):
        gist.merge(model, drop_token=True)
    monkeypatch.setattr("gist.methods.base._WITHOUT_FLOAT64", ("cpu",))
    with WithoutFloat64():
        merged = gist.merge(model, drop_token=True)
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
