"""timm's vision transformers: VisionTransformer, its distilled form, and Eva."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm.layers
import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from gist.backbones.base import BackboneFamily, BlockParts, packed, projections


class TimmViT(BackboneFamily):
    """timm's VisionTransformer: ViT, DeiT, DINOv2, CLIP's and SigLIP's image towers, ..."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    def parts(self, index: int) -> BlockParts:
        block = self.blocks[index]
        if not isinstance(block, Block):
            raise ValueError(
                f"PEFT methods attach to timm's pre-norm Block; blocks.{index} of this backbone "
                f"is a {type(block).__name__}"
            )
        return BlockParts(
            (block.norm1, block.norm2),
            (block.drop_path1, block.drop_path2),
            projections(
                packed(block.attn.qkv),
                proj=block.attn.proj,
                fc1=getattr(block.mlp, "fc1", None),
                fc2=getattr(block.mlp, "fc2", None),
            ),
        )

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        return self.model.cls_token is not None

    @property
    def class_position(self) -> torch.Tensor | None:
        token, position = self.model.cls_token, self.model.pos_embed
        if token is None:
            return None
        with_position = position is not None and not self.model.no_embed_class
        return (token + position[:, :1] if with_position else token)[0, 0]

    @property
    def patch_projection(self) -> nn.Conv2d:
        return self.model.patch_embed.proj

    @property
    def image_size(self) -> tuple[int, int, int]:
        return (self.model.in_chans, *self.model.patch_embed.img_size)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.fc_norm if isinstance(self.model.norm, nn.Identity) else self.model.norm

    @property
    def output_norm(self) -> nn.Module:
        return self.model.norm

    @property
    def pooling(self) -> str:
        return self.model.global_pool

    def features(self, images: torch.Tensor, **others: Any) -> torch.Tensor:
        return self.model.forward_features(images)

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.head]

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.model.reset_classifier(num_classes, global_pool)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        return self.model.pool(features)

    def pool_token(self, token: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Where the model pools by attention, its pooling of the Gist token alone: the pool's query
        has one key, so that its projections and MLP apply to that token's value."""
        by_attention = self.model.attn_pool
        return token if by_attention is None else by_attention(token[:, None])

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        return (head or self.model.head)(self.pre_logits(pooled))

    def pre_logits(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.model.head_drop(self.model.fc_norm(pooled))

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.model.set_grad_checkpointing(enable)

    @property
    def needs_input_gradients(self) -> bool:
        # Before timm 1.0.16 there was nothing to choose.
        reentrant = getattr(timm.layers, "use_reentrant_ckpt", lambda: True)
        return self.model.grad_checkpointing and reentrant()

    def refusal(self, gist: bool, new_head: bool = False) -> str | None:
        if not self.pooling:
            return "has no pooling (global_pool=''); use global_pool='token'"
        by_attention = self.model.attn_pool
        if gist and getattr(by_attention, "pos_embed", None) is not None:
            return (
                f"pools by attention (global_pool={self.pooling!r}) with a position for each "
                "patch, of which the Gist token has none; use global_pool='token' or 'avg'"
            )
        return super().refusal(gist, new_head)


class TimmDistilled(TimmViT):
    """DeiT with a distillation token: logits are the mean of two heads, each on its own token.

    The Gist token's logits are the mean of both heads on the Gist token.
    """

    @property
    def reads_only_prefix(self) -> bool:
        return False  # two tokens, which the Gist token would come between

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.head, self.model.head_dist]

    def logits(self, output: Any) -> torch.Tensor:
        # Training with distilled_training set, timm returns both heads' logits.
        logits: torch.Tensor = (output[0] + output[1]) / 2 if isinstance(output, tuple) else output
        return logits

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :2]

    def pool_token(self, token: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return token[:, None].expand(-1, 2, -1)

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        by_class, by_distillation = self.model.head_drop(pooled).unbind(-2)
        if head is not None:
            return head((by_class + by_distillation) / 2)
        return (self.model.head(by_class) + self.model.head_dist(by_distillation)) / 2

    def pre_logits(self, pooled: torch.Tensor) -> torch.Tensor:
        by_class, by_distillation = self.model.head_drop(pooled).unbind(-2)
        return (by_class + by_distillation) / 2


class TimmEva(TimmViT):
    """timm's Eva: EVA-02, DINOv3 and others with rotary positions. The Gist token has none."""

    def parts(self, index: int) -> BlockParts:
        block: Any = self.blocks[index]
        if not isinstance(block, EvaBlock):
            raise ValueError(
                f"PEFT methods attach to timm's pre-norm EvaBlock; blocks.{index} of this backbone "
                f"is a {type(block).__name__}"
            )
        attn = block.attn
        if attn.qkv is None:
            by_name = {name: getattr(attn, f"{name}_proj") for name in "qkv"}
        else:
            apart = getattr(attn, "q_bias", None) is not None
            # timm may read or leave out a bias of qkv's own beside the separate ones.
            readable = not (apart and attn.qkv.bias is not None)
            by_name = packed(attn.qkv if readable else None, bias_apart=apart)
        return BlockParts(
            (block.norm1, block.norm2),
            (block.drop_path1, block.drop_path2),
            projections(
                by_name,
                proj=attn.proj,
                fc1=getattr(block.mlp, "fc1", None),
                fc2=getattr(block.mlp, "fc2", None),
            ),
        )

    def call_hooked_layers(self) -> None:
        # With biases of queries and values apart, timm reads qkv's weight, unless told to add them
        # to what a call of qkv gives.
        for block in self.blocks:
            attn: Any = block.attn
            if getattr(attn, "q_bias", None) is not None and attn.qkv._forward_hooks:
                attn.qkv_bias_separate = True

    @property
    def prefix_counters(self) -> Sequence[Any]:
        return [block.attn for block in self.blocks]
