"""transformers' ModernBERT, as the fused sublayers take it."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.modernbert import modeling_modernbert as modernbert

import gist_kernels as gk
from gist.fusion.backbone import Embedded
from gist.fusion.layers import BlockLayers, Forwards, Linears, OwnAttention, Scores
from gist.fusion.sharding import class_of
from gist.fusion.timm_vit import COMMON_FORWARDS, dropout_refusal
from gist.fusion.transformers_parts import ACTIVATION_FORWARDS, activation_name, library_forward
from gist.fusion.transformers_text import (
    FusedTextEncoder,
    layers_refusal,
    parts_refusal,
    whole_forwards,
)
from gist.methods.base import Refusal

_LAYER = modernbert.ModernBertEncoderLayer
_PARTS = {"attn": modernbert.ModernBertAttention, "mlp": modernbert.ModernBertMLP}
_LOCAL = "sliding_attention"


class FusedTransformersModernBert(FusedTextEncoder):
    """transformers' ModernBERT for sequence classification, pooled by its first token.

    A text no longer than the window of local attention is attended to as a whole in every block.
    For a longer one, the blocks of local attention run their own modules around PyTorch's.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("attention_mask",)
    FORWARDS: ClassVar[Forwards] = {
        **COMMON_FORWARDS,
        **ACTIVATION_FORWARDS,
        **{kind: library_forward(kind) for kind in (_LAYER, *_PARTS.values())},
    }
    WHOLE = whole_forwards(modernbert, "ModernBert", "Model")

    def refusal(self) -> Refusal | None:
        if self.family.pooling != "token":
            return Refusal("it pools the mean of its words")
        encoder = self.family.encoder
        if not hasattr(encoder.config, "sliding_window"):
            return Refusal("its layers are those of an earlier release of transformers")
        if any(kind != "default" for kind in encoder.rotary_emb.rope_type.values()):
            # The class token's position, 0, must turn nothing: the kernels leave it as it is.
            return Refusal("its rotary positions are scaled")
        return super().refusal()

    def layers(self, block: Any) -> BlockLayers | Refusal:
        if class_of(block) is not _LAYER:
            return Refusal(f"it is a {type(block).__name__}")
        attn, mlp, first = block.attn, block.mlp, block.attn_norm
        norm = None if type(first) is nn.Identity else first
        norms = tuple(n for n in (norm, block.mlp_norm) if n is not None)
        reason = parts_refusal(block, _PARTS) or layers_refusal(
            norms, (attn.Wqkv, attn.Wo, mlp.Wi, mlp.Wo)
        )
        if reason is not None:
            return Refusal(reason)
        activation = activation_name(mlp.act)
        if activation is None:
            return Refusal(f"its MLP's activation is a {type(mlp.act).__name__}")
        if attn.attention_dropout and attn.training:
            return Refusal("its attention has dropout")
        reason = dropout_refusal("block", block, attn.out_drop, mlp.drop)
        if reason is not None:
            return Refusal(reason)
        own = None
        if block.attention_type == _LOCAL:
            calls = f"beyond {self._window + 1} tokens"
            own = OwnAttention(partial(_local, block), calls, always=False)
        return BlockLayers(
            norms=(norm, block.mlp_norm),
            qkv=Linears.of(attn.Wqkv),
            proj=Linears.of(attn.Wo),
            num_heads=attn.Wqkv.out_features // 3 // attn.head_dim,
            scale=attn.head_dim**-0.5,
            fc1=Linears.of(mlp.Wi),
            fc2=Linears.of(mlp.Wo),
            activation=activation,
            gated=True,
            own_attention=own,
        )

    @property
    def _window(self) -> int:
        """How far a word of a local block sees, to either side."""
        window: int = self.family.encoder.config.sliding_window
        return window

    def embed(self, images: torch.Tensor, **others: Any) -> Embedded:
        encoder = self.family.encoder
        tokens = encoder.embeddings.forward(input_ids=images)
        positions = torch.arange(images.shape[1], device=images.device)[None]
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        rotary = {
            kind: tuple(
                table[0].to(dtype).contiguous()
                for table in encoder.rotary_emb(tokens, positions, kind)
            )
            for kind in set(encoder.config.layer_types)
        }
        return Embedded(tokens, tables=rotary)

    def rotation(
        self, index: int, embedded: Embedded, added_tokens: int
    ) -> gk.Rotation | Refusal | None:
        block: Any = self.blocks[index]
        cos, sin = embedded.tables[block.attention_type]
        if len(cos) == 1:
            return None
        # The first token has position 0, which turns nothing, and the Gist token has it too.
        return gk.Rotation(sin[1:], cos[1:], 1 + added_tokens, True)

    def scores(
        self, embedded: Embedded, added_tokens: int, lengths: torch.Tensor | None, **_: Any
    ) -> list[Scores | None]:
        like = embedded.tokens
        count = like.shape[1] + added_tokens
        kinds = [block.attention_type for block in self.family.blocks]
        if count <= self._window + 1 or _LOCAL not in kinds:
            return [None] * len(kinds)
        places = torch.arange(count, device=like.device)
        seen = ((places[:, None] - places).abs() <= self._window)[None, None]
        if lengths is not None:
            seen = seen & (places < lengths[:, None])[:, None, None]
        # Not -inf: there is no word within the window of some padding.
        bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        bias = bias.masked_fill(~seen, torch.finfo(like.dtype).min)
        sources = (places - added_tokens).clamp(min=0)
        cos, sin = embedded.tables[_LOCAL]
        scores = Scores(bias, (cos[sources], sin[sources]))
        return [scores if kind == _LOCAL else None for kind in kinds]

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.family.encoder.final_norm(x)
        return features


def _local(block: Any, x: torch.Tensor, scores: Scores, num_queries: int | None) -> torch.Tensor:
    """A block's attention sublayer within a window, by PyTorch's attention."""
    attn = block.attn
    assert scores.rotary is not None
    packed = attn.Wqkv(block.attn_norm(x)).unflatten(-1, (3, -1, attn.head_dim))
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    q, k = (_rotated(part, *scores.rotary) for part in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=scores.bias.to(q.dtype))
    # Of all tokens: a method's hook adds an update of all.
    return (x + attn.out_drop(attn.Wo(out.transpose(1, 2).flatten(2))))[:, :num_queries]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, H, N, Dh), whose halves are pairs, rotated by (N, Dh) tables."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
