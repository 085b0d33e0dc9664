"""Backbones of other families than timm's plain VisionTransformer, and models adapted by others."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from models import backbone, eva, images, transformers_siglip, wrapped
from torch import nn

import gist
from gist.backbones.families import family_of

TARGET = torch.tensor([1, 4])


def transformers_model(kind, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind + "Config")(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        intermediate_size=192, num_labels=5, initializer_range=0.2, **options,
    )  # fmt: skip
    torch.manual_seed(3)
    return getattr(transformers, kind + "ForImageClassification")(config).eval()


TRANSFORMERS = {
    "ViT": {},
    "Dinov2": {"layerscale_value": 0.3},
    "Dinov2WithRegisters": {"num_register_tokens": 3, "layerscale_value": 0.3},
}


def timm_twin(model, kind):
    """A transformers model's weights in timm's VisionTransformer, with a head on the class token
    and, for DINOv2, on the patches' mean too."""
    encoder = getattr(model, model.base_model_prefix)
    registers = TRANSFORMERS[kind].get("num_register_tokens", 0)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5,
        init_values=None if kind == "ViT" else 0.3, reg_tokens=registers,
    )  # fmt: skip
    source, target = encoder.state_dict(), vit.state_dict()
    layer = "layers" if kind == "ViT" else "encoder.layer"
    norms = ("layernorm_before", "layernorm_after") if kind == "ViT" else ("norm1", "norm2")
    target["cls_token"].copy_(source["embeddings.cls_token"])
    position = source["embeddings.position_embeddings"]
    if registers:
        target["reg_token"].copy_(source["embeddings.register_tokens"])
        none = torch.zeros(1, registers, 48)
        position = torch.cat((position[:, :1], none, position[:, 1:]), 1)
    target["pos_embed"].copy_(position)
    for end in ("weight", "bias"):
        target[f"patch_embed.proj.{end}"].copy_(
            source[f"embeddings.patch_embeddings.projection.{end}"]
        )
        target[f"norm.{end}"].copy_(source[f"layernorm.{end}"])
        for i in range(2):
            block = f"{layer}.{i}"
            packed = [source[f"{block}.attention.{n}_proj.{end}"] for n in "qkv"]
            target[f"blocks.{i}.attn.qkv.{end}"].copy_(torch.cat(packed))
            target[f"blocks.{i}.attn.proj.{end}"].copy_(source[f"{block}.attention.o_proj.{end}"])
            for n, norm in enumerate(norms, 1):
                target[f"blocks.{i}.norm{n}.{end}"].copy_(source[f"{block}.{norm}.{end}"])
                target[f"blocks.{i}.mlp.fc{n}.{end}"].copy_(source[f"{block}.mlp.fc{n}.{end}"])
    if kind != "ViT":
        for i in range(2):
            for n in (1, 2):
                scale = source[f"{layer}.{i}.layer_scale{n}.lambda1"]
                target[f"blocks.{i}.ls{n}.gamma"].copy_(scale)
    vit.load_state_dict(target)
    for block in vit.blocks:
        for norm in (block.norm1, block.norm2):
            norm.eps = model.config.layer_norm_eps
    vit.norm.eps = model.config.layer_norm_eps
    return vit


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_models_give_what_timms_give_with_their_weights(kind):
    theirs = transformers_model(kind, **TRANSFORMERS[kind])
    vit, head = timm_twin(theirs, kind), theirs.classifier
    config = gist.GistConfig(gist.Adapter(rank=3, scale=0.5), token_dropout=0.0)
    theirs, ours = gist.wrap(theirs, config).train(), gist.wrap(vit, config).train()
    ours.token.load_state_dict(theirs.token.state_dict())
    ours.method.load_state_dict(theirs.method.state_dict())
    features = ours.forward_features(images())
    torch.testing.assert_close(theirs.forward_features(images()), features, rtol=0, atol=1e-5)

    cls, token = features[:, 0], features[:, 1]
    if kind != "ViT":
        patches = features[:, 2 + TRANSFORMERS[kind].get("num_register_tokens", 0) :].mean(1)
        cls, token = torch.cat((cls, patches), 1), torch.cat((token, patches), 1)
    out = theirs(images())
    torch.testing.assert_close(out.cls_logits, head(cls), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.gist_logits, head(token), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.eval()(images()), out.cls_logits, rtol=0, atol=1e-5)
    assert "blocks 0 to 1: fused sublayers" in gist.explain(theirs)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_models_without_gist_are_themselves(kind):
    theirs = transformers_model(kind, **TRANSFORMERS[kind])
    expected = theirs(images()).logits
    model = gist.wrap(theirs, gist.GistConfig(None, gist=False)).eval()
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-5)
    model.reset_classifier(9)
    assert model(images()).shape == (2, 9)
    assert model.num_classes == 9


