"""Whole models of timm's, by name, fused and by their own forward, against float64."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from draws import geometric_mean

import gist

linear = pytest.importorskip("gist_kernels.kernels.cpu.linear")

MODELS = {
    "ViT-Ti/16, all 12 blocks": ("vit_tiny_patch16_224", {}),
    "ViT-S/16": ("vit_small_patch16_224", {"depth": 2}),
    "ViT-S/16, odd size": ("vit_small_patch16_224", {"depth": 3, "img_size": (112, 80)}),
    "ViT-B/16": ("vit_base_patch16_224", {"depth": 2, "img_size": 96}),
    "DINOv2 S/14": ("vit_small_patch14_dinov2", {"depth": 3, "img_size": 98}),
    "DINOv2 S/14, registers": ("vit_small_patch14_reg4_dinov2", {"depth": 3, "img_size": 98}),
    "DeiT-III S/16": ("deit3_small_patch16_224", {"depth": 2, "img_size": 96}),
    "SigLIP B/16, averaged": ("vit_base_patch16_siglip_gap_224", {"depth": 2, "img_size": 96}),
    "DINOv3 S/16": ("vit_small_patch16_dinov3", {"depth": 3, "img_size": 96}),
    "DINOv3 S+/16": ("vit_small_plus_patch16_dinov3", {"depth": 2, "img_size": 96}),
    "EVA-02 Ti/14": ("eva02_tiny_patch14_224", {"depth": 3, "img_size": 98}),
    "RoPE ViT-S/16": ("vit_small_patch16_rope_224", {"depth": 2, "img_size": 96}),
}


def named(key: str) -> gist.GistModel:
    """With random weights that every part of the model shows in, LayerScale too."""
    name, options = MODELS[key]
    torch.manual_seed(1)
    model = gist.wrap(
        timm.create_model(name, num_classes=10, **options),
        gist.GistConfig(gist.Adapter(rank=4, scale=0.7), token_dropout=0.0),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.normal_(0.3, 0.1)
            elif parameter.ndim > 1 and "embed" not in name and "token" not in name:
                parameter.normal_(0.0, 0.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def results(model, images):
    """The logits of both heads and every gradient.

    The upstream gradient is given, and the weights are such that no error grows on its way: else
    one rounding that happens to matter is in all tensors, and its size a matter of luck.
    """
    model.zero_grad()
    logits = torch.stack(model(images))
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    logits.backward(upstream.to(logits.dtype))
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
    return found | {"logits": logits.detach().double()}


def lost_by_products(terms: int) -> float:
    """How much further from float64 our products are than PyTorch's of all rows, in float32.

    Of 3,072 terms the error is twice as large where an inner product is summed in fewer parts: by
    oneDNN, and by MKL where there are two rows, as in the last block.
    """
    x, weight = torch.randn(64, terms), torch.randn(256, terms)
    exact = x.double() @ weight.double().T

    def error(found: torch.Tensor) -> float:
        return (found - exact[: len(found)]).norm().item()

    theirs = F.linear(x, weight)
    lost = (
        error(linear.linear(x[:rows], weight, None)) / error(theirs[:rows]) for rows in (2, len(x))
    )
    return max(1.0, *lost)


# Half of each kind of block only: the kernels are the same at every width.
HALF = ("ViT-S/16, odd size", "DINOv2 S/14, registers", "DINOv3 S/16", "EVA-02 Ti/14")


@pytest.mark.parametrize(
    "key, dtype",
    [(key, torch.float32) for key in MODELS] + [(key, torch.bfloat16) for key in HALF],
)
def test_logits_and_all_gradients(key, dtype, monkeypatch, own_forward):
    model = named(key)
    model.backbone.to(dtype)
    assert gist.explain(model) == (
        f"blocks 0 to {len(model.backbone.blocks) - 1}: fused sublayers, served by 'cpu'"
    )
    # Of the rounded weights, of which the general path has the same ones.
    exact = copy.deepcopy(model).double()
    size = model.backbone.patch_embed.img_size
    draws = [torch.randn(1, 3, *size).to(dtype) for _ in range(6)]
    fused = [results(model, images) for images in draws]
    # The general path's matmuls: PyTorch's, of all tokens in the last block too, as the library may
    # take another, less exact kernel for two rows.
    with monkeypatch.context() as patch:
        patch.setattr(linear, "_rule", linear.rule_of("pytorch"))
        patch.setattr(type(model.family), "reads_only_prefix", False)
        same_matmuls = [results(model, images) for images in draws]
    own_forward()
    assert "a test wants it so" in gist.explain(model)
    plain = [results(model, images) for images in draws]
    truth = [results(exact, images.double()) for images in draws]
    assert fused[0].keys() == plain[0].keys() == truth[0].keys()
    assert {"token.weight", "backbone.head.weight", "logits"} < truth[0].keys()
    assert len(truth[0]) == 4 * len(model.backbone.blocks) + 4

    def errors(found):
        """Relative, of each tensor: (draws, tensors)."""
        return torch.tensor(
            [
                [(of[name] - exact[name]).norm() / exact[name].norm() for name in exact]
                for of, exact in zip(found, truth, strict=True)
            ]
        )

    ours, ours_with_same_matmuls, general = map(errors, (fused, same_matmuls, plain))
    assert general.max() < 0.2, "too far from float64 for a comparison to say anything"
    ratio = geometric_mean(ours_with_same_matmuls.norm(dim=1) / general.norm(dim=1))
    assert ratio <= 1.5
    lost = lost_by_products(4 * model.backbone.embed_dim) if dtype is torch.float32 else 1.0
    assert geometric_mean(ours.norm(dim=1) / general.norm(dim=1)) <= 1.5 * lost
    ours, general = geometric_mean(ours), geometric_mean(general)
    few = 8 * torch.finfo(dtype).eps
    assert (ours <= 2 * general + few).all(), dict(zip(truth[0], ours - general, strict=True))
