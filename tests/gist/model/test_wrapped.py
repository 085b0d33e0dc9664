"""gist.wrap against a plain transcription of the method, over the backbones it claims to take."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from models import BACKBONES, TINY, backbone, images, wrapped
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import gist

# ---- the method as published, written out with elementary operations -------------------------


def layer_norm(x, norm):
    if isinstance(norm, nn.Identity):
        return x
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x, attn):
    batch, tokens, width = x.shape
    qkv = linear(x, attn.qkv).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = layer_norm(q, attn.q_norm), layer_norm(k, attn.k_norm)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return linear((weights @ v).transpose(1, 2).reshape(batch, tokens, width), attn.proj)


def layer_scale(x, scale):
    return x if isinstance(scale, nn.Identity) else x * scale.gamma


def published_forward(model: gist.GistModel, pixels: torch.Tensor):
    """Both logits for a batch, from the equations and the model's weights alone."""
    vit = model.backbone
    batch, side = len(pixels), TINY["patch_size"]
    grid = pixels.shape[-1] // side
    patches = pixels.reshape(batch, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
    conv = vit.patch_embed.proj
    x = patches.reshape(batch, grid * grid, -1) @ conv.weight.flatten(1).T
    x = x if conv.bias is None else x + conv.bias
    prefix = [vit.cls_token.expand(batch, -1, -1)]
    if vit.reg_token is not None:
        prefix.append(vit.reg_token.expand(batch, -1, -1))
    prefix = torch.cat(prefix, 1)
    if vit.pos_embed is None:
        x = torch.cat([prefix, x], 1)
    elif vit.no_embed_class:
        x = torch.cat([prefix, x + vit.pos_embed], 1)
    else:
        x = torch.cat([prefix, x], 1) + vit.pos_embed
    x = layer_norm(x, vit.norm_pre)
    if model.token is not None:
        x = torch.cat([x[:, :1], model.token.weight.expand(batch, -1, -1), x[:, 1:]], 1)

    for index, block in enumerate(vit.blocks):

        def adapter(z, index=index):
            if model.method is None:
                return 0
            part = model.method[index]
            return part.scale * linear(gelu(linear(z, part.down)), part.up)

        x = (
            x
            + layer_scale(attention(layer_norm(x, block.norm1), block.attn), block.ls1)
            + adapter(x)
        )
        hidden = gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1))
        x = x + layer_scale(linear(hidden, block.mlp.fc2), block.ls2) + adapter(x)

    x = layer_norm(x, vit.norm)
    gist_token = x[:, 1] if model.token is not None else None
    if model.token is not None:
        x = torch.cat([x[:, :1], x[:, 2:]], 1)
    pooled = x[:, 0] if vit.global_pool == "token" else x[:, vit.num_prefix_tokens :].mean(1)
    cls_logits = linear(layer_norm(pooled, vit.fc_norm), vit.head)
    if gist_token is None:
        return cls_logits, None
    return cls_logits, linear(layer_norm(gist_token, vit.fc_norm), vit.head)


# Pooling by attention is written out in tests/gist/backbones/test_families.py.
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "attention_pooled"])
def test_reproduces_the_published_equations(name):
    model = wrapped(name)
    exact_cls, exact_gist = published_forward(copy.deepcopy(model).double(), images().double())
    out = model.train()(images())
    assert isinstance(out, gist.GistOutput)
    torch.testing.assert_close(out.cls_logits.double(), exact_cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.gist_logits.double(), exact_gist, rtol=0, atol=1e-5)
    assert (exact_cls - exact_gist).abs().max() > 0.1  # the two heads do see different tokens
    torch.testing.assert_close(model.eval()(images()), out.cls_logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["vit", "dinov2", "average_pooled"])
