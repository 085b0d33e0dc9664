"""timm's Eva as fused sublayers against its own forward."""

from __future__ import annotations

import pytest
import torch
from fused_cases import CONFIGS, compare_with_own_forward, results
from marks import slow_where
from models import EVAS, backbone, images, wrapped
from torch import nn

import gist

BLOCKS = {name: backbone(name).blocks[0] for name in EVAS}
BIASES_APART = [n for n, block in BLOCKS.items() if getattr(block.attn, "q_bias", None) is not None]
TRAINS_NORMS = ("difffit", "biases, norms, adapter, keys")
IN_TWO = [n for n, block in BLOCKS.items() if hasattr(block.mlp, "fc1_g")]


def fits(name, config):
    """Whether a method finds what it changes."""
    if config == "ssf" and name in BIASES_APART:
        return False
    return not (config in ("lora", "ssf", "fact", "fact, tk") and name in IN_TWO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize(
    ("name", "config"),
    slow_where(
        lambda name, config: config == "lora",
        [(name, config) for name in EVAS for config in ("gist", "lora") if fits(name, config)],
    ),
)
def test_gives_what_the_backbones_own_forward_gives(name, config, dtype, own_forward):
    compare_with_own_forward(name, config, dtype, own_forward)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (name, config)
        for name in EVAS
        for config in CONFIGS
        if "prompts" not in config
        and fits(name, config)
        and not (config in TRAINS_NORMS and "inner norm" in name)
    ],
)
def test_is_the_same_function_in_float64(name, config, own_forward):
    """Whatever the kernels round, blocks are read right: weights, order, positions, scales."""
    model = wrapped(name, CONFIGS[config]).double()
    pixels = images(2).double()
    for training in (True, False):
        model.train(training)
        assert "own forward" not in gist.explain(model)
        fused = results(model, pixels)
        with own_forward():
            assert "fused" not in gist.explain(model)
            plain = results(model, pixels)
        assert fused[1].keys() == plain[1].keys()
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("separate", [False, True])
def test_a_bias_of_the_packed_projection_counts_where_timm_adds_it(separate, own_forward):
    model = wrapped("eva02").double().eval()
    attn = model.backbone.blocks[1].attn
    attn.qkv_bias_separate = separate
    attn.qkv.bias = nn.Parameter(torch.randn_like(attn.qkv.weight[:, 0]), requires_grad=False)
    found = model(images(2).double())
    own_forward()
    torch.testing.assert_close(found, model(images(2).double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BIASES_APART)
def test_lora_beside_biases_apart_is_that_of_merged_weights(name):
    """Merged, timm's own forward runs: it reads the packed weight and calls no layer for it."""
    targets = ("q", "k", "v")
    config = gist.GistConfig(gist.LoRA(rank=3, targets=targets), gist=False)
    model = wrapped(name, config).double().eval()
    attentions = [block.attn for block in model.backbone.blocks]
    assert all(attn.qkv_bias_separate for attn in attentions)
    plain = gist.merge(model)
    assert not any(block.attn.qkv_bias_separate for block in plain.blocks)
    pixels = images(2).double()
    torch.testing.assert_close(model(pixels), plain(pixels), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain(pixels), backbone(name).double().eval()(pixels))
    gist.unwrap(model)
    assert not any(attn.qkv_bias_separate for attn in attentions)


@pytest.mark.parametrize("name", BIASES_APART)
def test_a_method_that_would_change_biases_apart_is_refused(name):
    with pytest.raises(ValueError, match="SSF changes the biases .* adds apart from the layer"):
        wrapped(name, gist.GistConfig(gist.SSF()))
    model = wrapped(name, gist.GistConfig(gist.RepAdapter(), gist=False))
    with pytest.raises(ValueError, match="RepAdapter, merged, changes the biases"):
        gist.merge(model)


def test_a_bias_that_timm_may_leave_out_has_no_methods():
    eva = backbone("eva02")
    eva.blocks[1].attn.qkv.bias = nn.Parameter(torch.zeros(144))
    with pytest.raises(ValueError, match="'q' of block 1 .* no plain linear layer"):
        gist.wrap(eva, gist.GistConfig(gist.LoRA()))


def test_trained_positions_get_their_gradient(own_forward):
    model = wrapped("rope, mixed").double().train()
    frequencies, pixels = model.backbone.rope.freqs, images(2).double()
    before = model(pixels)
    frequencies.requires_grad_(True)
    assert "its rotary positions are trained" in gist.explain(model)
    found, gradients = results(model, pixels)
    torch.testing.assert_close(found, torch.stack(before), rtol=1e-9, atol=1e-9)
    own_forward()
    torch.testing.assert_close(gradients, results(model, pixels)[1], rtol=1e-9, atol=1e-9)
    assert gradients["backbone.rope.freqs"].any()


def test_positions_have_a_tangent():
    model = wrapped("rope, mixed").double().eval()
    pixels, frequencies = images(2).double(), model.backbone.rope.freqs.detach()

    def logits(frequencies):
        swapped = {"backbone.rope.freqs": frequencies}
        return torch.func.functional_call(model, swapped, (pixels,))

    direction = torch.randn_like(frequencies)
    _, tangent = torch.func.jvp(logits, (frequencies,), (direction,))
    frequencies.requires_grad_(True)
    (gradient,) = torch.autograd.grad(logits(frequencies).sum(), frequencies)
    expected = (gradient * direction).sum()
    assert expected
    # timm computes the angles in float32.
    torch.testing.assert_close(tangent.sum(), expected, rtol=1e-5, atol=1e-8)


class Rope(nn.Module):
    """A user's own rotary positions."""

    def __init__(self, positions):
        super().__init__()
        self.positions = positions

    def get_embed(self, shape=None):
        return self.positions


@pytest.mark.parametrize("change", ["fewer", "more", "one", "of one head", "of one batch"])
def test_positions_of_another_shape_are_left_to_the_backbone(change, own_forward):
    model = wrapped("eva02").eval()
    positions = model.backbone.rope.get_embed()
    model.backbone.rope = Rope(
        {
            "fewer": positions[:-3],
            "more": positions.repeat(2, 1),
            "one": positions[:1],
            "of one head": positions[None],
            "of one batch": positions[None, None],
        }[change]
    )

    def found():
        try:
            return model(images(2))
        except RuntimeError as error:
            return str(error)

    ours = found()
    own_forward()
    if isinstance(ours, str):
        assert ours == found()
    else:
        assert torch.equal(ours, found())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", ["gist", "lora"])
@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_a_norm_of_attentions_output_is_fused(name, config, training, own_forward):
    """BEiT-3 is such a VisionTransformer, and EVA-02's CLIP such an Eva."""
    inside = {"vit": ("scale_attn_norm", "scale_mlp_norm"), "eva02": ("scale_attn_inner",)}[name]
    options = dict.fromkeys(inside, True)
    model = wrapped(name, CONFIGS[config], **options).double().train(training)
    assert isinstance(model.backbone.blocks[0].attn.norm, nn.LayerNorm)
    assert "own forward" not in gist.explain(model)
    pixels = images(2).double()
    found = results(model, pixels)
    with own_forward():
        expected = results(model, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_trained_norm_of_attentions_output_is_left_to_the_backbone():
    config = gist.GistConfig(gist.LayerNormTuning())
    model = wrapped("vit", config, scale_attn_norm=True)
    assert "its attention's norm is trained" in gist.explain(model)
    model.backbone.blocks[1].attn.norm = nn.BatchNorm1d(48)
    assert "block 1: the block's own forward, for its attention's norm is a BatchNorm1d" in (
        gist.explain(model)
    )
