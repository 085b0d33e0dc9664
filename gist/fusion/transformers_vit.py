"""transformers' vision transformers, as the fused sublayers take them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2
from transformers.models.vit import modeling_vit

import gist_kernels as gk
from gist.fusion import block as fused_block
from gist.fusion.backbone import Embedded
from gist.fusion.layers import BlockLayers, Forwards, Linears
from gist.fusion.padding import lengths_of
from gist.fusion.sharding import class_of
from gist.fusion.timm_vit import COMMON_FORWARDS, dropout_refusal
from gist.fusion.transformers_parts import (
    ACTIVATION_FORWARDS,
    FusedTransformers,
    activation_name,
    library_forward,
    mask_refusal,
)
from gist.methods.base import Refusal
from gist_kernels.tracing import needs_dispatcher


class _Classes(NamedTuple):
    """The classes of a block and of its parts; None where a release of transformers has none."""

    layer: Any
    attention: Any
    mlp: Any
    gated_mlp: Any
    layer_scale: Any
    drop_path: Any
    whole: tuple[Any, ...]
    """Those whose forward runs the embeddings, the blocks and what comes after them."""

    @classmethod
    def of(cls, module: ModuleType, prefix: str) -> _Classes:
        def found(name: str) -> Any:
            return getattr(module, prefix + name, None)

        whole = [found(name) for name in ("ForImageClassification", "Model", "Encoder")]
        return cls(
            found("Layer"), found("Attention"), found("MLP"),
            found("SwiGLUFFN") or found("GatedMLP"), found("LayerScale"),
            found("DropPath") or getattr(module, "Dinov3ViTDropPath", None),  # of newer releases
            tuple(k for k in whole if k is not None),
        )  # fmt: skip


_VIT = _Classes.of(modeling_vit, "ViT")
_DINOV3 = _Classes.of(modeling_dinov3_vit, "DINOv3ViT")


def _siglip(module: Any, prefix: str) -> _Classes:
    def found(name: str) -> Any:
        return getattr(module, prefix + name, None)

    return _Classes(
        found("EncoderLayer"), found("Attention"), found("MLP"), None, None, None,
        (
            found("ForImageClassification"),
            # Earlier releases have a transformer, and a model around it that classification is
            # without.
            found("VisionTransformer") or found("VisionModel"),
            found("Encoder"),
        ),
    )  # fmt: skip


_SIGLIP = _siglip(modeling_siglip, "Siglip")
_SIGLIP2 = _siglip(modeling_siglip2, "Siglip2")
_FAMILIES = (
    _VIT,
    _SIGLIP,
    _SIGLIP2,
    _DINOV3,
    _Classes.of(modeling_dinov2, "Dinov2"),
    _Classes.of(modeling_dinov2_with_registers, "Dinov2WithRegisters"),
)
_OF_LAYER = {classes.layer: classes for classes in _FAMILIES}
_WHOLE = {kind: library_forward(kind) for classes in _FAMILIES for kind in classes.whole}


class FusedTransformersViT(FusedTransformers):
    """transformers' ViT, DINOv2, DINOv2 with registers and SigLIP for image classification."""

    FORWARDS: ClassVar[Forwards] = {
        **COMMON_FORWARDS,
        **ACTIVATION_FORWARDS,
        **{
            kind: library_forward(kind)
            for classes in _FAMILIES
            for kind in classes[:-1]
            if kind is not None
        },
    }

    # There, transformers makes a mask for the tokens that leave its embeddings, without gist's.
    EXPORTS_WHOLE = False

    WHOLE = _WHOLE

    def layers(self, block: Any) -> BlockLayers | Refusal:
        reason = _block_refusal(block)
        if reason is not None:
            return Refusal(reason)
        attention, mlp = _attention_layers(_attention(block)), _mlp_layers(block.mlp)
        activation = activation_name(mlp.act)
        assert activation is not None
        scales = (getattr(block, f"layer_scale{i}", None) for i in (1, 2))
        drop_path = _drop_path(getattr(block, "drop_path", None))
        first, second = (None if scale is None else scale.lambda1 for scale in scales)
        return BlockLayers(
            norms=_norms(block),
            qkv=Linears.of(*attention.qkv),
            proj=Linears.of(attention.out),
            num_heads=attention.qkv[0].out_features // attention.head_dim,
            scale=attention.scale,
            fc1=Linears.of(*mlp.first),
            fc2=Linears.of(mlp.last),
            activation=activation,
            gated=len(mlp.first) == 2,
            layer_scales=(first, second),
            drop_paths=(drop_path, drop_path),
        )

    def is_later(self, parameter: str) -> bool:
        return not parameter.startswith(f"{self.family.encoder_name}.embeddings.")

    def embed(self, images: torch.Tensor, **others: Any) -> Embedded:
        images = images.to(self.family.patch_projection.weight.dtype)
        return Embedded(self.family.encoder.embeddings(images))

    def run_block(self, index: int, x: torch.Tensor, embedded: Embedded) -> torch.Tensor:
        block = self.blocks[index]
        # SigLIP's has no default for its mask.
        output: torch.Tensor = block(x, None) if class_of(block) is _SIGLIP.layer else block(x)
        return output

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.family.output_norm(x)
        return features