def test_gradients_are_those_of_the_published_equations(name):
    model = wrapped(name).double().train()
    target = torch.tensor([3, 5])
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(gist.GistLoss()(model(images().double()), target), parameters)
    published = gist.GistOutput(*published_forward(model, images().double()))
    exact = torch.autograd.grad(gist.GistLoss()(published, target), parameters)
    for a, b in zip(ours, exact, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("config", [
    gist.GistConfig(gist=False),
    gist.GistConfig(method=None, gist=False),
    gist.GistConfig(method=None, gist=True, token_dropout=0.0),
])  # fmt: skip
def test_method_and_token_may_be_left_out(config):
    model = wrapped("vit", config).train()
    exact, exact_gist = published_forward(copy.deepcopy(model).double(), images().double())
    out = model(images())
    if config.gist:
        torch.testing.assert_close(out.gist_logits.double(), exact_gist, rtol=0, atol=1e-5)
        out = out.cls_logits
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    assert isinstance(model.eval()(images()), torch.Tensor)


def test_image_size_may_vary_where_the_backbone_allows_it():
    model = wrapped("vit", dynamic_img_size=True).train()
    for size in (32, 40, 64):
        assert model(images(size=size)).gist_logits.shape == (2, 7)
    plain = wrapped("vit").train()(images())
    torch.testing.assert_close(model(images()).cls_logits, plain.cls_logits)


def test_gist_token_does_not_leak_into_average_pooling():
    model = wrapped("average_pooled", gist.GistConfig(method=None)).eval()
    features = model.forward_features(images())
    changed = features.clone()
    changed[:, 1] += 1e3
    assert torch.equal(model.forward_head(features), model.forward_head(changed))
    model.train()
    before, after = model.forward_head(features), model.forward_head(changed)
    assert torch.equal(before.cls_logits, after.cls_logits)
    assert not torch.allclose(before.gist_logits, after.gist_logits)


def test_drop_path_never_drops_the_adapter():
    model = wrapped("vit", gist.GistConfig(gist.Adapter(rank=2), gist=False), drop_path_rate=0.5)
    for block in model.backbone.blocks:
        for drop_path in (block.drop_path1, block.drop_path2):
            if not isinstance(drop_path, nn.Identity):
                drop_path.drop_prob, drop_path.scale_by_keep = 1.0, False
    block, adapter = model.backbone.blocks[-1].train(), model.method[-1]
    x = torch.randn(2, 5, 48)
    middle = x + adapter(x)
    torch.testing.assert_close(block(x), middle + adapter(middle))


def test_token_dropout_acts_in_training_alone_and_for_each_image():
    config = gist.GistConfig(method=None, token_dropout=0.5)
    token = wrapped("vit", config).token
    with torch.no_grad():
        token.weight.fill_(1)
    x = torch.zeros(64, 3, 48)
    inserted = token.train()(x)[:, 1]
    assert set(inserted.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(inserted[0], inserted[1])
    assert (token.eval()(x)[:, 1] == 1).all()
    assert torch.equal(token.remove(token(x)), x)


# ---- what is trained ---------------------------------------------------------------------------


def test_parameter_counts_of_vit_b16_are_the_published_ones():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
        frozen = sum(p.numel() for p in vit.parameters()) - 76_900
        with_gist = gist.count_parameters(gist.wrap(vit))
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
        without = gist.count_parameters(gist.wrap(vit, gist.GistConfig(gist=False)))
    assert with_gist == gist.ParameterCount(method=82_992, token=768, head=76_900, frozen=frozen)
    assert without == with_gist._replace(token=0)
    assert with_gist.trainable - without.trainable == 768
    assert "82,992" in str(with_gist)


@pytest.mark.parametrize("use_gist", [True, False])
def test_a_step_changes_the_trainables_and_nothing_else(use_gist):
    model = wrapped("deit3_registers", gist.GistConfig(gist=use_gist)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainable = set(model.trainable_state_dict())
    assert trainable == {k for k in before if not k.startswith("backbone.") or ".head." in k}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    gist.GistLoss()(model(images()), torch.tensor([1, 4])).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trainable), name


def test_the_backbones_forward_and_state_dict_stay_its_own():
    vit = backbone()
    names = list(vit.state_dict())
    model = gist.wrap(vit)
    assert list(vit.state_dict()) == names
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.num_prefix_tokens == vit.num_prefix_tokens + 1


def test_copies_are_independent():
    model = wrapped("vit").eval()
    twin = copy.deepcopy(model)
    expected = model(images())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(images()), expected)
    assert (twin(images()) == 0).all()


def test_classifier_may_be_reset():
    model = wrapped("vit").eval()
    model.reset_classifier(11)
    assert model(images()).shape == (2, 11)
    assert model.num_classes == 11
    assert {"backbone.head.weight", "backbone.head.bias"} <= set(model.trainable_state_dict())
    with pytest.raises(ValueError, match="num_classes must be at least 0; it is -1"):
        model.reset_classifier(-1)


def test_printing_a_model_says_what_is_trained():
    text = str(wrapped("vit", gist.GistConfig([gist.LoRA(rank=2), gist.BitFit()])))
    lora, bitfit = 3 * 2 * 2 * (48 + 48), 3 * 11 * 48 + 2 * 48
    assert f"trained: lora {lora:,}, bitfit {bitfit:,}, token 48, head 343" in text.splitlines()[1]
    text = str(wrapped("vit", gist.GistConfig(None, gist=False)))
    assert "trained: head 343; frozen: " in text.splitlines()[1]


# ---- how it is run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [gist.Adapter(), gist.LoRA(), gist.VPT(dropout=0.2), gist.AdaptFormer(), gist.BitFit(), None],
)
def test_activation_checkpointing_gives_the_same_gradients(method):
    def gradients(checkpointing):
        config = gist.GistConfig(method, token_dropout=0.3)
        model = wrapped("vit", config, drop_path_rate=0.3).train()
        model.backbone.set_grad_checkpointing(checkpointing)
        held = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.append(t.numel()) or t, lambda t: t
        ):
            loss = gist.GistLoss()(model(images()), torch.tensor([1, 4]))
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, sum(held)

    (plain, held), (checkpointed, held_less) = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
    assert held_less < held / 2


