"""transformers' vision transformers for image classification."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import nn

from gist.backbones.base import BackboneFamily, BlockParts, projections

# Those that a folder may hold, see gist.backbones.hf_folder.
TRANSFORMERS_MODELS = (
    "ViTForImageClassification",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
)
_VIT_NORMS = ("layernorm_before", "layernorm_after")


class TransformersViT(BackboneFamily):
    """transformers' ViT, DINOv2 and DINOv2 with registers for image classification."""

    @property
    def encoder_name(self) -> str:
        """The attribute that holds the model without its classifier."""
        return self.model.base_model_prefix

    @property
    def encoder(self) -> Any:
        return getattr(self.model, self.encoder_name)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        encoder = self.encoder
        return encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer

    def parts(self, index: int) -> BlockParts:
        block: Any = self.blocks[index]
        names = ("norm1", "norm2") if hasattr(block, "norm1") else _VIT_NORMS
        linears, outputs = _linears(block)
        return BlockParts(
            (getattr(block, names[0]), getattr(block, names[1])), outputs, projections(linears)
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
    def image_size(self) -> tuple[int, int, int]:
        size = self.model.config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return self.model.config.num_channels, height, width

    @property
    def final_norm(self) -> nn.Module:
        return self.encoder.layernorm

    @property
    def output_norm(self) -> nn.Module:
        return self.encoder.layernorm

    def logits(self, output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output.logits

    @property
    def pooling(self) -> str:
        return "token" if type(self.model).__name__.startswith("ViT") else "token+avg"

    def features(self, images: torch.Tensor, **others: Any) -> torch.Tensor:
        return self.encoder(images).last_hidden_state

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.classifier]

    @property
    def num_classes(self) -> int:
        return self.model.num_labels

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.keep_pooling(global_pool)
        old = self.model.classifier
        like = next(self.encoder.parameters())
        width = self.embed_dim * (2 if self.pooling == "token+avg" else 1)
        new: nn.Module = nn.Identity()
        if num_classes:
            new = linear = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
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

    def set_grad_checkpointing(self, enable: bool) -> None:
        set_checkpointing(self.model, enable)


class TransformersSiglip(TransformersViT):
    """transformers' SigLIP for image classification, which averages the patches.

    The attention pooling of its image tower has no part in the logits.
    """

    @property
    def encoder_name(self) -> str:
        return "vision_model"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.encoder.encoder.layers

    def parts(self, index: int) -> BlockParts:
        block: Any = self.blocks[index]
        attention, mlp = block.self_attn, block.mlp
        by_name = {name: getattr(attention, f"{name}_proj") for name in "qkv"}
        return BlockParts(
            (block.layer_norm1, block.layer_norm2),
            (attention.out_proj, mlp),
            projections(by_name, proj=attention.out_proj, fc1=mlp.fc1, fc2=mlp.fc2),
        )

    @property
    def embed_dim(self) -> int:
        return self.model.config.vision_config.hidden_size

    @property
    def num_prefix_tokens(self) -> int:
        return 0

    @property
    def has_class_token(self) -> bool:
        return False

    @property
    def class_position(self) -> torch.Tensor | None:
        return None

    @property
    def patch_projection(self) -> nn.Conv2d:
        return self.encoder.embeddings.patch_embedding

    @property
    def image_size(self) -> tuple[int, int, int]:
        config = self.model.config.vision_config
        return config.num_channels, config.image_size, config.image_size

    @property
    def final_norm(self) -> nn.Module:
        return self.encoder.post_layernorm

    @property
    def output_norm(self) -> nn.Module:
        return self.encoder.post_layernorm

    @property
    def unread(self) -> Sequence[nn.Module]:
        return [self.encoder.head] if self.encoder.use_head else []

    @property
    def pooling(self) -> str:
        return "avg"

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean(1)

    def pool_token(self, token: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return token


class TransformersSiglip2(TransformersSiglip):
    """transformers' SigLIP 2 for image classification, which takes images as patches.

    A batch is (B, N, 3 * P * P) patches with padding at the rows' ends, ``spatial_shapes``, (B, 2)
    rows and columns, and ``pixel_attention_mask``, (B, N): 1 for patches and 0 for padding. The
    logits are of the patches' average.
    """

    token_place: ClassVar[str] = "masked"

    def attach_token(self, hook: Callable[[str], Callable[..., Any]]) -> None:
        self.encoder.register_forward_pre_hook(hook("extend_mask"), with_kwargs=True)
        self.encoder.embeddings.register_forward_hook(hook("enter_embedding"))
        self.encoder.register_forward_hook(hook("leave_encoder"))

    def hooked_parts(self) -> Iterator[nn.Module]:
        yield self.encoder
        yield from super().hooked_parts()

    def check_inputs(self, others: Mapping[str, Any]) -> None:
        unknown = others.keys() - {"pixel_attention_mask", "spatial_shapes"}
        if unknown or others.get("spatial_shapes") is None:
            raise TypeError(
                f"a {type(self.model).__name__} takes pixel_values, pixel_attention_mask and "
                f"spatial_shapes, as its image processor gives them; got {', '.join(others)}"
            )
        mask = others.get("pixel_attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                "pixel_attention_mask must be (B, N), 1 for patches and 0 for padding; it is "
                f"{tuple(mask.shape)}"
            )

    def features(self, images: torch.Tensor, **others: Any) -> torch.Tensor:
        return self.encoder(images, **{"pixel_attention_mask": None, **others}).last_hidden_state

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        raise ValueError("patches are pooled by their mask; call the model with the batch")

    def pool_call(self, features: torch.Tensor, **inputs: Any) -> torch.Tensor:
        if not inputs:
            return self.pool(features)
        mask = inputs.get("pixel_attention_mask")
        if mask is None:
            return features.mean(1)
        counted = mask[..., None].to(features.device)
        return (features * counted).sum(1) / counted.sum(1)

    @property
    def patch_projection(self) -> nn.Conv2d:
        self._refuse(
            "no grid of patches that the method could read, for its images come in many shapes, "
            "with padding; take another method"
        )

    @property
    def image_size(self) -> tuple[int, int, int]:
        self._refuse("no image size, so that torch.jit.script does not take it")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"a {type(self.model).__name__} has {what}")


class TransformersDINOv3(TransformersViT):
    """transformers' DINOv3, which has no class for classification: the classifier is ours.

    It reads the class token, as the model's own pooled output does, and is the model's
    ``classifier``.
    """

    @property
    def encoder(self) -> Any:
        return self.model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        # Earlier releases have no encoder of its own around them.
        return self.model.model.layer if hasattr(self.model, "model") else self.model.layer

    @property
    def class_position(self) -> torch.Tensor | None:
        return self.model.embeddings.cls_token[0, 0]

    @property
    def patch_projection(self) -> nn.Conv2d:
        return self.model.embeddings.patch_embeddings

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    @property
    def output_norm(self) -> nn.Module:
        return self.model.norm

    @property
    def pooling(self) -> str:
        return "token"

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.classifier] if hasattr(self.model, "classifier") else []

    @property
    def num_classes(self) -> int:
        return self.model.config.num_labels if self.heads else 0

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if not self.heads:
            self.model.classifier = nn.Identity()
        super().reset_classifier(num_classes, global_pool)

    def logits(self, output: Any) -> torch.Tensor:
        return self.classify(output[0][:, 0])


