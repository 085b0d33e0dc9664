"""Every PEFT method on every family of backbones, and each against its publication's equations."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from models import FAMILIES, METHOD_CONFIGS, backbone, images, made, wrapped

import gist

START_AT_THE_BACKBONE = {
    "adaptformer", "lora", "fact", "repadapter", "convpass", "bitfit", "layernorm", "difffit",
    "full", "none", "lora, all", "fact, tk",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_gist", [True, False])
@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_a_step_trains_what_the_method_names_and_a_file_keeps_it(
    method, use_gist, family, tmp_path
):
    config = gist.GistConfig(METHOD_CONFIGS[method], gist=use_gist)
    vit, pixels = made(family)
    pristine = copy.deepcopy(vit)
    model = gist.wrap(vit, config).train()

    family, counted = model.family, gist.count_parameters(model)
    assert counted.method == sum(m.num_parameters(family) for m in config.methods)
    assert counted.token == (family.embed_dim if use_gist else 0)
    trainable = model.trainable_state_dict()
    assert sum(t.numel() for t in trainable.values()) == counted.trainable
    assert sum(p.numel() for p in model.parameters()) == counted.trainable + counted.frozen

    before = {name: value.clone() for name, value in model.state_dict().items()}
    # Its steps are as large for DINOv2's small gradients, whose LayerScale starts at 1e-5.
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), eps=1e-30)
    for _ in range(2):  # of factors one of which starts at 0 the other moves in the second step
        optimizer.zero_grad()
        gist.GistLoss()(model(pixels), torch.tensor([1, 4])).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    for name, value in model.state_dict().items():
        # What adds the same to every key moves no softmax.
        if name.endswith("k_proj.bias"):
            continue
        assert torch.equal(value, before[name]) == (name not in trainable), name

    gist.save(model.eval(), tmp_path)
    loaded = gist.load(pristine, tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded(pixels), model(pixels))


@pytest.mark.parametrize("family", ["timm DINOv2-S", "transformers ViT"])
@pytest.mark.parametrize("method", sorted(START_AT_THE_BACKBONE))
def test_methods_that_start_at_zero_leave_the_logits_as_they_were(method, family):
    vit, pixels = made(family)
    expected = vit.eval()(pixels)
    expected = getattr(expected, "logits", expected)
    model = gist.wrap(vit, gist.GistConfig(METHOD_CONFIGS[method], gist=False)).eval()
    torch.testing.assert_close(model(pixels), expected, rtol=0, atol=2e-6)


def test_every_method_is_offered_with_its_count():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=10)
    assert gist.available_methods(vit) == {
        "adapter": 82_992,
        "adaptformer": 12 * (2 * 768 * 64 + 64 + 768),
        "lora": 12 * 2 * 8 * (768 + 768),
        "vpt": 12 * 5 * 768,
        "ssf": 205_824,
        "fact": 2 * 768 * 16 + 144 * 16**2,
        "repadapter": 24 * (768 * 8 + 8 + 768 * 4 + 768),
        "convpass": 24 * (2 * 768 * 8 + 768 + 9 * 8**2 + 2 * 8),
        "bitfit": 102_912,
        "layernorm": 38_400,
        "difffit": 102_912 + 25 * 768 + 24 * 768,
        "full": 85_798_656,
    }


# ---- each method's equations, written out over one block's weights -----------------------------


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class Published:
    """A plain ViT's forward in elementary operations; a method overrides what it changes."""

    def __init__(self, model):
        self.vit, self.own = model.backbone, dict(model.method.named_parameters())
        self.config = model.config.method

    def norm(self, place, x, norm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    def linear(self, place, x, weight, bias):
        return x @ weight.T + bias

    def beside(self, index, sublayer, x):
        return 0

    def after(self, index, sublayer, update):
        return update

    def enter(self, index, x):
        return x

    def patches(self, x):
        return x

    def attention(self, index, x):
        attn = self.vit.blocks[index].attn
        q, k, v = (
            self.linear((index, name), x, weight, bias).unflatten(-1, (attn.num_heads, -1))
            for name, weight, bias in zip(
                "qkv", attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True
            )
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        return self.linear((index, "proj"), mixed, attn.proj.weight, attn.proj.bias)

    def mlp(self, index, x):
        mlp = self.vit.blocks[index].mlp
        hidden = gelu(self.linear((index, "fc1"), x, mlp.fc1.weight, mlp.fc1.bias))
        return self.linear((index, "fc2"), hidden, mlp.fc2.weight, mlp.fc2.bias)

    def __call__(self, pixels):
        vit = self.vit
        x = F.conv2d(pixels, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=8)
        x = self.patches(x.flatten(2).mT)
        x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), 1) + vit.pos_embed
        for index, block in enumerate(vit.blocks):
            x = self.enter(index, x)
            for sublayer, function, norm in (
                ("attention", self.attention, block.norm1),
                ("mlp", self.mlp, block.norm2),
            ):
                n = self.norm((index, sublayer), x, norm)
                update = self.after(index, sublayer, function(index, n))
                x = x + update + self.beside(index, sublayer, x)
        x = self.norm("final", x, vit.norm)
        return x[:, 0] @ vit.head.weight.T + vit.head.bias