@pytest.mark.parametrize("fused", [True, False])
def test_reentrant_checkpoints_train_behind_a_frozen_embedding(fused):
    def gradients(checkpointing):
        model = wrapped("vit").train()
        if not fused:
            model.backbone.norm.register_forward_hook(lambda *_: None)
        model.set_grad_checkpointing(checkpointing)
        gist.GistLoss()(model(images()), torch.tensor([1, 4])).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, before = gradients(False), timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    try:
        checkpointed = gradients(True)
    finally:
        timm.layers.set_reentrant_ckpt(before)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_autocast_and_half_precision_backbones():
    exact = wrapped("vit").train()(images())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = wrapped("vit").train()(images())
    torch.testing.assert_close(mixed.cls_logits.float(), exact.cls_logits, rtol=0.1, atol=0.3)

    vit = backbone().bfloat16()
    model = gist.wrap(vit).train()
    assert model.token.weight.dtype == model.method[0].down.weight.dtype == torch.float32
    gist.GistLoss()(model(images().bfloat16()), torch.tensor([1, 4])).backward()
    assert model.token.weight.grad.isfinite().all()


# ---- what is refused ---------------------------------------------------------------------------


def naflex():
    naflexvit = pytest.importorskip("timm.models.naflexvit")
    return naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(embed_dim=48, depth=1, num_heads=3))


def positioned_pool():
    model = backbone(global_pool="map", class_token=False)
    model.attn_pool.pos_embed = nn.Parameter(torch.zeros(16, 48))
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), TypeError, "timm's VisionTransformer.*it is a Linear"),
        (lambda: timm.create_model("test_convnext"), TypeError, "ConvNeXt, which has no sequence"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1), TypeError, "a Beit, its att"),
        (naflex, TypeError, "a NaFlexVit, its batches mask the patches"),
        (lambda: backbone(num_classes=0), ValueError, "no linear classifier"),
        (lambda: backbone(global_pool=""), ValueError, "no pooling"),
        (positioned_pool, ValueError, "pools by attention .* a position for each patch"),
        (
            lambda: backbone(block_fn=ParallelScalingBlock),
            ValueError,
            "blocks.0 .* ParallelScaling",
        ),
        (lambda: wrapped("vit").backbone, ValueError, "carries hooks"),
    ],
)
def test_backbones_that_do_not_fit_are_refused_and_left_alone(make, error, message):
    model = make()
    trainable = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(error, match=message):
        gist.wrap(model)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gist.GistConfig(method="adapter"), TypeError, "method must be a PEFT method"),
        (lambda: gist.GistConfig(token_dropout=1.0), ValueError, "token_dropout"),
        (lambda: gist.Adapter(rank=0), ValueError, "rank must be an integer of at least 1"),
        (lambda: gist.Adapter(rank=2.0), ValueError, "rank"),
        (lambda: gist.Adapter(scale=math.nan), ValueError, "scale must be finite"),
        (lambda: gist.Adapter(activation="gellu"), ValueError, "did you mean 'gelu'"),
    ],
)
def test_configs_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_loss_of_plain_logits_is_cross_entropy():
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, -100, 2])
    loss = gist.GistLoss(label_smoothing=0.1)(logits, target)
    expected = nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch32_clip_224",
        "beit3_base_patch16_224",
        "test_vit",
    ],
)
def test_timms_own_models_are_taken(name):
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=5)
        pixels = torch.empty(2, 3, *vit.patch_embed.img_size)
    model, width = gist.wrap(vit), vit.embed_dim
    assert model.train()(pixels).gist_logits.shape == (2, 5)
    assert model.eval()(pixels).shape == (2, 5)
    counted = gist.count_parameters(model)
    assert counted.token == width
    assert counted.method == len(vit.blocks) * (2 * width * 4 + 4 + width)


def test_anatomy_is_the_familys_earlier_name():
    model = wrapped()
    assert type(model.anatomy) is type(model.family)
    assert model.anatomy.model is model.family.model is model.backbone
    with pytest.raises(AttributeError):
        model.anatomy = None


def test_images_may_be_given_by_transformers_name():
    model = wrapped().eval()
    name = model.family.main_input_name
    assert name == "pixel_values"
    assert torch.equal(model(**{name: images()}), model(images()))
    assert torch.equal(
        model.forward_features(pixel_values=images()), model.forward_features(images())
    )
    for given, message in (
        ({}, "give pixel_values once, by position or by name; got no input"),
        ({"images": images(), "pixel_values": images()}, "got pixel_values and a position"),
        ({"images": images(), "mask": None}, "a VisionTransformer takes images only; remove mask"),
    ):
        with pytest.raises(TypeError, match=message):
            model(**given)
