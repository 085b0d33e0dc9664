"""transformers' BERT, RoBERTa, XLM-RoBERTa and ELECTRA, as the fused sublayers take them."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.electra import modeling_electra
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

from gist.fusion.backbone import Embedded
from gist.fusion.block import BlockLayers, Forwards, Linears
from gist.fusion.padding import padded_lengths, pads_on_the_right
from gist.fusion.timm_vit import COMMON_FORWARDS, dropout_refusal
from gist.fusion.transformers_parts import (
    ACTIVATION_FORWARDS,
    FusedTransformers,
    activation_name,
    library_forward,
)
from gist.methods.base import Refusal
from gist_kernels.tracing import needs_dispatcher


class _Classes(NamedTuple):
    """The classes of a block and of its parts."""

    layer: Any
    attention: Any
    self_attention: Any
    attention_output: Any
    intermediate: Any
    output: Any

    @classmethod
    def of(cls, module: ModuleType, prefix: str) -> _Classes:
        names = ("Layer", "Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")
        return cls(*(getattr(module, prefix + name) for name in names))


_MODULES = {
    "Bert": modeling_bert,
    "Roberta": modeling_roberta,
    "XLMRoberta": modeling_xlm_roberta,
    "Electra": modeling_electra,
}
_FAMILIES = [_Classes.of(module, prefix) for prefix, module in _MODULES.items()]
_OF_LAYER = {classes.layer: classes for classes in _FAMILIES}
# Those whose forward runs the embeddings, the blocks and what comes after them.
_WHOLE = {
    kind: library_forward(kind)
    for prefix, module in _MODULES.items()
    for kind in (
        getattr(module, prefix + name) for name in ("ForSequenceClassification", "Model", "Encoder")
    )
}
# What a call may have beside its words.
_INPUTS = ("attention_mask", "token_type_ids", "position_ids")


class FusedTransformersBert(FusedTransformers):
    """transformers' BERT, RoBERTa, XLM-RoBERTa and ELECTRA for sequence classification."""

    FORWARDS: ClassVar[Forwards] = {
        **COMMON_FORWARDS,
        **ACTIVATION_FORWARDS,
        **{kind: library_forward(kind) for classes in _FAMILIES for kind in classes},
    }
    # A block's own forward takes a mask that the model's makes.
    ALL_BLOCKS = True
    WHOLE = _WHOLE

    def call_refusal(self, images: torch.Tensor, others: Mapping[str, Any]) -> Refusal | None:
        given = {name: value for name, value in others.items() if value is not None}
        for name in given:
            if name not in _INPUTS:
                return Refusal(f"the call has {name}")
        mask = given.get("attention_mask")
        if mask is not None and mask.shape != images.shape:  # which transformers refuses
            return Refusal("its attention mask has another shape than its words")
        if _compiled():
            return None
        if needs_dispatcher(*given.values()):
            return Refusal("it is traced, and a text's padding is a matter of its values")
        if mask is not None and not pads_on_the_right(mask):
            return Refusal("its attention mask is not 1 for a row's first words and 0 for others")
        return None

    def layers(self, block: Any) -> BlockLayers | Refusal:
        reason = _block_refusal(block)
        if reason is not None:
            return Refusal(reason)
        attention, heads = block.attention.self, block.attention.self.num_attention_heads
        activation = activation_name(block.intermediate.intermediate_act_fn)
        assert activation is not None
        return BlockLayers(
            norms=(block.attention.output.LayerNorm, block.output.LayerNorm),
            qkv=Linears.of(attention.query, attention.key, attention.value),
            proj=Linears.of(block.attention.output.dense),
            num_heads=heads,
            scale=attention.scaling,
            fc1=Linears.of(block.intermediate.dense),
            fc2=Linears.of(block.output.dense),
            activation=activation,
            post_norm=True,
        )

    def is_later(self, parameter: str) -> bool:
        return not parameter.startswith(f"{self.model.base_model_prefix}.embeddings")

    def lengths(self, *, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        if attention_mask is None:
            return None
        if _compiled():
            return padded_lengths(attention_mask)
        return None if bool(attention_mask.all()) else attention_mask.bool().sum(1)

    def embed(self, images: torch.Tensor, **others: Any) -> Embedded:
        given = {name: value for name, value in others.items() if value is not None}
        given.pop("attention_mask", None)
        encoder, last = self.family.encoder, self.family.embedding
        # Past the hook by which the Gist token joins where the library's own forward runs.
        tokens = encoder.embeddings.forward(input_ids=images, **given)
        if last is not encoder.embeddings:
            tokens = last.forward(tokens)
        return Embedded(tokens)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x  # which each block has normed


def _compiled() -> bool:
    """Whether torch.compile traces the call, and no transform whose rules an operator lacks."""
    return torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _block_refusal(block: Any) -> str | None:
    classes = _OF_LAYER.get(type(block))
    if classes is None:
        return f"it is a {type(block).__name__}"
    if block.is_decoder:
        return "it is a decoder's"
    attention = block.attention
    parts = (attention, attention.self, attention.output, block.intermediate, block.output)
    for part, kind in zip(parts, classes[1:], strict=True):
        if type(part) is not kind:
            return f"its {kind.__name__} is a {type(part).__name__}"
    for norm in (attention.output.LayerNorm, block.output.LayerNorm):
        if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
            return f"its norm is a {type(norm).__name__}"
    projections = (attention.self.query, attention.self.key, attention.self.value)
    others = (attention.output.dense, block.intermediate.dense, block.output.dense)
    if not all(type(layer) is nn.Linear for layer in (*projections, *others)):
        return "its linear layers are not plain ones"
    if attention.self.is_causal:
        return "its attention is causal"
    act = block.intermediate.intermediate_act_fn
    if activation_name(act) is None:
        return f"its MLP's activation is a {type(act).__name__}"
    return dropout_refusal("attention", attention.self, attention.self.dropout) or dropout_refusal(
        "block", block, attention.output.dropout, block.output.dropout
    )
