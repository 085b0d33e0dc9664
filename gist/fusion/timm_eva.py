"""timm's Eva and its EvaBlock, as the fused sublayers take them: DINOv3, EVA-02, RoPE ViTs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import timm.layers
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import nn

import gist_kernels as gk
from gist.fusion.backbone import Embedded, FusedBackbone
from gist.fusion.layers import BlockLayers, Forwards, Linears
from gist.fusion.patch_embedding import embed_patches
from gist.fusion.sharding import class_of
from gist.fusion.timm_vit import (
    COMMON_FORWARDS,
    LATER,
    activation_name,
    attention_refusal,
    common_refusal,
    drop_path,
    dropout_refusal,
    inner_norm,
    is_layer_norm,
    methods_refusal,
    mlp_refusal,
)
from gist.methods.base import Refusal
from gist.untouched import written_forward

# Older releases of timm have EvaAttention alone.
_ATTENTIONS: tuple[type[nn.Module], ...] = (
    EvaAttention, getattr(timm.layers, "AttentionRope", EvaAttention)
)  # fmt: skip
_KINDS: tuple[type[nn.Module], ...] = (EvaBlock, *_ATTENTIONS, GluMlp, SwiGLU)
_METHODS = {
    name: written_forward(Eva, name) for name in ("forward", "forward_features", "forward_head")
}


class FusedTimmEva(FusedBackbone):
    """timm's Eva."""

    FORWARDS: ClassVar[Forwards] = {
        **COMMON_FORWARDS,
        **{kind: written_forward(kind) for kind in _KINDS},
    }

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    def refusal(self) -> Refusal | None:
        model = self.model
        reason = methods_refusal(model, _METHODS)
        if reason is not None:
            return Refusal(reason)
        if type(model.blocks) is not nn.ModuleList:
            return Refusal("its blocks are not a plain nn.ModuleList")
        drops = model.patch_drop
        if model.rope is not None and drops is not None and drops.training and drops.prob > 0:
            return Refusal("its images differ in the patches, and so in the positions, they keep")
        if model.rope is not None and any(p.requires_grad for p in model.rope.parameters()):
            return Refusal("its rotary positions are trained")
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
            qkv=_projections(attn),
            proj=Linears.of(attn.proj),
            num_heads=attn.num_heads,
            # timm's own call of PyTorch's attention leaves it the default.
            scale=None if attn.fused_attn else attn.scale,
            fc1=Linears.of(mlp.fc1_g, mlp.fc1_x) if type(mlp) is SwiGLU else Linears.of(mlp.fc1),
            fc2=Linears.of(mlp.fc2),
            activation=activation,
            gated=type(mlp) is not Mlp,
            attention_norm=inner_norm(attn),
            mlp_norm=inner_norm(mlp),
            layer_scales=(block.gamma_1, block.gamma_2),
            drop_paths=(drop_path(block.drop_path1), drop_path(block.drop_path2)),
        )

    def is_later(self, parameter: str) -> bool:
        return parameter.startswith(LATER)

    def embed(self, images: torch.Tensor, **others: Any) -> Embedded:
        model = self.model
        x, rotary = model._pos_embed(embed_patches(model.patch_embed, images))
        tables = None
        if rotary is not None:
            # Contiguous and not in a half type, as the kernels would make them in each block.
            dtype = torch.promote_types(rotary.dtype, torch.float32)
            tables = [t.to(dtype).contiguous() for t in rotary.chunk(2, dim=-1)]
        return Embedded(model.norm_pre(x), rotary, tables)

    def run_block(self, index: int, x: torch.Tensor, embedded: Embedded) -> torch.Tensor:
        output: torch.Tensor = self.blocks[index](x, rope=self._of_block(index, embedded.rotary))
        return output

    def rotation(
        self, index: int, embedded: Embedded, added_tokens: int
    ) -> gk.Rotation | Refusal | None:
        if embedded.tables is None:
            return None
        sin, cos = (self._of_block(index, table) for table in embedded.tables)
        attn: Any = self.blocks[index].attn
        heads = (attn.num_heads,) if sin.ndim == 3 else ()
        num_patches = embedded.tokens.shape[1] - self.model.num_prefix_tokens
        # A rope of the user's may give anything, which the kernels would not check.
        if not sin.shape == cos.shape == (*heads, num_patches, attn.head_dim):
            return Refusal("its rotary positions have another shape")
        if sin.requires_grad:
            return Refusal("its rotary positions are trained")
        # gist's own are counted among the attention's prefix tokens, which have no position.
        return gk.Rotation(sin, cos, attn.num_prefix_tokens, getattr(attn, "rotate_half", False))

    def _of_block(self, index: int, tables: Any) -> Any:
        """Of all blocks' (N, Dh) or 2 Dh: where heads and blocks have their own, (H, N, ...)."""
        mixed = getattr(self.model, "rope_mixed", False) and tables is not None
        return tables[index] if mixed else tables

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.norm(x)

    @property
    def checkpointed(self) -> bool:
        return self.model.grad_checkpointing


def _block_refusal(block: Any) -> str | None:
    if class_of(block) is not EvaBlock:
        return f"it is a {type(block).__name__}"
    return (
        common_refusal(block.norm1, block.norm2, block.drop_path1, block.drop_path2)
        or _attention_refusal(block.attn)
        or (mlp_refusal if type(block.mlp) is Mlp else _gated_refusal)(block.mlp)
    )


def _attention_refusal(attn: Any) -> str | None:
    if type(attn) not in _ATTENTIONS:
        return f"its attention is a {type(attn).__name__}"
    if getattr(attn, "num_kv_groups", 1) != 1:
        return "its attention's heads share their keys and values"
    packed_bias = getattr(attn.qkv, "bias", None)
    if packed_bias is not None and getattr(attn, "q_bias", None) is not None:
        return "its attention's packed projection has a bias of its own beside the separate ones"
    return attention_refusal(attn, *_projection_layers(attn))


def _gated_refusal(mlp: Any) -> str | None:
    if type(mlp) not in (GluMlp, SwiGLU):
        return f"its MLP is a {type(mlp).__name__}"
    if getattr(mlp, "gate_last", False):
        return "its MLP's gate comes last"
    layers = (mlp.fc1_g, mlp.fc1_x) if type(mlp) is SwiGLU else (mlp.fc1,)
    if any(type(layer) is not nn.Linear for layer in (*layers, mlp.fc2)):
        return "its MLP's layers are not plain linears"
    if type(mlp.norm) is not nn.Identity and not is_layer_norm(mlp.norm):
        return f"its MLP's norm is a {type(mlp.norm).__name__}"
    if activation_name(mlp.act) is None:
        return f"its MLP's activation is a {type(mlp.act).__name__}"
    return dropout_refusal("MLP", mlp, mlp.drop1, mlp.drop2)


def _projection_layers(attn: Any) -> tuple[Any, ...]:
    return (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else (attn.qkv,)


def _projections(attn: Any) -> Linears:
    layers = Linears.of(*_projection_layers(attn))
    if getattr(attn, "q_bias", None) is None:
        return layers
    return layers._replace(biases=(attn.q_bias, attn.k_bias, attn.v_bias))
