"""What the library knows of a backbone: its blocks, their layers, its pooling and its classifier.

A subclass of :class:`Anatomy` a family of models. It holds no state but the model, so one is made
whenever it is needed.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


class Projection(NamedTuple):
    """Rows ``start`` to ``stop`` of a linear layer's output: a packed qkv holds three."""

    layer: nn.Linear
    start: int
    stop: int

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.stop - self.start


class BlockParts(NamedTuple):
    """The layers of a pre-norm block: attention's and the MLP's, in pairs."""

    norms: tuple[nn.Module, nn.Module]
    """Their inputs are the residual stream."""
    exits: tuple[nn.Module, nn.Module]
    """What they give is added to the residual stream; both may be one module, called twice."""
    projections: dict[str, Projection]
    """Those of q, k, v, proj, fc1 and fc2 that are plain linear layers, called as modules."""


class Anatomy(ABC):
    """A backbone whose blocks are pre-norm attention and MLP, and whose classifier is linear."""

    def __init__(self, model: Any) -> None:
        self.model = model

    # ---- blocks

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]: ...

    @abstractmethod
    def parts(self, index: int) -> BlockParts:
        """Raises ValueError for a block of another kind."""

    def projection(self, index: int, name: str) -> Projection:
        """Raises ValueError where that is no plain linear layer."""
        found = self.parts(index).projections.get(name)
        if found is None:
            raise ValueError(
                f"{name!r} of block {index} of this backbone, a "
                f"{type(self.blocks[index]).__name__}, is no plain linear layer to attach to"
            )
        return found

    # ---- what is around them

    @property
    @abstractmethod
    def embed_dim(self) -> int: ...

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token, registers."""

    @property
    @abstractmethod
    def has_class_token(self) -> bool: ...

    @property
    @abstractmethod
    def class_position(self) -> torch.Tensor | None:
        """The class token with its position, (D,), or None."""

    @property
    @abstractmethod
    def patch_projection(self) -> nn.Conv2d: ...

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The one after the last block."""

    @property
    @abstractmethod
    def pooling(self) -> str: ...

    @property
    def reads_prefix_alone(self) -> bool:
        """The classifier sees the first token only, of all that the last block gives."""
        return self.pooling == "token"

    @property
    def prefix_counters(self) -> Sequence[Any]:
        """Modules within the blocks whose ``num_prefix_tokens`` must count tokens that join."""
        return ()

    @abstractmethod
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """All tokens after the final norm, by the model's own forward, hooks included."""

    # ---- the classifier

    @property
    @abstractmethod
    def heads(self) -> Sequence[nn.Module]:
        """The classifier's layers; as a rule one."""

    @property
    @abstractmethod
    def num_classes(self) -> int: ...

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None: ...

    @abstractmethod
    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D) tokens, those of the model alone, to the classifier's (B, F) input."""

    def pool_token(self, token: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The classifier's input where ``token``, (B, D), stands for the pooled one."""
        return token

    @abstractmethod
    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        """(..., F) to (..., C) logits, by ``head`` instead of the model's own if given."""

    # ---- checks

    def refusal(self, gist: bool) -> str | None:
        """Why it can't be wrapped, or None."""
        # HF PEFT keeps a trained copy beside the original, in a module of its own.
        heads = (getattr(head, "original_module", head) for head in self.heads)
        if not all(isinstance(head, nn.Linear) for head in heads):
            return (
                "has no linear classifier; create it with num_classes=..., or call "
                "backbone.reset_classifier(num_classes)"
            )
        # Whatever wrap attaches hangs on a block or within one.
        parts = (part for block in self.blocks for part in block.modules())
        if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            return "carries hooks on its blocks already (is it wrapped?); wrap a fresh one"
        return None


class TimmViT(Anatomy):
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
            _projections(
                _packed(block.attn.qkv),
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
    def final_norm(self) -> nn.Module:
        return self.model.fc_norm if isinstance(self.model.norm, nn.Identity) else self.model.norm

    @property
    def pooling(self) -> str:
        return self.model.global_pool

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(images)

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.head]

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def reset_classifier(self, num_classes: int) -> None:
        self.model.reset_classifier(num_classes)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        return self.model.pool(features)

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        pooled = self.model.head_drop(self.model.fc_norm(pooled))
        return (head or self.model.head)(pooled)

    def refusal(self, gist: bool) -> str | None:
        if not self.pooling:
            return "has no pooling (global_pool=''); use global_pool='token'"
        if gist and self.model.attn_pool is not None:
            return (
                f"pools by attention (global_pool={self.pooling!r}), for which the Gist token's "
                "logits are not defined; use global_pool='token' or 'avg'"
            )
        return super().refusal(gist)


class TimmDistilled(TimmViT):
    """DeiT with a distillation token: its logits are the mean of two heads', each on its token. The
    Gist token's are the mean of both heads' on it."""

    @property
    def reads_prefix_alone(self) -> bool:
        return False  # two tokens, which the Gist token would come between

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.head, self.model.head_dist]

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :2]

    def pool_token(self, token: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return token[:, None].expand(-1, 2, -1)

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        by_class, by_distillation = self.model.head_drop(pooled).unbind(-2)
        if head is not None:
            return head((by_class + by_distillation) / 2)
        return (self.model.head(by_class) + self.model.head_dist(by_distillation)) / 2


class TimmEva(TimmViT):
    """timm's Eva: EVA-02, DINOv3 and others with rotary positions, which the Gist token has not."""

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
            # With biases of its own it reads the weights past the module, hooks and all.
            by_name = _packed(None if getattr(attn, "q_bias", None) is not None else attn.qkv)
        return BlockParts(
            (block.norm1, block.norm2),
            (block.drop_path1, block.drop_path2),
            _projections(
                by_name,
                proj=attn.proj,
                fc1=getattr(block.mlp, "fc1", None),
                fc2=getattr(block.mlp, "fc2", None),
            ),
        )

    @property
    def prefix_counters(self) -> Sequence[Any]:
        return [block.attn for block in self.blocks]


class TransformersViT(Anatomy):
    """transformers' ViT, DINOv2 and DINOv2 with registers for image classification."""

    _BLOCKS: ClassVar = {
        "ViTLayer": ("layernorm_before", "layernorm_after", "dropout"),
        "Dinov2Layer": ("norm1", "norm2", "drop_path"),
        "Dinov2WithRegistersLayer": ("norm1", "norm2", "drop_path"),
    }

    @property
    def encoder(self) -> Any:
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        encoder = self.encoder
        return encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer

    def parts(self, index: int) -> BlockParts:
        block: Any = self.blocks[index]
        names = self._BLOCKS[type(block).__name__]
        norm1, norm2, leaves = (getattr(block, name) for name in names)
        attention, mlp = block.attention, block.mlp
        return BlockParts(
            (norm1, norm2),
            (leaves, leaves),
            _projections(
                {name: getattr(attention, f"{name}_proj") for name in "qkv"},
                proj=attention.o_proj,
                fc1=getattr(mlp, "fc1", None),
                fc2=getattr(mlp, "fc2", None),
            ),
        )

    @property
    def embed_dim(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + getattr(self.model.config, "num_register_tokens", 0)

    @property
    def has_class_token(self) -> bool:
        return True

    @property
    def class_position(self) -> torch.Tensor | None:
        embeddings = self.encoder.embeddings
        return (embeddings.cls_token + embeddings.position_embeddings[:, :1])[0, 0]

    @property
    def patch_projection(self) -> nn.Conv2d:
        return self.encoder.embeddings.patch_embeddings.projection

    @property
    def final_norm(self) -> nn.Module:
        return self.encoder.layernorm

    @property
    def pooling(self) -> str:
        return "token" if type(self.model).__name__.startswith("ViT") else "token+avg"

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder(images).last_hidden_state

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.classifier]

    @property
    def num_classes(self) -> int:
        return self.model.num_labels

    def reset_classifier(self, num_classes: int) -> None:
        old = self.model.classifier
        like = next(self.encoder.parameters())
        width = self.embed_dim * (1 if self.pooling == "token" else 2)
        new = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(new.weight, std=0.02)
        nn.init.zeros_(new.bias)
        self.model.classifier = new.train(old.training)
        self.model.config.num_labels = self.model.num_labels = num_classes

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        return self.pool_token(features[:, 0], features)

    def pool_token(self, token: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.pooling == "token":
            return token
        # DINOv2's classifier averages what follows the class token, its registers left out.
        return torch.cat((token, features[:, self.num_prefix_tokens :].mean(1)), dim=1)

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        return (head or self.model.classifier)(pooled)


def anatomy_of(backbone: nn.Module) -> Anatomy:
    """The anatomy of a supported backbone.

    Raises:
        TypeError: it is of no supported family.
    """
    model: Any = backbone
    if "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel):
        model = model.get_base_model()
    if isinstance(model, VisionTransformer):
        return (TimmDistilled if hasattr(model, "head_dist") else TimmViT)(model)
    if isinstance(model, Eva):
        return TimmEva(model)
    if type(model).__name__ in TRANSFORMERS_MODELS:
        return TransformersViT(model)
    raise TypeError(
        "backbone must be a vision transformer for classification: timm's VisionTransformer or "
        "Eva, such as timm.create_model('vit_base_patch16_224'), or one of transformers' "
        f"{', '.join(TRANSFORMERS_MODELS)}; it is a {type(model).__name__}, "
        "which has no sequence of tokens that a Gist token could join"
    )


TRANSFORMERS_MODELS = (
    "ViTForImageClassification",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
)


def _packed(qkv: Any) -> dict[str, Any]:
    """The three projections of one linear layer."""
    if type(qkv) is not nn.Linear:
        return {}
    width = qkv.out_features // 3
    return {name: Projection(qkv, i * width, (i + 1) * width) for i, name in enumerate("qkv")}


def _projections(by_name: dict[str, Any], **others: Any) -> dict[str, Projection]:
    found = {}
    for name, layer in (by_name | others).items():
        if isinstance(layer, Projection):
            found[name] = layer
        elif type(layer) is nn.Linear:
            found[name] = Projection(layer, 0, layer.out_features)
    return found
