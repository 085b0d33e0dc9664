"""transformers' text decoders, whose words see the words before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from gist.backbones.transformers_text import BlockNames, TransformersText


class TransformersDecoder(TransformersText):
    """Llama, Mistral, Qwen2 and Qwen3: causal attention. The classifier reads the last token, and
    the Gist token stands right behind that one."""

    token_place: ClassVar[str] = "last"
    num_prefix_tokens = 0
    has_class_token = False
    last_layer: ClassVar[str] = "score"
    last_bias: ClassVar[bool] = False
    block: ClassVar[BlockNames] = BlockNames(
        norms=("input_layernorm", "post_attention_layernorm"),
        outputs=("self_attn.o_proj", "mlp.down_proj"),
        layers={
            **{name: f"self_attn.{name}_proj" for name in "qkv"},
            "proj": "self_attn.o_proj",
            **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        },
    )

    @property
    def embedding(self) -> nn.Module:
        return self.encoder.embed_tokens

    def _normed(self, words: torch.Tensor, embedding: Any) -> torch.Tensor:
        return words

    @property
    def norm_types(self) -> tuple[type[nn.Module], ...]:
        return (*super().norm_types, type(self.encoder.norm))

    @property
    def pooling(self) -> str:
        return "last"

    def attach_token(self, hook: Callable[..., Callable[..., Any]]) -> None:
        # The classifier's config, which tells padding, may be another one than the decoder's.
        config = self.model.config
        self.encoder.register_forward_pre_hook(hook("extend_inputs", config), with_kwargs=True)
        self.embedding.register_forward_hook(hook("enter_embedding", config))
        self.encoder.register_forward_hook(hook("leave_decoder", config), with_kwargs=True)

    def check_inputs(self, others: Mapping[str, Any]) -> None:
        super().check_inputs(others)
        if others.get("position_ids") is not None and others.get("attention_mask") is None:
            raise ValueError(
                "position_ids need attention_mask beside them: without it, transformers takes "
                "positions that don't count up for those of packed sequences"
            )

    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        return (head or self.model.score)(pooled)

    def refusal(self, gist: bool, new_head: bool = False) -> str | None:
        config = self.model.config
        both_ways = getattr(config, "use_bidirectional_attention", False)
        if both_ways or not getattr(config, "is_causal", True):
            return (
                "has attention that is not causal, so that its words would see a Gist token behind "
                "them; take it with causal attention"
            )
        return super().refusal(gist, new_head)


class TransformersGemma(TransformersDecoder):
    """Gemma 2 and 3: a norm before each sublayer, and one after it."""

    block: ClassVar[BlockNames] = TransformersDecoder.block._replace(
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        outputs=("post_attention_layernorm", "post_feedforward_layernorm"),
    )