class FusedTransformersSiglip2(FusedTransformersViT):
    """transformers' SigLIP 2, whose images are rows of patches with padding."""

    # A block's own forward takes a mask that the model's makes.
    ALL_BLOCKS = True

    def call_refusal(self, images: torch.Tensor, others: Mapping[str, Any]) -> Refusal | None:
        mask = others.get("pixel_attention_mask")
        if needs_dispatcher(*(value for value in others.values() if value is not None)):
            return Refusal("it is traced, and an image's padding is a matter of its values")
        return None if mask is None else mask_refusal(mask, images.shape[:2], "patches")

    def embed(self, images: torch.Tensor, **others: Any) -> Embedded:
        # Past the hook by which the Gist token joins where the library's own forward runs.
        return Embedded(self.family.encoder.embeddings.forward(images, others["spatial_shapes"]))

    def lengths(
        self, *, pixel_attention_mask: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor | None:
        return None if pixel_attention_mask is None else lengths_of(pixel_attention_mask)


class FusedTransformersDINOv3(FusedTransformersViT):
    """transformers' DINOv3, whose patches have rotary positions."""

    def is_later(self, parameter: str) -> bool:
        return not parameter.startswith("embeddings.")

    def embed(self, images: torch.Tensor, **others: Any) -> Embedded:
        images = images.to(self.family.patch_projection.weight.dtype)
        tokens = self.model.embeddings(images)
        rotary = self.model.rope_embeddings(images)
        # Contiguous and not in a half type, as the kernels would make them in each block.
        dtype = torch.promote_types(images.dtype, torch.float32)
        return Embedded(tokens, rotary, [t.to(dtype).contiguous() for t in rotary])

    def run_block(self, index: int, x: torch.Tensor, embedded: Embedded) -> torch.Tensor:
        output: torch.Tensor = self.blocks[index](x, position_embeddings=embedded.rotary)
        return output

    def rotation(
        self, index: int, embedded: Embedded, added_tokens: int
    ) -> gk.Rotation | Refusal | None:
        attention: Any = self.blocks[index].attention
        cos, sin = embedded.tables
        num_patches = embedded.tokens.shape[1] - self.family.num_prefix_tokens
        # A rope of the user's may give anything, which the kernels would not check.
        if not sin.shape == cos.shape == (num_patches, attention.head_dim):
            return Refusal("its rotary positions have another shape")
        if sin.requires_grad:
            return Refusal("its rotary positions are trained")
        return gk.Rotation(sin, cos, self.family.num_prefix_tokens + added_tokens, True)


def _norms(block: Any) -> tuple[Any, Any]:
    for names in (("layernorm_before", "layernorm_after"), ("layer_norm1", "layer_norm2")):
        if hasattr(block, names[0]):
            return getattr(block, names[0]), getattr(block, names[1])
    return block.norm1, block.norm2


def _attention(block: Any) -> Any:
    return block.self_attn if hasattr(block, "self_attn") else block.attention


class _AttentionLayers(NamedTuple):
    qkv: tuple[Any, Any, Any]
    out: Any
    head_dim: int
    scale: float
    dropout: float


def _attention_layers(attention: Any) -> _AttentionLayers:
    out, scale, dropout = "o_proj", "scaling", "attention_dropout"
    if not hasattr(attention, dropout):  # DINOv3's
        dropout = "dropout"
    if hasattr(attention, "out_proj"):
        out, scale, dropout = "out_proj", "scale", "dropout"
    return _AttentionLayers(
        (attention.q_proj, attention.k_proj, attention.v_proj),
        getattr(attention, out),
        attention.head_dim,
        getattr(attention, scale),
        getattr(attention, dropout),
    )


def _block_refusal(block: Any) -> str | None:
    classes = _OF_LAYER.get(class_of(block))
    if classes is None:
        return f"it is a {type(block).__name__}"
    earlier = not hasattr(_attention(block), "q_proj") or hasattr(block.mlp, "weights_in")
    if earlier:
        return "its layers are those of an earlier release of transformers"
    for part in _norms(block):
        if type(part) is not nn.LayerNorm or len(part.normalized_shape) != 1:
            return f"its norm is a {type(part).__name__}"
    return (
        _branch_refusal(block, classes)
        or _attention_refusal(_attention(block), classes)
        or _mlp_refusal(block.mlp, classes)
    )


def _branch_refusal(block: Any, classes: _Classes) -> str | None:
    """Why what a block does with its sublayers' outputs can't be fused, or None."""
    if classes is _VIT:
        return dropout_refusal("block", block, block.dropout)
    if classes in (_SIGLIP, _SIGLIP2):
        return None
    for part in (block.layer_scale1, block.layer_scale2):
        if type(part) is not classes.layer_scale:
            return f"its layer scale is a {type(part).__name__}"
    if type(block.drop_path) not in (nn.Identity, classes.drop_path):
        return f"its drop-path is a {type(block.drop_path).__name__}"
    return None


def _attention_refusal(attention: Any, classes: _Classes) -> str | None:
    if type(attention) is not classes.attention:
        return f"its attention is a {type(attention).__name__}"
    layers = _attention_layers(attention)
    if not all(type(layer) is nn.Linear for layer in (*layers.qkv, layers.out)):
        return "its attention's projections are not plain linears"
    widths = {layer.out_features for layer in layers.qkv}
    if len(widths) > 1 or layers.qkv[0].out_features % layers.head_dim:
        return "its attention's heads don't make up its projections"
    if attention.is_causal:
        return "its attention is causal"
    if layers.dropout and attention.training:
        return "its attention has dropout"
    return None


def _mlp_refusal(mlp: Any, classes: _Classes) -> str | None:
    if type(mlp) not in (classes.mlp, classes.gated_mlp):
        return f"its MLP is a {type(mlp).__name__}"
    layers = _mlp_layers(mlp)
    if not all(type(layer) is nn.Linear for layer in (*layers.first, layers.last)):
        return "its MLP's layers are not plain linears"
    if activation_name(layers.act) is None:
        return f"its MLP's activation is a {type(layers.act).__name__}"
    return None


class _MlpLayers(NamedTuple):
    first: tuple[Any, ...]
    """One layer, or gate and value."""
    last: Any
    act: Any


def _mlp_layers(mlp: Any) -> _MlpLayers:
    if hasattr(mlp, "gate_proj"):
        return _MlpLayers((mlp.gate_proj, mlp.up_proj), mlp.down_proj, mlp.act_fn)
    if hasattr(mlp, "up_proj"):
        return _MlpLayers((mlp.up_proj,), mlp.down_proj, mlp.act_fn)
    return _MlpLayers((mlp.fc1,), mlp.fc2, mlp.activation_fn)


def _drop_path(part: Any) -> fused_block.DropPath | None:
    """The draws of a block's DropPath, whether or not it is on."""
    return None if part is None or isinstance(part, nn.Identity) else partial(_factors, part)


def _factors(part: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The factors that transformers' DropPath would draw for x, in its order."""
    if part.drop_prob == 0 or not part.training:
        return None
    keep = 1 - part.drop_prob
    drawn = torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
    return torch.floor(drawn + keep) / keep
