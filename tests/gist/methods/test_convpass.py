"""Convpass's grids: which tokens are patches, and how many rows and columns they form."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from models import backbone, images, wrapped
from timm.layers import DropPath

import gist
from gist.methods.convpass import TokenConv

BYPASS = gist.Convpass(rank=5, scale=0.5, dropout=0.0)


def config(*methods, **options):
    return gist.GistConfig((BYPASS, *methods), token_dropout=0.0, **options)


def update_seen(model, pixels, index):
    """What a call adds before a block's first drop-path, and that block's first normed tokens."""
    block, seen = model.backbone.blocks[index], {}
    handles = [
        block.norm1.register_forward_hook(lambda *call: seen.update(normed=call[2])),
        block.ls1.register_forward_hook(lambda *call: seen.update(before=call[2])),
        block.drop_path1.register_forward_hook(lambda *call: seen.update(after=call[2])),
    ]
    model(pixels)
    for handle in handles:
        handle.remove()
    return seen["after"] - seen["before"], seen["normed"]


def gelu(z):
    return z * torch.sigmoid(1.702 * z)


def expected_update(own, n, grid, first):
    """The update with the patches from ``first`` on, by one convolution over a sheet that holds
    each other token on an island of its own."""
    rows, columns = grid
    low = gelu(n @ own["down.weight"].T + own["down.bias"]).mT
    count, patches = n.shape[1], range(first, first + rows * columns)
    others = [token for token in range(count) if token not in patches]
    sheet = low.new_zeros(len(n), low.shape[1], rows, columns + 2 * len(others))
    places = [(0, columns + 1 + 2 * i) for i in range(len(others))]
    sheet[..., :columns] = low[:, :, list(patches)].unflatten(-1, grid)
    for token, (row, column) in zip(others, places, strict=True):
        sheet[..., row, column] = low[:, :, token]
    mixed = F.conv2d(sheet, own["conv.weight"], own["conv.bias"], padding=1)
    low = torch.empty_like(low)
    low[:, :, list(patches)] = mixed[..., :columns].flatten(2)
    for token, (row, column) in zip(others, places, strict=True):
        low[:, :, token] = mixed[..., row, column]
    return 0.5 * (gelu(low.mT) @ own["up.weight"].T + own["up.bias"])


def deit(**options):
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
    return timm.create_model("deit_tiny_distilled_patch16_224", **sizes, **options)


CASES = {
    "class token": (backbone, {}, config(gist=False), 1),
    "gist token": (backbone, {}, config(), 1 + 1),
    "registers, tokens, prompts": (
        backbone, {"reg_tokens": 4}, config(gist.VPT(num_tokens=3), num_tokens=2), 1 + 4 + 2,
    ),
    "shallow prompts": (
        backbone, {}, config(gist.VPT(num_tokens=2, deep=False), gist=False), 1,
    ),
    "no class token": (
        backbone, {"class_token": False, "global_pool": "avg"}, config(num_tokens=2), 2,
    ),
    "distilled": (deit, {}, config(), 2 + 1),
}  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (48, 32)])
@pytest.mark.parametrize("case", CASES)
def test_patches_are_a_grid_and_every_other_token_is_one_of_its_own(case, size):
    make, options, configuration, first = CASES[case]
    model = gist.wrap(make(dynamic_img_size=True, **options), configuration).double().eval()
    several = len(configuration.methods) > 1
    bypasses = model.method["convpass"] if several else model.method
    with torch.no_grad():
        for parameter in bypasses.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    patch = model.family.patch_projection.stride[0]
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    for index in (0, 1):
        found, normed = update_seen(model, pixels, index)
        own = dict(bypasses[index]["attention"].named_parameters())
        grid = size[0] // patch, size[1] // patch
        expected = expected_update(own, normed, grid, first)
        assert expected.abs().min(1).values.min() > 0
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_convolution_starts_as_the_identity():
    conv = TokenConv(6, {})
    tokens = torch.randn(2, 3 + 12 + 2, 6)
    torch.testing.assert_close(conv(tokens, 3, (3, 4)), tokens)


@pytest.mark.parametrize("use_gist", [True, False])
def test_drop_path_drops_sublayer_and_bypass_together(use_gist):
    model = wrapped("vit", gist.GistConfig(BYPASS, gist=use_gist)).train()
    for block in model.backbone.blocks:
        block.drop_path1, block.drop_path2 = (
            carried(part, DropPath(1.0)) for part in (block.drop_path1, block.drop_path2)
        )
    block, seen = model.backbone.blocks[1], []
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.register_forward_hook(lambda *call: seen.append(call[2]))
    model(images())
    assert torch.equal(*seen)


def carried(old, new):
    from gist.model.attach import carry_hooks

    carry_hooks(old, new)
    return new.train()


@pytest.mark.parametrize("fused_backbone", [True, False])
def test_checkpointing_gives_the_same_gradients_at_any_one_shape(fused_backbone):
    model = gist.wrap(backbone(dynamic_img_size=True), config()).train()
    if not fused_backbone:  # the backbone's own checkpointing then
        model.backbone.norm.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        for parameter in model.method.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(size):
        pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        return torch.stack(model(pixels)).square().sum()

    plain = [torch.autograd.grad(loss(size), trained) for size in ((32, 32), (24, 48))]
    model.set_grad_checkpointing()
    # Other images may come between a call and its backward pass.
    losses = [loss(size) for size in ((32, 32), (24, 48))]
    for expected, each in zip(plain, losses, strict=True):
        torch.testing.assert_close(torch.autograd.grad(each, trained), expected)


def test_checkpointing_at_two_shapes_of_one_number_raises():
    model = gist.wrap(backbone(dynamic_img_size=True), config()).train()
    model.set_grad_checkpointing()
    first = torch.stack(model(torch.randn(1, 3, 32, 16))).sum()
    torch.stack(model(torch.randn(1, 3, 16, 32))).sum()
    with pytest.raises(ValueError, match="can't tell which grid 8 patches form"):
        first.backward()
    model.set_grad_checkpointing(False)
    torch.stack(model(torch.randn(1, 3, 16, 32))).sum().backward()


def test_a_checkpoint_around_the_model_knows_its_images():
    model = gist.wrap(backbone(dynamic_img_size=True), config()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    pixels = torch.randn(1, 3, 32, 16), torch.randn(1, 3, 16, 32)
    expected = torch.autograd.grad(torch.stack(model(pixels[0])).square().sum(), trained)

    def call(x):
        return torch.stack(model(x))

    out = torch.utils.checkpoint.checkpoint(call, pixels[0], use_reentrant=False)
    model(pixels[1])
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), trained), expected)


def test_dropped_patches_form_no_grid():
    model = gist.wrap(backbone(patch_drop_rate=0.5), config())
    assert model.eval()(images()).shape == (2, 7)
    with pytest.raises(ValueError, match="all 4 x 4 patches .*; there are 8; .*patch_drop_rate"):
        model.train()(images())


def test_a_block_by_itself_has_no_grid():
    model = gist.wrap(backbone(), config()).eval()
    with pytest.raises(ValueError, match="call the model with images"):
        model.backbone.blocks[1](torch.randn(2, 18, 48))


def test_says_that_it_runs_by_hooks():
    model = wrapped("vit", gist.GistConfig(BYPASS))
    assert gist.explain(model) == (
        "blocks 0 to 2: the block's own forward, for its method is Convpass, whose convolutions "
        "run by hooks"
    )


def test_compiles_without_a_graph_break():
    model = wrapped("registers", gist.GistConfig(BYPASS, token_dropout=0.0)).train()
    expected = copy.deepcopy(model)(images())
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend="eager")(images())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
