"""transformers' BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT and MPNet, as the fused sublayers
take them: post-norm blocks."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.electra import modeling_electra
from transformers.models.mpnet import modeling_mpnet as mpnet
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

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

    @property
    def parts(self) -> dict[str, Any]:
        """The classes of a block's parts, by their names in it."""
        names = ("attention", "attention.self", "attention.output", "intermediate", "output")
        return dict(zip(names, self[1:], strict=True))


_MODULES = {
    "Bert": modeling_bert,
    "Roberta": modeling_roberta,
    "XLMRoberta": modeling_xlm_roberta,
    "Electra": modeling_electra,
}
_FAMILIES = [_Classes.of(module, prefix) for prefix, module in _MODULES.items()]
_OF_LAYER = {classes.layer: classes for classes in _FAMILIES}


class FusedTransformersBert(FusedTextEncoder):
    """transformers' BERT, RoBERTa, XLM-RoBERTa and ELECTRA for sequence classification."""

    INPUTS: ClassVar[tuple[str, ...]] = ("attention_mask", "token_type_ids", "position_ids")
    FORWARDS: ClassVar[Forwards] = {
        **COMMON_FORWARDS,
        **ACTIVATION_FORWARDS,
        **{kind: library_forward(kind) for classes in _FAMILIES for kind in classes},
    }
    WHOLE: ClassVar[Mapping[Any, Any]] = ChainMap(
        *(whole_forwards(module, prefix, "Model", "Encoder") for prefix, module in _MODULES.items())
    )

    def layers(self, block: Any) -> BlockLayers | Refusal:
        classes = _OF_LAYER.get(class_of(block))
        if classes is None:
            return Refusal(f"it is a {type(block).__name__}")
        if block.is_decoder:
            return Refusal("it is a decoder's")
        reason = parts_refusal(block, classes.parts)
        if reason is not None:
            return Refusal(reason)
        attention, output = block.attention.self, block.attention.output
        if attention.is_causal:
            return Refusal("its attention is causal")
        return _post_norm(
            block,
            (output.LayerNorm, block.output.LayerNorm),
            (attention.query, attention.key, attention.value, output.dense),
            (block.intermediate.dense, block.output.dense),
            block.intermediate.intermediate_act_fn,
            (attention.num_attention_heads, attention.scaling),
            dropout_refusal("attention", attention, attention.dropout)
            or dropout_refusal("block", block, output.dropout, block.output.dropout),
        )


_DISTILBERT_PARTS = {"attention": distilbert.DistilBertSelfAttention, "ffn": distilbert.FFN}


class FusedTransformersDistilBert(FusedTextEncoder):
    """transformers' DistilBERT for sequence classification."""

    FORWARDS: ClassVar[Forwards] = {
        **COMMON_FORWARDS,
        **ACTIVATION_FORWARDS,
        **{
            kind: library_forward(kind)
            for kind in (distilbert.TransformerBlock, *_DISTILBERT_PARTS.values())
        },
    }
    WHOLE = whole_forwards(distilbert, "DistilBert", "Model") | {
        distilbert.Transformer: library_forward(distilbert.Transformer)
    }

    def layers(self, block: Any) -> BlockLayers | Refusal:
        if class_of(block) is not distilbert.TransformerBlock:
            return Refusal(f"it is a {type(block).__name__}")
        reason = parts_refusal(block, _DISTILBERT_PARTS)
        if reason is not None:
            return Refusal(reason)
        attention, ffn = block.attention, block.ffn
        return _post_norm(
            block,
            (block.sa_layer_norm, block.output_layer_norm),
            (attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin),
            (ffn.lin1, ffn.lin2),
            ffn.activation,
            (attention.n_heads, attention.attention_head_size**-0.5),
            dropout_refusal("attention", attention, attention.dropout)
            or dropout_refusal("block", block, ffn.dropout),
        )


_MPNET_PARTS = {
    "attention": mpnet.MPNetAttention,
    "attention.attn": mpnet.MPNetSelfAttention,
    "intermediate": mpnet.MPNetIntermediate,
    "output": mpnet.MPNetOutput,
}