def test_blocks_of_earlier_releases_of_transformers_have_the_same_parts():
    """transformers 5.0 has q, k and v within attention.attention, and ViT has no MLP module."""

    def holding(**parts):
        module = nn.Module()
        for name, part in parts.items():
            setattr(module, name, part)
        return module

    def dense():
        return holding(dense=nn.Linear(48, 48), dropout=nn.Dropout(0.0))

    def attention():
        qkv = {name: nn.Linear(48, 48) for name in ("query", "key", "value")}
        return holding(attention=holding(**qkv), output=dense())

    norms = {"layernorm_before": nn.LayerNorm(48), "layernorm_after": nn.LayerNorm(48)}
    vit = holding(attention=attention(), intermediate=dense(), output=dense(), **norms)
    mlp = holding(fc1=nn.Linear(48, 96), fc2=nn.Linear(96, 48))
    norms = {"norm1": nn.LayerNorm(48), "norm2": nn.LayerNorm(48)}
    dinov2 = holding(attention=attention(), mlp=mlp, drop_path=nn.Identity(), **norms)
    for kind, block in (("ViT", vit), ("Dinov2", dinov2)):
        model = transformers_model(kind)
        family = family_of(model)
        family.blocks[0] = block
        parts = family.parts(0)
        own = block.attention.attention
        expected = {
            "q": own.query,
            "k": own.key,
            "v": own.value,
            "proj": block.attention.output.dense,
        }
        if kind == "ViT":
            expected |= {"fc1": vit.intermediate.dense, "fc2": vit.output.dense}
            assert parts.branch_outputs == (vit.attention.output.dropout, vit.output.dropout)
        else:
            expected |= {"fc1": mlp.fc1, "fc2": mlp.fc2}
            assert parts.branch_outputs == (dinov2.drop_path, dinov2.drop_path)
        assert {name: found.layer for name, found in parts.projections.items()} == expected
        assert parts.norms == tuple(m for m in block.children() if isinstance(m, nn.LayerNorm))


