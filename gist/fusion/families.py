"""Which family's fused forward a backbone has."""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from gist.backbones.text_models import text_family
from gist.backbones.transformers_encoders import (
    TransformersDistilBert,
    TransformersModernBert,
    TransformersMPNet,
)
from gist.backbones.transformers_text import TransformersEncoder, TransformersText
from gist.backbones.transformers_vit import (
    TransformersDINOv3,
    TransformersSiglip2,
    transformers_family,
)
from gist.fusion.backbone import FusedBackbone
from gist.fusion.timm_eva import FusedTimmEva
from gist.fusion.timm_vit import FusedTimmViT
from gist.methods.base import Refusal


def fused_backbone(model: Any) -> FusedBackbone | Refusal:
    """The fused forward of a backbone, or why there is none."""
    if isinstance(model, VisionTransformer):
        return FusedTimmViT(model)
    if isinstance(model, Eva):
        return FusedTimmEva(model)
    family = transformers_family(model)
    if family is not None:
        # Which imports transformers, as the model's maker has.
        from gist.fusion import transformers_vit as fused

        if isinstance(family, TransformersSiglip2):
            return fused.FusedTransformersSiglip2(family)
        rotary = isinstance(family, TransformersDINOv3)
        return (fused.FusedTransformersDINOv3 if rotary else fused.FusedTransformersViT)(family)
    text = text_family(model)
    if text is not None:
        return _fused_text(text)
    return Refusal(f"it is a {type(model).__name__}")


def _fused_text(family: TransformersText) -> FusedBackbone | Refusal:
    kind = type(family)
    if kind is TransformersModernBert:
        from gist.fusion.transformers_modernbert import FusedTransformersModernBert

        return FusedTransformersModernBert(family)
    if not isinstance(family, TransformersEncoder):
        return Refusal(f"a {type(family.model).__name__} has no fused sublayers")
    from gist.fusion import transformers_bert as fused

    if kind is TransformersDistilBert:
        return fused.FusedTransformersDistilBert(family)
    if kind is TransformersMPNet:
        return fused.FusedTransformersMPNet(family)
    return fused.FusedTransformersBert(family)
