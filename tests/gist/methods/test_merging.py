"""Methods folded into the backbone's weights."""

from __future__ import annotations

import pytest
import torch
from models import backbone, images, wrapped

import gist

MERGED = [
    gist.LoRA(rank=3, targets=("q", "v", "fc1", "fc2", "proj")),
    gist.SSF(),
    gist.FacT(rank=3),
    gist.FacT(form="tk", rank=3),
    gist.RepAdapter(rank=4, scale=0.5),
    gist.BitFit(),
    gist.DiffFit(),
    None,
]


@pytest.mark.parametrize("use_gist", [True, False])
@pytest.mark.parametrize("name", ["vit", "registers", "dinov2", "deit3_registers", "no_position"])
@pytest.mark.parametrize("method", MERGED)
def test_merged_backbones_give_the_same_logits(method, name, use_gist):
    model = wrapped(name, gist.GistConfig(method, gist=use_gist)).double().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = gist.merge(model)
    assert type(plain) is type(model.backbone)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    expected = model(images().double())
    torch.testing.assert_close(plain(images().double()), expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if use_gist:
        dropped = gist.merge(model, drop_token=True)
        assert dropped.num_prefix_tokens == model.backbone.num_prefix_tokens
        assert not torch.allclose(dropped(images().double()), expected)


@pytest.mark.parametrize("method", [gist.LoRA(targets=("q", "fc1")), gist.SSF(), gist.FacT()])
def test_layers_that_share_a_weight_are_merged_each_by_its_own(method):
    vit = backbone()
    for path in ("attn.qkv", "mlp.fc1"):
        first, third = (block.get_submodule(path) for block in (vit.blocks[0], vit.blocks[2]))
        third.weight, third.bias = first.weight, first.bias
    model = gist.wrap(vit, gist.GistConfig(method)).eval()
    with torch.no_grad():
        for parameter in model.method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.testing.assert_close(gist.merge(model)(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert vit.blocks[2].mlp.fc1.weight is vit.blocks[0].mlp.fc1.weight


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (gist.GistConfig(gist.Adapter()), "vit", "Adapters can't be merged"),
        (gist.GistConfig(gist.VPT()), "vit", "Prompts can't be merged"),
        (gist.GistConfig(gist.Convpass()), "vit", "Bypasses can't be merged"),
        (gist.GistConfig((gist.LoRA(), gist.SSF())), "vit", "only one method"),
        (gist.GistConfig(gist.LoRA()), "clip", "norm before the blocks.*drop_token=True"),
    ],
)
def test_what_weights_cannot_express_is_not_merged(config, name, message):
    with pytest.raises(ValueError, match=message):
        gist.merge(wrapped(name, config))
