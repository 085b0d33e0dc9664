"""What timm's models can do, a wrapped one can do too, with the backbone's result."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from models import BACKBONES, backbone, images, wrapped
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

import gist

NOTHING = gist.GistConfig(None, gist=False)
LORA = gist.GistConfig(gist.LoRA(rank=2), token_dropout=0.0)
ROTARY = {"use_rot_pos_emb": True, "global_pool": "token", "num_reg_tokens": 2}


def eva(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return timm.models.eva.Eva(**{**sizes, "num_classes": 7, **ROTARY, **options}).eval()


def distilled():
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, depth=3, num_classes=5
    ).eval()


def equal(ours, theirs, **tolerance):
    """Whether two results of forward_intermediates, nested as they are, agree."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, **tolerance)
        return
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = ours.values(), theirs.values()
    for a, b in zip(ours, theirs, strict=True):
        equal(a, b, **tolerance)


# ---- intermediate layers -----------------------------------------------------------------------

OPTIONS = [
    {},
    {"indices": 2, "norm": True},
    {"indices": [2, 0], "return_prefix_tokens": True},
    {"indices": [-2], "stop_early": True, "norm": True},
    {"indices": (1,), "stop_early": True, "return_prefix_tokens": True, "output_fmt": "NLC"},
    {"output_fmt": "NLC", "intermediates_only": True},
    {"intermediates_only": True, "return_prefix_tokens": True},
    {"output_dict": True, "return_prefix_tokens": True},
    {"output_dict": True, "intermediates_only": True},
]


def without_register(found, options):
    """Of the result of a model that has the Gist token as first register, its own tokens."""

    def prefix(tokens):
        return torch.cat((tokens[:, :1], tokens[:, 2:]), 1)

    if options.get("output_dict"):
        if "image_intermediates_prefix" in found:
            found["image_intermediates_prefix"] = [
                prefix(p) for p in found["image_intermediates_prefix"]
            ]
        return found
    if not options.get("return_prefix_tokens"):
        return found
    layers = found if options.get("intermediates_only") else found[1]
    layers = [(patches, prefix(tokens)) for patches, tokens in layers]
    return layers if options.get("intermediates_only") else (found[0], layers)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["vit", "registers"])
def test_intermediates_are_those_of_the_merged_model_without_the_token(name, options):
    model = wrapped(name, LORA).eval()
    plain = gist.merge(model)
    expected = without_register(plain.forward_intermediates(images(), **options), options)
    equal(model.forward_intermediates(images(), **options), expected, rtol=0, atol=1e-5)
    equal(model.backbone.forward_intermediates(images(), **options), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [backbone, eva, distilled])
@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_intermediates_without_added_tokens_are_the_backbones(make, options):
    vit = make().eval()
    expected = vit.forward_intermediates(images(), **options)
    equal(gist.wrap(vit, NOTHING).eval().forward_intermediates(images(), **options), expected)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (backbone, gist.GistConfig(gist.VPT(num_tokens=3))),
        (backbone, gist.GistConfig(gist.VPT(num_tokens=3, deep=False), gist=False)),
        (backbone, gist.GistConfig([gist.VPT(num_tokens=2), gist.LoRA()], num_tokens=3)),
        (eva, gist.GistConfig(num_tokens=2)),
        (distilled, gist.GistConfig()),
        (lambda: backbone(class_token=False, global_pool="avg"), gist.GistConfig()),
    ],
)
def test_intermediates_hold_the_backbones_own_tokens_alone(make, config):
    vit = make().eval()
    shapes = [x.shape for x in vit.forward_intermediates(images(), intermediates_only=True)]
    model = gist.wrap(vit, config).eval()
    held = []
    for block in vit.blocks:
        block.register_forward_hook(lambda block, args, output: held.append(output))
    features, layers = model.forward_intermediates(images())
    assert [x.shape for x in layers] == shapes
    torch.testing.assert_close(features, model.forward_features(images()))
    prompts = sum(getattr(m, "appended_tokens", 0) for m in model.attached_methods)
    added = 0 if model.token is None else model.token.count
    own = vit.num_prefix_tokens + added
    for layer, tokens in zip(layers, held, strict=False):
        if prompts and layer is not layers[-1]:
            tokens = tokens[:, :-prompts]
        assert torch.equal(layer.flatten(2).mT, tokens[:, own:])
    stopped, _ = model.forward_intermediates(images(), indices=[0], stop_early=True)
    assert stopped.shape == features.shape


