"""timm's VisionTransformer and its Block, as the fused sublayers take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import Attention, DropPath, LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from gist.fusion import block as fused_block
from gist.fusion.backbone import Embedded, FusedBackbone
from gist.fusion.layers import BlockLayers, Forwards, Linears
from gist.fusion.patch_embedding import embed_patches
from gist.fusion.sharding import class_of
from gist.methods.base import Refusal
from gist.untouched import is_own, written_forward

COMMON_FORWARDS: Forwards = {
    kind: written_forward(kind)
    for kind in (
        Mlp, LayerNorm, DropPath, nn.LayerNorm, nn.Linear,
        nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU,
    )
}  # fmt: skip
_METHODS = {
    name: written_forward(VisionTransformer, name)
    for name in ("forward", "forward_features", "forward_head")
}
_SEQUENTIAL = written_forward(nn.Sequential)
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
# Parameters that come after the patch embedding.
LATER = ("blocks.", "norm.", "fc_norm.", "head.", "attn_pool.")


class FusedTimmViT(FusedBackbone):
    """timm's VisionTransformer."""

    FORWARDS: ClassVar[Forwards] = {
        **COMMON_FORWARDS,
        **{kind: written_forward(kind) for kind in (Block, Attention, LayerScale)},
    }

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    def refusal(self) -> Refusal | None:
        reason = methods_refusal(self.model, _METHODS)
        if reason is not None:
            return Refusal(reason)
        if type(self.model.blocks).forward is not _SEQUENTIAL:
            return Refusal("its blocks are not a plain nn.Sequential")
        return None

    def layers(self, block: Any) -> BlockLayers | Refusal:
        reason = _block_refusal(block)
        if reason is not None:
            return Refusal(reason)
        attn, mlp = block.attn, block.mlp
        activation = activation_name(mlp.act)
        assert activation is not None
        return BlockLayers(
            norms=(block.norm1, block.norm2),
            qkv=Linears.of(attn.qkv),
            proj=Linears.of(attn.proj),
            num_heads=attn.num_heads,
            # timm's own call of PyTorch's attention leaves it the default.
            scale=None if attn.fused_attn else attn.scale,
            fc1=Linears.of(mlp.fc1),
            fc2=Linears.of(mlp.fc2),
            activation=activation,
            attention_norm=inner_norm(attn),
            mlp_norm=inner_norm(mlp),
            layer_scales=(_layer_scale(block.ls1), _layer_scale(block.ls2)),
            drop_paths=(drop_path(block.drop_path1), drop_path(block.drop_path2)),
        )

    def is_later(self, parameter: str) -> bool:
        return parameter.startswith(LATER)

    def embed(self, images: torch.Tensor, **others: Any) -> Embedded:
        model = self.model
        x = model.patch_drop(model._pos_embed(embed_patches(model.patch_embed, images)))
        return Embedded(model.norm_pre(x))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.norm(x)

    @property
    def checkpointed(self) -> bool:
        return self.model.grad_checkpointing


def methods_refusal(model: Any, written: Mapping[str, Any]) -> str | None:
    """Why a model's methods are not those that its library has written, or None."""
    kind = type(model)
    for name, own in written.items():
        if getattr(kind, name) is not own:
            return f"{kind.__name__} has a {name} of its own"
        if not is_own(model, name):
            return f"its {name} was replaced"
    return None


def _block_refusal(block: Any) -> str | None:
    if class_of(block) is not Block:
        return f"it is a {type(block).__name__}"
    for part in (block.ls1, block.ls2):
        if type(part) not in (nn.Identity, LayerScale):
            return f"its layer scale is a {type(part).__name__}"
    return (
        common_refusal(block.norm1, block.norm2, block.drop_path1, block.drop_path2)
        or _attention_refusal(block.attn)
        or mlp_refusal(block.mlp)
    )