class PublishedAdapter(Published):
    def bottleneck(self, name, x):
        own = self.own
        hidden = gelu(x @ own[f"{name}.down.weight"].T + own[f"{name}.down.bias"])
        return self.config.scale * (hidden @ own[f"{name}.up.weight"].T + own[f"{name}.up.bias"])


class ParallelAdapter(PublishedAdapter):
    def beside(self, index, sublayer, x):
        return self.bottleneck(f"{index}.{sublayer}", x)


class SequentialAdapter(PublishedAdapter):
    def after(self, index, sublayer, update):
        return update + self.bottleneck(f"{index}.{sublayer}", update)


class PublishedAdaptFormer(Published):
    def beside(self, index, sublayer, x):
        if sublayer == "attention":
            return 0
        own = self.own
        hidden = (x @ own[f"{index}.down.weight"].T + own[f"{index}.down.bias"]).clamp(min=0)
        return self.config.scale * (hidden @ own[f"{index}.up.weight"].T + own[f"{index}.up.bias"])


class PublishedLoRA(Published):
    def linear(self, place, x, weight, bias):
        index, target = place
        if target in self.config.targets:
            a, b = self.own[f"{index}.{target}.down"], self.own[f"{index}.{target}.up"]
            weight = weight + self.config.alpha / self.config.rank * b @ a
        return super().linear(place, x, weight, bias)


class PublishedSSF(Published):
    def scaled(self, name, y, columns=slice(None)):
        return y * self.own[f"{name}.scale"][columns] + self.own[f"{name}.shift"][columns]

    def patches(self, x):
        return self.scaled("patch_embed", x)

    def norm(self, place, x, norm):
        name = "norm" if place == "final" else f"{place[0]}_norm{1 + (place[1] == 'mlp')}"
        return self.scaled(name, super().norm(place, x, norm))

    def linear(self, place, x, weight, bias):
        index, name = place
        y = super().linear(place, x, weight, bias)
        if name in "qkv":
            start = "qkv".index(name) * y.shape[-1]
            return self.scaled(f"{index}_qkv", y, slice(start, start + y.shape[-1]))
        return self.scaled(f"{index}_{name}", y)


class PublishedVPT(Published):
    def enter(self, index, x):
        prompts = self.own["prompts"]
        if index >= len(prompts):
            return x
        patches = x[:, 1 : 1 + 16]
        prompts = prompts[index].expand(len(x), -1, -1)
        return torch.cat((x[:, :1], patches, prompts), 1)