@pytest.mark.parametrize("make", [backbone, eva])
def test_intermediates_at_other_image_sizes(make):
    vit = make(dynamic_img_size=True).eval()
    pixels = [images(size=size) for size in (40, 64)]
    expected = [(vit(x), vit.forward_intermediates(x)) for x in pixels]
    model = gist.wrap(copy.deepcopy(vit), NOTHING).eval()
    for x, (logits, layers) in zip(pixels, expected, strict=True):
        torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-5)
        equal(model.forward_intermediates(x), layers, rtol=0, atol=1e-5)
    model = gist.wrap(vit).eval()
    for x, (logits, (_, layers)) in zip(pixels, expected, strict=True):
        assert model(x).shape == logits.shape
        found = model.forward_intermediates(x, intermediates_only=True)
        assert [f.shape for f in found] == [f.shape for f in layers]


def test_intermediates_of_no_image():
    layers = wrapped("vit").forward_intermediates(images(0), intermediates_only=True)
    assert {x.shape for x in layers} == {(0, 48, 4, 4)}


def test_dinos_interface_and_timms_feature_extractor():
    model = wrapped("registers", LORA).eval()
    expected = model.forward_intermediates(images(), [0, 2], norm=True, intermediates_only=True)
    found = model.get_intermediate_layers(images(), [0, 2], reshape=True, norm=True)
    equal(found, expected)
    found = model.get_intermediate_layers(images(), 1, return_prefix_tokens=True)
    assert [[t.shape[1] for t in layer] for layer in found] == [[16, 5]]
    for whole in (copy.deepcopy(model), copy.deepcopy(model.backbone)):
        getter = FeatureGetterNet(whole, out_indices=(0, 2), norm=True)
        equal(getter(images()), expected)
        assert getter.feature_info.channels() == [48, 48]


def test_copies_have_their_own_intermediates():
    model = wrapped("vit").eval()
    twin = copy.deepcopy(model)
    expected = model.forward_intermediates(images())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    equal(model.forward_intermediates(images()), expected)
    assert not twin.forward_intermediates(images())[0].any()


def test_masks_have_no_place_for_the_token():
    with pytest.raises(ValueError, match="no place for the tokens that gist.wrap adds"):
        wrapped("vit").forward_intermediates(images(), is_causal=True)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC'; it is 'NHWC'"):
        wrapped("vit").forward_intermediates(images(), output_fmt="NHWC")


# ---- pruning -----------------------------------------------------------------------------------

METHODS = [
    gist.Adapter(), gist.AdaptFormer(), gist.LoRA(), gist.VPT(num_tokens=2),
    gist.VPT(num_tokens=2, deep=False), gist.SSF(), gist.FacT(), gist.RepAdapter(), gist.BitFit(),
    gist.Convpass(), gist.DiffFit(), [gist.LoRA(), gist.VPT(num_tokens=2)],
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_pruning_keeps_the_first_blocks_and_their_part_of_the_method(method, tmp_path):
    torch.manual_seed(5)
    model = wrapped("vit", gist.GistConfig(method)).eval()
    if model.method is not None:
        model.requires_grad_(True).backbone.blocks.requires_grad_(False)
    expected = model.forward_intermediates(images(), indices=[0, 1], stop_early=True)
    trained = dict(model.named_parameters())
    assert model.prune_intermediate_layers([0, 1], prune_head=False) == [0, 1]
    assert len(model.family.blocks) == 2
    equal(model.forward_intermediates(images()), expected, rtol=0, atol=1e-5)
    if model.method is not None:
        shared = [n for n, p in model.named_parameters() if p is not trained[n]]
        assert all(n.endswith(("prompts", "cores", "mixture")) for n in shared)
        assert all(p.requires_grad for p in model.method.parameters())
        count = sum(p.numel() for p in model.method.parameters())
        fresh = gist.wrap(backbone(depth=2), gist.GistConfig(method))
        assert count == sum(p.numel() for p in fresh.method.parameters())
    if not isinstance(method, gist.SSF):  # else the fresh backbone would be another
        logits = model(images())
        gist.save(model, tmp_path)
        loaded = gist.load(backbone(depth=2), tmp_path, check_weights=False)
        loaded.load_state_dict(model.state_dict())
        torch.testing.assert_close(loaded(images()), logits, rtol=0, atol=1e-5)


def test_pruning_the_head_leaves_features():
    vit = backbone()
    model = gist.wrap(copy.deepcopy(vit), NOTHING).eval()
    assert model.prune_intermediate_layers(2) == vit.prune_intermediate_layers(2) == [1, 2]
    torch.testing.assert_close(model(images()), vit(images()), rtol=0, atol=1e-5)
    model = wrapped("vit").eval()
    model.prune_intermediate_layers([1])
    assert model(images()).shape == (2, 17, 48)
    with pytest.raises(ValueError, match="nothing to train the Gist token against"):
        model.train()(images())


def test_a_refused_pruning_leaves_the_model():
    model = wrapped("vit").eval()
    expected = model(images())
    with pytest.raises(AssertionError, match="out of range"):
        model.prune_intermediate_layers([7])
    assert torch.equal(model(images()), expected)


# ---- attributes --------------------------------------------------------------------------------


def test_data_config_and_attributes_are_the_backbones():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2)
    model = gist.wrap(vit)
    ours, theirs = (timm.data.resolve_model_data_config(m) for m in (model, vit))
    assert ours == theirs
    assert ours["mean"] == (0.5, 0.5, 0.5)
    for name in (
        "default_cfg", "pretrained_cfg", "in_chans", "num_features", "head_hidden_size",
        "embed_dim", "feature_info", "global_pool", "patch_embed", "dynamic_img_size",
        "grad_checkpointing", "num_classes",
    ):  # fmt: skip
        assert getattr(model, name) is getattr(vit, name), name
    assert model.get_classifier() is vit.head
    deit = distilled()
    assert gist.wrap(deit).get_classifier() == (deit.head, deit.head_dist)