def test_siglip_pools_the_patches_and_the_token_alone():
    transformers = pytest.importorskip("transformers")
    plain = transformers_siglip()
    expected = plain.eval()(images()).logits
    alone = gist.wrap(copy.deepcopy(plain), gist.GistConfig(None, gist=False)).eval()
    torch.testing.assert_close(alone(images()), expected, rtol=0, atol=1e-5)
    model = gist.wrap(plain, gist.GistConfig(None, token_dropout=0.0)).train()
    features = model.forward_features(images())
    assert features.shape == (2, 17, 48)
    out, head = model(images()), model.backbone.classifier
    torch.testing.assert_close(out.gist_logits, head(features[:, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.cls_logits, head(features[:, 1:].mean(1)), rtol=0, atol=1e-5)
    model.reset_classifier(9)
    assert model.eval()(images()).shape == (2, 9)
    assert type(plain) is transformers.SiglipForImageClassification


def test_a_timm_model_within_a_wrapper_of_transformers_is_named():
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=5, model_args={"depth": 2}
    )
    wrapper = transformers.TimmWrapperForImageClassification(config)
    with pytest.raises(TypeError, match=r"give its backbone\.timm_model"):
        gist.wrap(wrapper)
    assert "fused" in gist.explain(gist.wrap(wrapper.timm_model))


def test_a_distilled_backbones_two_heads_both_see_the_gist_token():
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=5)
    model = gist.wrap(vit, gist.GistConfig(token_dropout=0.0))
    assert gist.count_parameters(model).head == 2 * (192 * 5 + 5)
    features = model.train().forward_features(images())
    out = model(images())
    expected = (vit.head(features[:, 0]) + vit.head_dist(features[:, 2])) / 2
    torch.testing.assert_close(out.cls_logits, expected)
    expected = (vit.head(features[:, 1]) + vit.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(out.gist_logits, expected)
    torch.testing.assert_close(model.eval()(images()), out.cls_logits)


def test_average_pooling_needs_no_class_token():
    model = wrapped("vit", class_token=False, global_pool="avg").train()
    features = model.forward_features(images())
    assert features.shape[1] == 1 + 16
    out, head = model(images()), model.backbone.head
    normed = model.backbone.fc_norm
    torch.testing.assert_close(out.gist_logits, head(normed(features[:, 0])))
    torch.testing.assert_close(out.cls_logits, head(normed(features[:, 1:].mean(1))))
    gist.GistLoss()(out, TARGET).backward()
    assert model.token.weight.grad.abs().max() > 0


# ---- rotary positions --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"qkv_fused": False}, {"attn_type": "rope"}])
def test_rotary_positions_stay_with_their_patches(options):
    model = gist.wrap(eva(**options), gist.GistConfig(token_dropout=0.0)).eval()
    # Tokens in another order and the positions with them: only the prefix is known to have none.
    vit, x = model.backbone, torch.randn(2, 18, 48)
    _, rope = vit._pos_embed(vit.patch_embed(images()))
    attn = vit.blocks[0].attn
    swapped = x[:, [1, 0, *range(2, 18)]]
    out, other = attn(x, rope=rope), attn(swapped, rope=rope)
    torch.testing.assert_close(out[:, 2:], other[:, 2:])
    torch.testing.assert_close(out[:, [1, 0]], other[:, :2])
    assert model(images()).shape == (2, 5)
    before = attn.num_prefix_tokens
    assert (
        gist.merge(gist.wrap(eva(**options), gist.GistConfig(None)), drop_token=True)
        .blocks[0]
        .attn.num_prefix_tokens
        == before - 1
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (gist.Adapter(), {}),
        (gist.LoRA(targets=("proj", "fc1")), {}),
        (gist.LoRA(), {"qkv_fused": False}),
        (gist.RepAdapter(), {}),
        (gist.Convpass(), {}),
        (gist.DiffFit(), {}),
        (gist.FacT(), {"qkv_fused": False}),
        (gist.BitFit(), {}),
        (gist.LoRA(), {}),
    ],
)
def test_methods_train_rotary_backbones(method, options):
    model = gist.wrap(eva(**options), gist.GistConfig(method)).train()
    gist.GistLoss()(model(images()), TARGET).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert gist.count_parameters(model).method == method.num_parameters(model.family)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (gist.VPT(), "rotary positions of a Eva"),
        (gist.SSF(), "SSF changes the biases of queries, keys and values"),
    ],
)
def test_methods_that_do_not_fit_rotary_backbones(method, message):
    vit = eva()
    with pytest.raises(ValueError, match=message):
        gist.wrap(vit, gist.GistConfig(method))
    assert method.name not in gist.available_methods(vit)


# ---- adapted by HF PEFT ------------------------------------------------------------------------


