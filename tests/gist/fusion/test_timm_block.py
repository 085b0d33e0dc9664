"""Blocks as fused sublayers against the backbone's own forward."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from fused_cases import CONFIGS, PLAIN_CONFIGS, compare_with_own_forward, results
from marks import slow_where
from models import BACKBONES, backbone, images, wrapped
from timm.layers import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training import in_processes

import gist
from gist.model.attach import carry_hooks
from gist_kernels.functional import sublayers as functional_sublayers
from gist_kernels.kernels.cpu import BACKEND
from gist_kernels.kernels.triton import DEVICE_TYPES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize(
    ("name", "config"),
    slow_where(
        lambda name, config: "lora" in config or (config != "gist" and name != "dinov2"),
        [(name, config) for name in [*BACKBONES, "drop_path"] for config in PLAIN_CONFIGS]
        + [
            (name, config)
            for name in ("registers", "dinov2")
            for config in CONFIGS
            if config not in PLAIN_CONFIGS
        ],
    ),
)
def test_gives_what_the_backbones_own_forward_gives(name, config, dtype, own_forward):
    compare_with_own_forward(name, config, dtype, own_forward)


@pytest.mark.parametrize("name", ["vit", "registers", "dinov2", "average_pooled"])
@pytest.mark.parametrize("config", CONFIGS)
def test_is_the_backbones_own_forward_in_float64(name, config, own_forward):
    model = wrapped(name, CONFIGS[config]).double().train()
    assert "blocks 0 to 2: fused" in gist.explain(model)
    fused = results(model, images().double())
    own_forward()
    plain = results(model, images().double())
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "what"),
    [(gist.LoRA, "update"), (gist.FacT, "update"),
     (gist.AdaptFormer, "adapter")],
)  # fmt: skip
def test_dropout_is_drawn_by_the_blocks_own_forward(method, what):
    model = wrapped("vit", gist.GistConfig(method(dropout=0.1))).train()
    assert f"the block's own forward, for its {what} has dropout" in gist.explain(model)
    assert "blocks 0 to 2: fused" in gist.explain(model.eval())
    assert "blocks 0 to 2: fused" in gist.explain(
        wrapped("vit", gist.GistConfig(method(dropout=0.0))).train()
    )


def test_factors_of_an_attention_wider_than_its_tokens_run_by_hooks():
    vit = backbone()
    vit.blocks[1].attn = Attention(48, 3, attn_head_dim=32, qkv_bias=True)
    said = gist.explain(gist.wrap(vit, gist.GistConfig(gist.FacT(dropout=0.0)))).splitlines()
    assert (
        said[1]
        == "block 1: the block's own forward, for its attention is not as wide as its tokens"
    )


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, "autocast"])
@pytest.mark.parametrize(
    ("name", "config"),
    slow_where(
        lambda name, config: config != "gist",
        [
            ("vit", "gist"),
            ("registers", "prompts"),
            ("dinov2", "biases, norms, adapter, keys"),
            ("deit3_registers", "ssf"),
            ("average_pooled", "lora"),
        ],
    ),
)
def test_triton_gives_what_the_backbones_own_forward_gives(name, config, dtype, own_forward):
    compare_with_own_forward(name, config, dtype, own_forward, "triton", DEVICE_TYPES[0])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [24, 40])
def test_odd_sizes_and_a_single_image(batch, size, own_forward):
    model = wrapped("registers", dynamic_img_size=True).train()
    fused = results(model, images(batch, size))
    own_forward()
    plain = results(model, images(batch, size))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [gist.Adapter(), gist.VPT(num_tokens=3, dropout=0.0)])
def test_evaluation_gives_the_same_logits_and_all_features(method, own_forward):
    """Prompts are no features."""
    model = wrapped("vit", gist.GistConfig(method)).eval()
    with torch.no_grad():
        logits, features = model(images()), model.forward_features(images())
        own_forward()
        torch.testing.assert_close(logits, model(images()), rtol=1e-5, atol=1e-5)
        plain = model.forward_features(images())
    assert features.shape == plain.shape == (2, 18, 48)
    torch.testing.assert_close(features, plain, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_images(own_forward):
    model = wrapped().eval()
    pixels = images().requires_grad_()
    (fused,) = torch.autograd.grad(model(pixels).square().sum(), pixels)
    own_forward()
    (plain,) = torch.autograd.grad(model(pixels).square().sum(), pixels)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_what_is_trained_beside_the_method_gets_its_gradient(own_forward):
    model = wrapped().train()
    trained = {
        "position": model.backbone.pos_embed,
        "matrix": model.backbone.blocks[1].mlp.fc1.weight,
        "norm": model.backbone.blocks[2].norm1.weight,
        "final norm": model.backbone.norm.weight,
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    assert "block 1: the block's own forward, for it has trainable matrices" in gist.explain(model)
    _, fused = results(model, images())
    own_forward()
    _, plain = results(model, images())
    assert {"backbone.pos_embed", "backbone.blocks.2.norm1.weight"} <= fused.keys()
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_hooks_of_others_run():
    model = wrapped().train()
    seen = []
    model.backbone.blocks[1].attn.register_forward_hook(lambda *_: seen.append("attention"))
    model.backbone.blocks[2].register_forward_hook(lambda *_: seen.append("block"))
    model(images())
    assert seen == ["attention", "block"]
    assert gist.explain(model).splitlines() == [
        "block 0: fused sublayers, served by 'cpu'",
        "blocks 1 to 2: the block's own forward, for it carries hooks that are not gist's",
    ]


def replaced(path, part):
    def change(model):
        owner, _, name = path.rpartition(".")
        owner, new = model.backbone.blocks[0].get_submodule(owner), copy.deepcopy(part)
        carry_hooks(getattr(owner, name), new)  # without them a call raises
        setattr(owner, name, new)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced("norm1", nn.RMSNorm(48)), "its norm is a RMSNorm"),
        (replaced("attn.qkv", nn.Sequential(nn.Linear(48, 144))), "projections are not plain"),
        (replaced("attn.proj_drop", nn.Dropout(0.1)), "its attention has dropout"),
        (replaced("mlp.act", nn.Tanh()), "its MLP's activation is a Tanh"),
        (replaced("mlp.drop1", nn.Dropout(0.1)), "its MLP has dropout"),
        (replaced("mlp", nn.Linear(48, 48)), "its MLP is a Linear"),
    ],
)
def test_a_block_that_does_not_match_says_why(change, reason):
    model = wrapped().train()
    change(model)
    assert reason in gist.explain(model).splitlines()[0]
    assert "blocks 1 to 2: fused" in gist.explain(model)


def test_autocast_and_checkpointing_leave_blocks_fused():
    model = wrapped().train()
    with torch.autocast("cpu", torch.bfloat16):
        assert gist.explain(model) == "blocks 0 to 2: fused sublayers, served by 'cpu'"
    model.backbone.set_grad_checkpointing()
    assert gist.explain(model) == "blocks 0 to 2: fused sublayers, served by 'cpu'"


def data_parallel_step(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(wrapped().train())
    torch.stack(model(images(4)[rank::2])).square().mean().backward()
    if rank == 0:
        gradients = {n: p.grad for n, p in model.module.named_parameters() if p.requires_grad}
        torch.save(gradients, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    assert in_processes(data_parallel_step, tmp_path, count=2) == [0, 0]
    found = torch.load(tmp_path / "gradients.pt")
    model = wrapped().train()
    torch.stack(model(images(4))).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def counting(kernels, counted):
    """The kernels, adding up the operations of their matmuls and attentions."""

    def matmul(of):
        def count(*args):
            *_, x, weight = args[:3] if of is kernels.linear.add_linear else args[:2]
            counted.append(2 * x.shape[0] * weight.shape[0] * weight.shape[1])
            return of(*args)

        return count

    def attention(of, first, matmuls):
        def count(*args):
            q, k = args[first : first + 2]
            counted.append(matmuls * 2 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2])
            return of(*args)

        return count

    return kernels._replace(
        linear=SimpleNamespace(
            linear=matmul(kernels.linear.linear), add_linear=matmul(kernels.linear.add_linear)
        ),
        attention=SimpleNamespace(
            serves=kernels.attention.serves,
            rotates=kernels.attention.rotates,
            forward=attention(kernels.attention.forward, 0, 2),
            backward=attention(kernels.attention.backward, 1, 5),
        ),
    )


def attention_flops(products):
    """Of so many matrix products of queries with keys, from shapes (B, H, N, Dh)."""
    return lambda q, k, *_, **__: products * 2 * math.prod(q) * k[2]


# Not every release of PyTorch counts these.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops(2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda d_out, *args, **options: attention_flops(5)(*args, **options)
    ),
}


def test_a_step_needs_7_percent_fewer_operations_than_without_adapter(monkeypatch, own_forward):
    options = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_classes": 10}
    pixels = torch.randn(1, 3, 224, 224)

    def step(method):
        model = gist.wrap(backbone("vit", **options), gist.GistConfig(method)).train()
        torch.stack(model(pixels)).sum().backward()

    counted = []
    kernels = counting(BACKEND.kernels("sublayers"), counted)
    monkeypatch.setattr(functional_sublayers, "select", lambda *_: kernels)
    step(gist.Adapter(rank=4))
    # Not counted above: the patches' embedding, the head forward and backward, and 24 adapters,
    # two products forward and four backward each.
    rest = 2 * 196 * 768 * 192 + 3 * 2 * 2 * 192 * 10 + 24 * 6 * 2 * 198 * 192 * 4
    own_forward()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as token_alone:
        step(None)
    share = (sum(counted) + rest) / token_alone.get_total_flops()
    assert share <= 0.93, share