def test_what_a_backbone_lacks_the_wrapped_model_lacks():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        intermediate_size=192, num_labels=5,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    model = gist.wrap(theirs)
    assert not hasattr(model, "pretrained_cfg")
    assert model.embed_dim == 48
    assert timm.data.resolve_model_data_config(model) == timm.data.resolve_model_data_config(theirs)
    with pytest.raises(AttributeError, match="forward_intermediates"):
        model.forward_intermediates(images())
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        encoder = theirs.vit
        assert {
            m.gradient_checkpointing
            for m in encoder.modules()
            if hasattr(m, "gradient_checkpointing")
        } == {enable}
    assert model.get_classifier() is theirs.classifier
    assert model.no_weight_decay() == {"token.weight"}
    model.reset_classifier(0)
    assert model.eval()(images()).shape == (2, 48)
    with pytest.raises(ValueError, match="global_pool can't be 'avg'.*pools by 'token'"):
        model.reset_classifier(3, "avg")


def test_grad_checkpointing_is_set_on_the_backbone():
    model = wrapped("vit")
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    assert model.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.backbone.grad_checkpointing


# ---- the head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_pre_logits_are_the_classifiers_input(name):
    vit = backbone(name).eval()
    expected = vit.forward_head(vit.forward_features(images()), pre_logits=True)
    plain = gist.wrap(copy.deepcopy(vit), NOTHING).eval()
    found = plain.forward_head(plain.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    model = wrapped(name).train()
    features = model.forward_features(images())
    both = model.forward_head(features, pre_logits=True)
    logits = gist.GistOutput(*map(model.backbone.head, both))
    equal(tuple(logits), tuple(model.forward_head(features)))


def test_pre_logits_of_a_distilled_backbone_are_the_mean():
    vit = distilled()
    expected = vit.forward_head(vit.forward_features(images()), pre_logits=True)
    model = gist.wrap(vit, NOTHING).eval()
    found = model.forward_head(model.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_without_a_classifier_the_logits_are_its_input():
    vit = backbone("average_pooled").eval()
    model = gist.wrap(copy.deepcopy(vit), NOTHING).eval()
    for each in (vit, model):
        each.reset_classifier(0)
    torch.testing.assert_close(model(images()), vit(images()), rtol=0, atol=1e-5)
    model = wrapped("vit").train()
    model.reset_classifier(0)
    assert [x.shape for x in model(images())] == [(2, 48), (2, 48)]


def test_the_pooling_may_be_changed_with_the_classifier():
    vit = backbone("registers").eval()
    model = gist.wrap(copy.deepcopy(vit), NOTHING).eval()
    for each in (vit, model):
        torch.manual_seed(0)
        each.reset_classifier(4, "avg")
    torch.testing.assert_close(model(images()), vit(images()), rtol=0, atol=1e-5)
    assert model.global_pool == "avg"


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [backbone, eva])
@pytest.mark.parametrize("size", [{"img_size": (48, 48)}, {"img_size": (64, 64), "patch_size": 16}])
def test_input_size_is_set_as_on_the_backbone(make, size):
    vit = make().eval()
    model = gist.wrap(copy.deepcopy(vit), NOTHING).eval()
    for each in (vit, model):
        each.set_input_size(**size)
    pixels = images(size=size["img_size"][0])
    torch.testing.assert_close(model(pixels), vit(pixels), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".head." not in n)


@pytest.mark.parametrize("method", [gist.SSF(), gist.BitFit(), gist.Adapter()])
def test_another_patch_size_keeps_what_a_method_does_to_the_embedding(method):
    model = wrapped("vit", gist.GistConfig(method)).eval()
    trained = set(model.trainable_state_dict())
    seen = []
    handle = model.backbone.patch_embed.proj.register_forward_hook(
        lambda proj, args, kwargs, output: seen.append(kwargs), with_kwargs=True
    )
    before = model.backbone.patch_embed(images())
    with torch.no_grad():
        fresh = backbone()
        fresh.set_input_size(patch_size=16)
    model.set_input_size(patch_size=16)
    assert set(model.trainable_state_dict()) == trained
    found = model.backbone.patch_embed(images())
    assert before.shape != found.shape
    handle.remove()
    model.backbone.patch_embed(images())
    assert seen == [{}, {}]
    expected = fresh.patch_embed(images())
    if isinstance(method, gist.SSF):
        part = model.method["patch_embed"]
        expected = expected * part.scale + part.shift
    torch.testing.assert_close(found, expected)
    assert model.train()(images()).gist_logits.shape == (2, 7)


@pytest.mark.parametrize("method", [gist.Adapter(), gist.LoRA(), gist.VPT(), gist.SSF(), None])
def test_no_images_give_no_logits(method):
    model = wrapped("vit", gist.GistConfig(method))
    assert model.eval()(images(0)).shape == (0, 7)
    both = model.train()(images(0))
    assert [x.shape for x in both] == [(0, 7), (0, 7)]
    (both.cls_logits.sum() + both.gist_logits.sum()).backward()
    assert not model.token.weight.grad.any()


# ---- groups of parameters ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [LORA, gist.GistConfig(gist.SSF()), gist.GistConfig([gist.Adapter(), gist.BitFit()])],
)
@pytest.mark.parametrize("make", [backbone, eva])
def test_parameters_stand_in_the_backbones_groups_with_their_blocks(make, config):
    vit = make(qkv_fused=False) if make is eva else make()
    theirs = group_parameters(vit, vit.group_matcher(), reverse=True)
    model = gist.wrap(vit, config)
    ours = group_parameters(model, model.group_matcher(), reverse=True)
    assert {n.removeprefix("backbone."): g for n, g in ours.items() if "backbone" in n} == theirs
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name, group in ours.items():
        parts = name.removeprefix("method.adapter.").removeprefix("method.").split(".")
        if name == "token.weight" or parts[0] == "patch_embed":
            assert group == theirs["patch_embed.proj.weight"], name
        elif name.startswith("method.") and parts[0] != "norm":
            block = parts[0].split("_")[0]
            assert group == theirs[f"blocks.{block}.attn.proj.weight"], name
    assert set(group_parameters(model, model.group_matcher(coarse=True))) == set(theirs.values())