def lora_by_peft(kind):
    peft = pytest.importorskip("peft")
    if kind == "timm":
        vit = backbone()
        targets, head = ["qkv"], "head"
    else:
        vit, targets, head = transformers_model("ViT"), ["q_proj", "v_proj"], "classifier"
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=[head], lora_alpha=4,
                             init_lora_weights=False)  # fmt: skip
    return peft.get_peft_model(vit, config)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_model_adapted_by_peft_gets_token_and_loss(kind, tmp_path):
    adapted = lora_by_peft(kind)
    expected = copy.deepcopy(adapted).eval()(images())
    expected = getattr(expected, "logits", expected)
    plain = gist.wrap(copy.deepcopy(adapted), gist.GistConfig(None, gist=False)).eval()
    torch.testing.assert_close(plain(images()), expected)

    model = gist.wrap(adapted, gist.GistConfig(None)).train()
    counted = gist.count_parameters(model)
    assert counted.token == 48
    width = 3 * 48 if kind == "timm" else 48
    assert counted.method == (3 if kind == "timm" else 2) * (1 if kind == "timm" else 2) * 2 * (
        48 + width
    )
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gist.GistLoss()(model(images()), TARGET).backward()
    optimizer.step()
    trained = model.trainable_state_dict()
    assert any("lora_A" in name for name in trained)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name

    gist.save(model.eval(), tmp_path)
    loaded = gist.load(lora_by_peft(kind), tmp_path)
    assert torch.equal(loaded(images()), model(images()))
    for classes in (model.num_classes, 3):
        model.reset_classifier(classes)
        gist.save(model, tmp_path)
        loaded = gist.load(lora_by_peft(kind), tmp_path)
        assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize("kind", ["timm", "transformers"])
@pytest.mark.parametrize("config", [gist.GistConfig(None, gist=False), gist.GistConfig(None)])
def test_a_model_adapted_by_peft_is_merged_by_peft(kind, config):
    keep = config.gist and kind == "timm"
    model = gist.wrap(lora_by_peft(kind), config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = gist.merge(model, drop_token=config.gist and not keep)
    fresh = backbone(reg_tokens=int(keep)) if kind == "timm" else transformers_model("ViT")
    assert type(plain) is type(fresh)
    fresh.load_state_dict(plain.state_dict())  # every name, and no other
    for merged in (plain, fresh.eval()):
        logits = merged(images())
        logits = getattr(logits, "logits", logits)
        if keep or not config.gist:
            torch.testing.assert_close(logits, model(images()), rtol=0, atol=1e-5)
    head = "head" if kind == "timm" else "classifier"
    trained = f"backbone.base_model.model.{head}.modules_to_save.default.weight"
    assert torch.equal(plain.get_submodule(head).weight, before[trained])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_pefts_adapters_are_merged_before_a_method_of_gist():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["fc2"], init_lora_weights=False)
    adapted = peft.get_peft_model(backbone(), config)
    model = gist.wrap(adapted, gist.GistConfig(gist.LoRA(rank=2), token_dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in model.method.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.testing.assert_close(gist.merge(model)(images()), model(images()), rtol=0, atol=1e-5)


def test_what_peft_cannot_merge_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], lora_bias=True)
    model = gist.wrap(peft.get_peft_model(backbone(), config), gist.GistConfig(None, gist=False))
    qkv = model.family.blocks[0].attn.qkv
    with torch.no_grad():
        qkv.lora_A["default"].weight.fill_(math.inf)
    with pytest.raises(ValueError, match="HF PEFT can't merge its LORA into this backbone: .*NaN"):
        gist.merge(model)
    assert model.family.blocks[0].attn.qkv is qkv


# ---- the Gist token's options ------------------------------------------------------------------


def test_several_tokens_are_classified_by_their_mean():
    config = gist.GistConfig(gist.Adapter(rank=2), num_tokens=3, token_dropout=0.0)
    model = wrapped("registers", config).train()
    assert gist.count_parameters(model).token == 3 * 48
    features = model.forward_features(images())
    assert features.shape[1] == 3 + model.backbone.num_prefix_tokens + 16
    out = model(images())
    torch.testing.assert_close(out.gist_logits, model.backbone.head(features[:, 1:4].mean(1)))
    torch.testing.assert_close(out.cls_logits, model.backbone.head(features[:, 0]))


