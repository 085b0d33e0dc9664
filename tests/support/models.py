"""Small backbones with random weights, of the kinds that gist.wrap takes."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

import gist
from gist.methods import METHODS

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
    "attention_pooled": {"global_pool": "map", "class_token": False},
    "qk_norm": {"qk_norm": True},
    "no_position": {"pos_embed": "none"},
}


EVAS = {
    "dinov3": {
        "rope_type": "dinov3", "rope_rotate_half": True, "rope_temperature": 100.0,
        "init_values": 0.3, "num_reg_tokens": 4, "no_embed_class": True, "use_abs_pos_emb": False,
        "use_fc_norm": False, "dynamic_img_size": True,
    },
    "dinov3, biases, gated in two": {
        "rope_type": "dinov3", "rope_rotate_half": True, "qkv_bias": True, "swiglu_mlp": True,
        "swiglu_align_to": 8, "global_pool": "avg",
    },
    "eva02": {"qkv_bias": True, "swiglu_mlp": True, "global_pool": "avg"},
    "eva02, separate": {"qkv_bias": True, "qkv_fused": False, "swiglu_mlp": True},
    "eva02, inner norm": {"qkv_bias": True, "swiglu_mlp": True, "scale_mlp": True},
    "rope": {"attn_type": "rope", "qkv_bias": True, "init_values": 0.2, "ref_feat_shape": (4, 4)},
    "rope, mixed": {"attn_type": "rope", "rope_type": "mixed", "qkv_bias": True},
    "no rotation": {"use_rot_pos_emb": False, "qkv_bias": True, "num_reg_tokens": 1},
}  # fmt: skip


def backbone(name: str = "vit", **options) -> VisionTransformer | Eva:
    """A small backbone with random weights large enough for every part to matter."""
    torch.manual_seed(1)
    if name in EVAS:
        own = {"use_rot_pos_emb": True, "qkv_bias": False, "global_pool": "token"}
        model = Eva(**{**TINY, **own, **EVAS[name], **options})
    else:
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


# ---- every method on every family -----------------------------------------------------------

METHOD_CONFIGS = {
    **{name: method() for name, method in METHODS.items()},
    "none": None,
    "adapter, parallel": gist.Adapter(placement="parallel"),
    "adapter, sequential": gist.Adapter(rank=8, scale=1.0, placement="sequential"),
    "lora, all": gist.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2"), dropout=0.1),
    "vpt, shallow": gist.VPT(deep=False, dropout=0.1),
    "fact, tk": gist.FacT(form="tk", rank=4),
    "several": (gist.VPT(num_tokens=2), gist.BitFit(), gist.LoRA(rank=2)),
}

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


def timm_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)


def timm_dinov2():
    return timm.create_model("vit_small_patch14_dinov2", img_size=28, **SMALL)


def transformers_vit():
    transformers = pytest.importorskip("transformers")
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192,
            image_size=32, patch_size=8, num_labels=5,
        )
    )  # fmt: skip


def transformers_dinov2(registers=0):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, kind + "Config")(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        num_labels=5, **({"num_register_tokens": registers} if registers else {}),
    )  # fmt: skip
    return getattr(transformers, kind + "ForImageClassification")(config)


def transformers_siglip():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 192, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return transformers.SiglipForImageClassification(
        transformers.SiglipConfig(vision_config=sizes, num_labels=5)
    )


def transformers_dinov3():
    """With the classifier that gist.wrap has given it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192,
        image_size=32, patch_size=8, num_register_tokens=2, pos_embed_rescale=None,
    )  # fmt: skip
    return gist.unwrap(gist.wrap(transformers.DINOv3ViTModel(config), num_classes=5))


def eva(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit = timm.models.eva.Eva(
        **{**sizes, "num_classes": 5, "use_rot_pos_emb": True, "global_pool": "token", **options}
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


FAMILIES = {
    "timm ViT-Ti": (timm_vit, 32),
    "timm DINOv2-S": (timm_dinov2, 28),
    "transformers ViT": (transformers_vit, 32),
    "transformers DINOv2": (transformers_dinov2, 32),
    "transformers SigLIP": (transformers_siglip, 32),
}


# Not every method fits it: no prompts among rotary positions, no SSF or FacT of its packed layers.
ROTARY = {"timm Eva": (eva, 32), "transformers DINOv3": (transformers_dinov3, 32)}


def made(family):
    """A seeded backbone and images for it."""
    model, generator = _template(family)
    torch.set_rng_state(generator)
    return copy.deepcopy(model), images(size=(FAMILIES | ROTARY)[family][1])


@functools.cache
def _template(family):
    """A backbone to copy, for its initial values take long, and the generator's state after it."""
    torch.manual_seed(5)
    return (FAMILIES | ROTARY)[family][0](), torch.get_rng_state()
