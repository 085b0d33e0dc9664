"""The families of backbones, and which of them a model belongs to."""

from __future__ import annotations

import sys
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.backbones.text_models import TEXT_MODELS, text_family
from gist.backbones.timm_vit import TimmDistilled, TimmEva, TimmViT
from gist.backbones.transformers_vit import TRANSFORMERS_MODELS, transformers_family

_NO_PLACE = {
    "Beit": "its attention adds a bias for each pair of relative positions, of which a Gist token "
    "has none",
    "NaFlexVit": "its batches mask the patches that an image lacks, by a mask in which a Gist "
    "token has no place",
    "GPT2ForSequenceClassification": "which gives its blocks' output the shape of the ids, so that "
    "no token can join them",
    "Gemma3ForSequenceClassification": "which takes images and text; for text only, take "
    "Gemma3TextForSequenceClassification",
    **dict.fromkeys(
        ("DebertaForSequenceClassification", "DebertaV2ForSequenceClassification"),
        "whose attention is of relative positions, of which a Gist token has none",
    ),
}
"""Models of a kind that is taken, and why a Gist token can't join them."""
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


def family_of(backbone: nn.Module) -> BackboneFamily:
    """The family of a supported backbone, around that backbone.

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
    family = transformers_family(model) or text_family(model)
    if family is not None:
        return family
    kind = type(model).__name__
    if kind == "TimmWrapperForImageClassification":
        raise TypeError("backbone is a model of timm's in a wrapper; give its backbone.timm_model")
    if kind.endswith(_GENERATES):
        raise TypeError(
            f"backbone must classify texts; a {kind} predicts tokens, for which GIST is not "
            "defined; load it by AutoModelForSequenceClassification"
        )
    if kind.endswith("ForSequenceClassification"):
        reason = _NO_PLACE.get(kind, "which no test has run with a Gist token")
        raise TypeError(
            f"backbone must be one of transformers' text classifiers {', '.join(TEXT_MODELS)}; it "
            f"is a {kind}, {reason}"
        )
    reason = _NO_PLACE.get(kind, "which has no sequence of tokens that a Gist token could join")
    raise TypeError(
        "backbone must be a vision transformer for classification: timm's VisionTransformer or "
        "Eva, such as timm.create_model('vit_base_patch16_224'), or one of transformers' "
        f"{', '.join(TRANSFORMERS_MODELS)}, SiglipForImageClassification, "
        "Siglip2ForImageClassification, DINOv3ViTModel, or a "
        f"text classifier, such as BertForSequenceClassification; it is a {kind}, {reason}"
    )