def set_checkpointing(model: Any, enable: bool) -> None:
    """Let one of transformers' models recompute its blocks' activations, or keep them."""
    name = "activation_checkpointing"  # the name in newer versions of transformers
    name = name if hasattr(model, f"{name}_enable") else "gradient_checkpointing"
    getattr(model, f"{name}_enable" if enable else f"{name}_disable")()


def _linears(block: Any) -> tuple[dict[str, Any], tuple[nn.Module, nn.Module]]:
    """A block's linear layers, and what its two additions to the residual stream come from."""
    attention: Any = block.attention
    mlp: Any = getattr(block, "mlp", None)
    found = {name: getattr(mlp, name, None) for name in ("fc1", "fc2")}
    if hasattr(mlp, "up_proj") and not hasattr(mlp, "gate_proj"):  # DINOv3's
        found = {"fc1": mlp.up_proj, "fc2": mlp.down_proj}
    if hasattr(attention, "o_proj"):
        found |= {name: getattr(attention, f"{name}_proj") for name in "qkv"}
        found["proj"] = attention.o_proj
    else:  # transformers 5.0 to 5.8
        found |= {name[0]: getattr(attention.attention, name) for name in ("query", "key", "value")}
        found["proj"] = attention.output.dense
    if mlp is None:
        found |= {"fc1": block.intermediate.dense, "fc2": block.output.dense}
        return found, (attention.output.dropout, block.output.dropout)
    both = block.dropout if hasattr(block, "dropout") else block.drop_path
    return found, (both, both)


_FAMILIES = {
    **dict.fromkeys(TRANSFORMERS_MODELS, TransformersViT),
    "SiglipForImageClassification": TransformersSiglip,
    "Siglip2ForImageClassification": TransformersSiglip2,
    "DINOv3ViTModel": TransformersDINOv3,
}


def transformers_family(model: Any) -> TransformersViT | None:
    """The family of one of transformers' models, or None."""
    family = _FAMILIES.get(type(model).__name__)
    return None if family is None else family(model)
