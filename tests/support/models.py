"""Small backbones with random weights, of the kinds that gist.wrap takes."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer

import gist

TINY = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7,
}  # fmt: skip

BACKBONES = {
    "vit": {},
    "registers": {"reg_tokens": 4},
    "deit3_registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 1e-1},
    "dinov2": {"init_values": 0.3},
    "clip": {"pre_norm": True},
    "average_pooled": {"global_pool": "avg", "reg_tokens": 1},
    "average_with_final_norm": {"global_pool": "avg", "fc_norm": False},
    "qk_norm": {"qk_norm": True},
    "no_position": {"pos_embed": "none"},
}


def backbone(name: str = "vit", **options) -> VisionTransformer:
    """A small backbone with random weights large enough for every part to matter."""
    torch.manual_seed(1)
    model = VisionTransformer(**{**TINY, **BACKBONES[name], **options})
    model.pretrained_cfg = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrapped(name: str = "vit", config: gist.GistConfig | None = None, **options) -> gist.GistModel:
    config = config or gist.GistConfig(gist.Adapter(rank=4, scale=0.7), token_dropout=0.0)
    model = gist.wrap(backbone(name, **options), config)
    with torch.no_grad():
        for parameter in model.method.parameters() if model.method is not None else ():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
