"""transformers' text encoders, whose words all see each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from gist.backbones.transformers_text import BlockNames, TransformersEncoder

_BERT_LAYERS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


class TransformersBert(TransformersEncoder):
    """BERT: post-norm blocks; the class token goes through a pooler, which is frozen."""

    block: ClassVar[BlockNames] = BlockNames(
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        outputs=("attention.output.dropout", "output.dropout"),
        layers=_BERT_LAYERS,
        entries=("attention.self.query", "intermediate.dense"),
    )

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        pooler = self.encoder.pooler
        pooled = pooler.activation(pooler.dense(pooled))
        return (head or self.model.classifier)(self.model.dropout(pooled))


class TransformersRoberta(TransformersBert):
    """RoBERTa, XLM-RoBERTa and ELECTRA: as BERT, with a head of two layers."""

    last_layer: ClassVar[str] = "classifier.out_proj"

    @property
    def embedding(self) -> nn.Module:
        return getattr(self.encoder, "embeddings_project", self.encoder.embeddings)

    def _normed(self, words: torch.Tensor, embedding: Any) -> torch.Tensor:
        words = self.encoder.embeddings.LayerNorm(words)
        return words if embedding is self.encoder.embeddings else embedding(words)

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        # The classifier takes the first of each row's tokens.
        flat = pooled.reshape(-1, 1, pooled.shape[-1])
        return (head or self.model.classifier)(flat).unflatten(0, pooled.shape[:-1])


class TransformersMPNet(TransformersRoberta):
    """MPNet: its attention adds a bias for each distance, which the Gist token has as the first
    token has it."""

    block: ClassVar[BlockNames] = BlockNames(
        norms=("attention.LayerNorm", "output.LayerNorm"),
        outputs=("attention.dropout", "output.dropout"),
        layers={
            **_BERT_LAYERS,
            **{name: f"attention.attn.{name}" for name in "qkv"},
            "proj": "attention.attn.o",
        },
        entries=("attention.attn.q", "intermediate.dense"),
    )

    def attach_token(self, hook: Callable[[str], Callable[..., Any]]) -> None:
        super().attach_token(hook)
        bias = self.encoder.encoder.relative_attention_bias
        bias.register_forward_pre_hook(hook("extend_distances"))


class TransformersDistilBert(TransformersEncoder):
    """DistilBERT: post-norm blocks, and a head of two layers."""

    block: ClassVar[BlockNames] = BlockNames(
        norms=("sa_layer_norm", "output_layer_norm"),
        outputs=("attention.out_lin", "ffn.dropout"),
        layers={
            **{name: f"attention.{name}_lin" for name in "qkv"},
            "proj": "attention.out_lin",
            "fc1": "ffn.lin1",
            "fc2": "ffn.lin2",
        },
        entries=("attention.q_lin", "ffn.lin1"),
    )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.encoder.transformer.layer

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.classifier, self.model.pre_classifier]

    def head_copy(self) -> nn.Module:
        model = self.model
        first, last = copy.deepcopy(model.pre_classifier), copy.deepcopy(model.classifier)
        return nn.Sequential(first, nn.ReLU(), nn.Dropout(model.dropout.p), last)

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        if head is not None:
            return head(pooled)
        pooled = torch.relu(self.model.pre_classifier(pooled))
        return self.model.classifier(self.model.dropout(pooled))


class TransformersModernBert(TransformersEncoder):
    """ModernBERT: pre-norm blocks, rotary positions, of which the Gist token has the first token's,
    gated MLPs, and pooling by class token or mean."""

    block: ClassVar[BlockNames] = BlockNames(
        norms=("attn_norm", "mlp_norm"),
        outputs=("attn.out_drop", "mlp"),
        layers={"q+k+v": "attn.Wqkv", "proj": "attn.Wo", "gate+up": "mlp.Wi", "down": "mlp.Wo"},
    )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.encoder.layers

    @property
    def pooling(self) -> str:
        return "avg" if self.model.config.classifier_pooling == "mean" else "token"

    def attach_token(self, hook: Callable[[str], Callable[..., Any]]) -> None:
        super().attach_token(hook)
        self.encoder.register_forward_pre_hook(hook("extend_positions"), with_kwargs=True)

    def _normed(self, words: torch.Tensor, embedding: Any) -> torch.Tensor:
        return embedding.norm(words)

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [self.model.classifier, self.model.head]

    def head_copy(self) -> nn.Module:
        model = self.model
        return copy.deepcopy(nn.Sequential(model.head, model.drop, model.classifier))

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        if head is not None:
            return head(pooled)
        return self.model.classifier(self.model.drop(self.model.head(pooled)))