def common_refusal(norm1: Any, norm2: Any, drop_path1: Any, drop_path2: Any) -> str | None:
    """Why the norms or the drop-paths of a timm block can't be fused, or None."""
    for part in (norm1, norm2):
        if not is_layer_norm(part):
            return f"its norm is a {type(part).__name__}"
    for part in (drop_path1, drop_path2):
        if type(part) not in (nn.Identity, DropPath):
            return f"its drop-path is a {type(part).__name__}"
    return None


def is_layer_norm(part: Any) -> bool:
    return type(part) in (nn.LayerNorm, LayerNorm) and len(part.normalized_shape) == 1


def _attention_refusal(attn: Any) -> str | None:
    if type(attn) is not Attention:
        return f"its attention is a {type(attn).__name__}"
    return attention_refusal(attn, attn.qkv)


def attention_refusal(attn: Any, *layers: Any) -> str | None:
    """Why an attention of timm's, with these projections of its input, can't be fused, or None."""
    if getattr(attn, "gate", None) is not None:
        return "its attention is gated"
    for part, name in ((attn.q_norm, "queries"), (attn.k_norm, "keys")):
        if type(part) is not nn.Identity:
            return f"its attention normalises its {name}"
    if type(attn.norm) is not nn.Identity and not is_layer_norm(attn.norm):
        return f"its attention's norm is a {type(attn.norm).__name__}"
    if any(type(layer) is not nn.Linear for layer in (*layers, attn.proj)):
        return "its attention's projections are not plain linears"
    if sum(layer.out_features for layer in layers) != 3 * attn.num_heads * attn.head_dim:
        return "its attention's heads don't make up its projection"
    if not math.isfinite(attn.scale):
        return "its attention's scale is not finite"
    return dropout_refusal("attention", attn, attn.attn_drop, attn.proj_drop)


def mlp_refusal(mlp: Any) -> str | None:
    """Why timm's plain Mlp can't be fused, or None."""
    if type(mlp) is not Mlp:
        return f"its MLP is a {type(mlp).__name__}"
    if not type(mlp.fc1) is type(mlp.fc2) is nn.Linear:
        return "its MLP's layers are not plain linears"
    if type(mlp.norm) is not nn.Identity and not is_layer_norm(mlp.norm):
        return f"its MLP's norm is a {type(mlp.norm).__name__}"
    if activation_name(mlp.act) is None:
        return f"its MLP's activation is a {type(mlp.act).__name__}"
    return dropout_refusal("MLP", mlp, mlp.drop1, mlp.drop2)


def dropout_refusal(name: str, owner: nn.Module, *parts: Any) -> str | None:
    """Why the dropouts of a part of a block keep it from being fused, or None."""
    for part in parts:
        if type(part) not in (nn.Dropout, nn.Identity):
            return f"its {name}'s dropout is a {type(part).__name__}"
        # Attention asks its own training flag for the dropout of its probabilities.
        if getattr(part, "p", 0) and (part.training or owner.training):
            return f"its {name} has dropout"
    return None


def inner_norm(sublayer: Any) -> nn.Module | None:
    """The norm of what the last layer of timm's attention or MLP reads, or None."""
    norm: nn.Module = sublayer.norm
    return None if isinstance(norm, nn.Identity) else norm


def activation_name(act: nn.Module) -> str | None:
    """The name of an activation in :data:`gist_kernels.activations.Activation`, or None."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(type(act))


def drop_path(part: nn.Module) -> fused_block.DropPath | None:
    """The draws of timm's DropPath, whether or not it is on."""
    return partial(_drop_path, part) if isinstance(part, DropPath) else None


def _drop_path(part: DropPath, x: torch.Tensor) -> torch.Tensor | None:
    """The factors that timm's drop_path would draw for x, in timm's order."""
    if part.drop_prob == 0 or not part.training:
        return None
    keep = 1 - part.drop_prob
    factors = x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep)
    return factors.div_(keep) if keep > 0 and part.scale_by_keep else factors


def _layer_scale(scale: nn.Module) -> torch.Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None
