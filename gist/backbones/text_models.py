"""The families of transformers' text classifiers."""

from __future__ import annotations

from typing import Any

from gist.backbones.transformers_decoders import TransformersDecoder, TransformersGemma
from gist.backbones.transformers_encoders import (
    TransformersBert,
    TransformersDistilBert,
    TransformersModernBert,
    TransformersMPNet,
    TransformersRoberta,
)
from gist.backbones.transformers_text import TransformersText

_FAMILIES: dict[str, type[TransformersText]] = {
    "Bert": TransformersBert,
    "Roberta": TransformersRoberta,
    "XLMRoberta": TransformersRoberta,
    "Electra": TransformersRoberta,
    "DistilBert": TransformersDistilBert,
    "MPNet": TransformersMPNet,
    "ModernBert": TransformersModernBert,
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3"), TransformersDecoder),
    "Gemma2": TransformersGemma,
    "Gemma3Text": TransformersGemma,
}
_SUFFIX = "ForSequenceClassification"
TEXT_MODELS = tuple(name + _SUFFIX for name in _FAMILIES)


def text_family(model: Any) -> TransformersText | None:
    """The family of one of transformers' text classifiers, or None."""
    name = type(model).__name__
    family = _FAMILIES.get(name.removesuffix(_SUFFIX)) if name.endswith(_SUFFIX) else None
    return None if family is None else family(model)