class PublishedFacT(Published):
    """All matrices as slices of one tensor of third order, in the order q, k, v, proj, fc1, fc2."""

    def tensor(self):
        own, u, v = self.own, self.own["u"], self.own["v"]
        if self.config.form == "tt":
            return torch.einsum("ia,kab,ob->kio", u, own["cores"], v)
        return torch.einsum("ia,kr,rab,ob->kio", u, own["mixture"], own["core"], v)

    def linear(self, place, x, weight, bias):
        index, name = place
        updates = self.config.scale * self.tensor()[12 * index : 12 * index + 12]
        at = {"q": 0, "k": 1, "v": 2, "proj": 3}
        if name in at:
            update = updates[at[name]]
        elif name == "fc1":
            update = torch.cat(list(updates[4:8]), dim=1)
        else:
            update = torch.cat(list(updates[8:12]), dim=0)
        return super().linear(place, x, weight + update.T, bias)


class PublishedRepAdapter(Published):
    def norm(self, place, x, norm):
        n = super().norm(place, x, norm)
        if place == "final":
            return n
        name, own = ".".join(map(str, place)), self.own
        low = n @ own[f"{name}.down.weight"].T + own[f"{name}.down.bias"]
        shares, up = low.chunk(self.config.groups, -1), own[f"{name}.up_weight"]
        raised = torch.cat([share @ part.T for share, part in zip(shares, up, strict=True)], -1)
        return n + self.config.scale * (raised + own[f"{name}.up_bias"])


class PublishedConvpass(Published):
    def norm(self, place, x, norm):
        self.normed = super().norm(place, x, norm)
        return self.normed

    def after(self, index, sublayer, update):
        return update + self.config.scale * self.bypass(f"{index}.{sublayer}", self.normed)

    def bypass(self, name, n):
        own = self.own
        low = n @ own[f"{name}.down.weight"].T + own[f"{name}.down.bias"]
        low = low * torch.sigmoid(1.702 * low)
        kernel, bias = own[f"{name}.conv.weight"], own[f"{name}.conv.bias"]
        # Row by row and column by column, what lies outside of the grid being 0.
        grid = low[:, 1:].unflatten(1, (4, 4))
        mixed = torch.zeros_like(grid)
        for row, column in itertools.product(range(4), range(4)):
            for i, j in itertools.product(range(3), range(3)):
                if 0 <= row + i - 1 < 4 and 0 <= column + j - 1 < 4:
                    mixed[:, row, column] += (
                        grid[:, row + i - 1, column + j - 1] @ kernel[..., i, j].T
                    )
        low = torch.cat((low[:, :1] @ kernel[..., 1, 1].T, mixed.flatten(1, 2)), 1) + bias
        low = low * torch.sigmoid(1.702 * low)
        return low @ own[f"{name}.up.weight"].T + own[f"{name}.up.bias"]


class PublishedDiffFit(Published):
    def after(self, index, sublayer, update):
        return self.own[f"{index}.{'fc2' if sublayer == 'mlp' else 'proj'}.weight"] * update


EQUATIONS = [
    (ParallelAdapter, gist.Adapter(rank=3, scale=0.7, placement="parallel")),
    (SequentialAdapter, gist.Adapter(rank=3, scale=0.7, placement="sequential")),
    (PublishedAdaptFormer, gist.AdaptFormer(rank=5, scale=0.4)),
    (PublishedLoRA, gist.LoRA(rank=3, alpha=5.0)),
    (PublishedLoRA, gist.LoRA(rank=2, alpha=3.0, targets=("k", "proj", "fc1", "fc2"))),
    (PublishedSSF, gist.SSF()),
    (PublishedVPT, gist.VPT(num_tokens=3)),
    (PublishedVPT, gist.VPT(num_tokens=3, deep=False)),
    (PublishedFacT, gist.FacT(rank=3, scale=0.5)),
    (PublishedFacT, gist.FacT(form="tk", rank=3, scale=0.5)),
    (PublishedRepAdapter, gist.RepAdapter(rank=6, groups=3, scale=0.5)),
    (PublishedConvpass, gist.Convpass(rank=5, scale=0.5)),
    (PublishedDiffFit, gist.DiffFit()),
]