@pytest.mark.parametrize("init", ["uniform", "normal", "zeros", "class"])
def test_tokens_start_as_told(init):
    vit = backbone(embed_dim=192)
    token = gist.wrap(vit, gist.GistConfig(None, num_tokens=50, token_init=init)).token.weight
    if init == "class":
        expected = (vit.cls_token + vit.pos_embed[:, :1]).expand(1, 50, -1)
        assert torch.equal(token, expected)
        return
    spread = {"uniform": 1 / math.sqrt(12), "normal": 0.02, "zeros": 0}[init]
    assert token.std().item() == pytest.approx(spread, rel=0.03)
    assert token.abs().max() <= (0.5 if init == "uniform" else 0.2)


def test_a_separate_head_starts_as_the_shared_one(tmp_path):
    config = gist.GistConfig(gist.Adapter(rank=2), separate_head=True, token_dropout=0.0)
    model = wrapped("vit", config).train()
    shared = wrapped("vit", gist.GistConfig(gist.Adapter(rank=2), token_dropout=0.0)).train()
    shared.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(images()).gist_logits, shared(images()).gist_logits)
    assert gist.count_parameters(model).head == 2 * gist.count_parameters(shared).head
    model(images()).gist_logits.sum().backward()
    assert model.backbone.head.weight.grad is None
    assert model.gist_head.weight.grad.abs().max() > 0
    with torch.no_grad():
        model.gist_head.weight.add_(1)
    gist.save(model.eval(), tmp_path)
    loaded = gist.load(backbone(), tmp_path)
    assert torch.equal(loaded.gist_head.weight, model.gist_head.weight)


@pytest.mark.parametrize("side", ["cls", "gist"])
def test_the_loss_may_leave_one_side_to_its_cross_entropy(side):
    torch.manual_seed(0)
    logits = {name: torch.randn(4, 6, requires_grad=True) for name in ("cls", "gist")}
    target = torch.tensor([0, 5, -100, 2])
    out = gist.GistOutput(logits["cls"], logits["gist"])
    whole, cut = gist.GistLoss(label_smoothing=0.1), gist.GistLoss(label_smoothing=0.1, detach=side)
    torch.testing.assert_close(cut(out, target), whole(out, target))
    of_cut = torch.autograd.grad(cut(out, target), list(logits.values()))
    of_whole = torch.autograd.grad(whole(out, target), list(logits.values()))
    alone = torch.nn.functional.cross_entropy(logits[side], target, label_smoothing=0.1)
    weight = {"cls": 1.0, "gist": 0.5}[side]
    (of_alone,) = torch.autograd.grad(weight * alone, logits[side])
    for name, ours, full in zip(logits, of_cut, of_whole, strict=True):
        torch.testing.assert_close(ours, of_alone if name == side else full)
    with pytest.raises(ValueError, match="detach must be"):
        gist.GistLoss(detach="both")


@pytest.mark.parametrize("make", ["attention_pooled", "eva"])
def test_pooling_by_attention_pools_the_gist_token_alone(make):
    """With one key, attention's weight is 1: what is left of the pool is written out here."""
    plain = backbone(make) if make != "eva" else eva(global_pool="map", class_token=False)
    config = gist.GistConfig(gist.Adapter(rank=4), token_dropout=0.0)
    model = gist.wrap(copy.deepcopy(plain), config).train().double()
    pool = model.backbone.attn_pool
    out = model(images().double())

    token = model.forward_features(images().double())[:, 0]
    value = pool.kv(token).chunk(2, dim=-1)[1]
    pooled = pool.proj(value)
    pooled = pooled + pool.mlp(pool.norm(pooled))
    expected = model.backbone.head(model.backbone.fc_norm(pooled))
    torch.testing.assert_close(out.gist_logits, expected, rtol=1e-9, atol=1e-9)
    assert (out.cls_logits - out.gist_logits).abs().max() > 1e-3

    (gradient,) = torch.autograd.grad(out.gist_logits.square().sum(), model.token.weight)
    assert gradient.abs().max() > 1e-6