def test_layer_decay_and_weight_decay_of_timms_optimizers():
    model = gist.wrap(backbone(), gist.GistConfig(gist.Full()))
    assert model.no_weight_decay() == {
        "token.weight", "backbone.pos_embed", "backbone.cls_token", "backbone.reg_token",
        "backbone.dist_token",
    }  # fmt: skip
    optimizer = create_optimizer_v2(model, "sgd", lr=1.0, layer_decay=0.5)
    scale = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    names = dict(model.named_parameters())
    assert scale[id(names["backbone.head.weight"])][0] == 1
    assert scale[id(names["backbone.blocks.2.attn.qkv.weight"])][0] == 0.5
    assert scale[id(names["backbone.blocks.0.attn.qkv.weight"])][0] == 0.125
    assert scale[id(names["token.weight"])] == scale[id(names["backbone.pos_embed"])]


def test_names_of_a_backbone_adapted_by_peft_are_found():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    model = gist.wrap(peft.get_peft_model(backbone(), config), gist.GistConfig(None))
    assert model.no_weight_decay() <= {"token.weight"} | {
        f"backbone.base_model.model.{n}" for n in backbone().no_weight_decay()
    }
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    found = {g for n, g in groups.items() if "blocks.1." in n and "lora_A" in n}
    assert found == {groups["backbone.base_model.model.blocks.1.norm1.weight"]}
    layers = model.forward_intermediates(images(), intermediates_only=True)
    assert {x.shape for x in layers} == {(2, 48, 4, 4)}
    assert isinstance(model.get_classifier(), nn.Module)