class FusedTransformersMPNet(FusedTextEncoder):
    """transformers' MPNet for sequence classification.

    Its attention adds a bias of distances to the scores, which no kernel does: its modules run, and
    PyTorch's attention between them.
    """

    FORWARDS: ClassVar[Forwards] = {
        **COMMON_FORWARDS,
        **ACTIVATION_FORWARDS,
        **{kind: library_forward(kind) for kind in (mpnet.MPNetLayer, *_MPNET_PARTS.values())},
    }
    WHOLE = whole_forwards(mpnet, "MPNet", "Model", "Encoder")

    def layers(self, block: Any) -> BlockLayers | Refusal:
        if class_of(block) is not mpnet.MPNetLayer:
            return Refusal(f"it is a {type(block).__name__}")
        reason = parts_refusal(block, _MPNET_PARTS)
        if reason is not None:
            return Refusal(reason)
        attention, output = block.attention, block.output
        attn = attention.attn
        layers = _post_norm(
            block,
            (attention.LayerNorm, output.LayerNorm),
            (attn.q, attn.k, attn.v, attn.o),
            (block.intermediate.dense, output.dense),
            block.intermediate.intermediate_act_fn,
            (attn.num_attention_heads, None),
            dropout_refusal("attention", attn, attn.dropout)
            or dropout_refusal("block", block, attention.dropout, output.dropout),
        )
        if isinstance(layers, Refusal):
            return layers
        own = OwnAttention(partial(_biased, attention), "for its scores have a bias", always=True)
        return layers._replace(own_attention=own)

    def takes(self, mask: torch.Tensor) -> bool:
        return True

    def lengths(self, **_: Any) -> None:
        return None  # the scores' bias has the padding

    def scores(
        self,
        embedded: Embedded,
        added_tokens: int,
        lengths: torch.Tensor | None,
        *,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> list[Scores | None]:
        tokens = embedded.tokens
        # Its module carries the hook that gives the Gist token its distances.
        like = tokens.new_empty(1, tokens.shape[1] + added_tokens, 1)
        bias = self.family.encoder.encoder.compute_position_bias(like)
        if attention_mask is not None:
            words = attention_mask.bool()
            seen = words.new_ones(len(words), added_tokens)
            words = torch.cat((words[:, :1], seen, words[:, 1:]), dim=1)[:, None, None]
            bias = bias.masked_fill(~words, torch.finfo(bias.dtype).min)
        return [Scores(bias)] * len(self.blocks)

    def recomputes(self, index: int) -> bool:
        return False  # transformers has no checkpointing of its blocks


def _biased(
    attention: Any, x: torch.Tensor, scores: Scores, num_queries: int | None
) -> torch.Tensor:
    """An MPNetAttention of the first tokens, by PyTorch's attention."""
    attn, read = attention.attn, x[:, :num_queries]
    q, k, v = (
        layer(of).unflatten(-1, (attn.num_attention_heads, -1)).transpose(1, 2)
        for layer, of in ((attn.q, read), (attn.k, x), (attn.v, x))
    )
    bias = scores.bias[:, :, :num_queries].to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out = attention.dropout(attn.o(out.transpose(1, 2).flatten(2)))
    result: torch.Tensor = attention.LayerNorm(out + read)
    return result


def _post_norm(
    block: nn.Module,
    norms: tuple[Any, Any],
    attention: tuple[Any, Any, Any, Any],
    mlp: tuple[Any, Any],
    act: Any,
    heads: tuple[int, float | None],
    dropout: str | None,
) -> BlockLayers | Refusal:
    """A block of norms, q, k, v and proj, fc1 and fc2, activation, number of heads and scale."""
    reason = layers_refusal(norms, (*attention, *mlp))
    if reason is not None:
        return Refusal(reason)
    activation = activation_name(act)
    if activation is None:
        return Refusal(f"its MLP's activation is a {type(act).__name__}")
    if dropout is not None:
        return Refusal(dropout)
    return BlockLayers(
        norms=norms,
        qkv=Linears.of(*attention[:3]),
        proj=Linears.of(attention[3]),
        num_heads=heads[0],
        scale=heads[1],
        fc1=Linears.of(mlp[0]),
        fc2=Linears.of(mlp[1]),
        activation=activation,
        post_norm=True,
    )