@pytest.mark.parametrize(("published", "method"), EQUATIONS)
def test_gives_the_published_equations(published, method):
    model = wrapped("vit", gist.GistConfig(method, gist=False)).eval()
    exact = copy.deepcopy(model).double()
    parameters = [p for p in exact.method.parameters() if p.requires_grad]
    plain = gist.wrap(backbone(), gist.GistConfig(None, gist=False)).eval()
    expected = published(exact)(images().double())
    torch.testing.assert_close(model(images()).double(), expected, rtol=0, atol=1e-5)
    assert (plain(images()) - expected).abs().max() > 0.05  # the method does something
    ours = torch.autograd.grad(exact(images().double()).square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "method", [gist.AdaptFormer(dropout=0.5), gist.FacT(dropout=0.5), gist.RepAdapter(dropout=0.5),
               gist.VPT(dropout=0.5), gist.LoRA(dropout=0.5), gist.Convpass(dropout=0.5)],
)  # fmt: skip
def test_dropout_acts_in_training_alone(method):
    model = wrapped("vit", gist.GistConfig(method, gist=False)).train()
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


# ---- several methods, copies, files of earlier versions -----------------------------------------


def test_several_methods_act_together():
    config = gist.GistConfig([gist.LoRA(rank=3), gist.Adapter(rank=2), gist.BitFit()], gist=False)
    model = wrapped("vit", config).eval()
    assert {"method.lora.0.q.down", "method.adapter.1.up.bias", "backbone.norm.bias"} <= set(
        model.trainable_state_dict()
    )
    with torch.no_grad():
        for parameter in model.method["adapter"].parameters():
            parameter.zero_()
    alone = wrapped("vit", gist.GistConfig(gist.LoRA(rank=3), gist=False)).eval()
    alone.method.load_state_dict(model.method["lora"].state_dict())
    torch.testing.assert_close(model(images()), alone(images()))
    assert gist.GistConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_copies_are_independent(method):
    model = gist.wrap(backbone(), gist.GistConfig(METHOD_CONFIGS[method])).eval()
    twin = copy.deepcopy(model)
    expected = model(images())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(images()), expected)
    assert (twin(images()) == 0).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gist.AdaptFormer(dropout=1.0), ValueError, "dropout must be in"),
        (lambda: gist.LoRA(targets=()), ValueError, "targets"),
        (lambda: gist.LoRA(targets=("q", "q")), ValueError, "each layer once"),
        (lambda: gist.LoRA(targets=("qq",)), ValueError, "did you mean 'q'"),
        (lambda: gist.VPT(num_tokens=0), ValueError, "num_tokens"),
        (lambda: gist.FacT(form="cp"), ValueError, "form"),
        (lambda: gist.RepAdapter(rank=3), ValueError, "rank, 3, must be a multiple of groups, 2"),
        (lambda: gist.Adapter(placement="after"), ValueError, "placement"),
        (lambda: gist.GistConfig((gist.LoRA(), gist.LoRA())), ValueError, "twice; it has lora"),
        (lambda: gist.GistConfig((gist.LoRA(), "adapter")), TypeError, "method must be"),
        (lambda: gist.GistConfig(num_tokens=0), ValueError, "num_tokens"),
        (lambda: gist.GistConfig(token_init="ones"), ValueError, "token_init"),
    ],
)
def test_configs_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "method",
    [gist.LoRA(), gist.SSF(), gist.FacT(), gist.DiffFit(), gist.Adapter(placement="sequential"),
     (gist.Adapter(), gist.LoRA())],
)  # fmt: skip
def test_a_backbone_that_lacks_a_layer_is_left_alone(method):
    vit = backbone()
    vit.blocks[1].attn.qkv = torch.nn.Sequential(vit.blocks[1].attn.qkv)
    vit.blocks[1].mlp.fc2 = torch.nn.Sequential(vit.blocks[1].mlp.fc2)
    with pytest.raises(ValueError, match=r"of block 1 of this backbone, a Block, is no plain"):
        gist.wrap(vit, gist.GistConfig(method))
    assert all(p.requires_grad for p in vit.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
