"""What transformers' text classifiers have in common, and what the encoders among them have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import nn

from gist.backbones.base import BackboneFamily, BlockParts, Projection, packed, projections
from gist.backbones.transformers_vit import set_checkpointing

_MOST_WORDS = 4096
"""So many rows of the vocabulary, evenly spaced, stand for all in :meth:`word_statistics`."""
_REFUSED_INPUTS = {
    "labels": "labels go to the loss: gist.GistLoss()(model(input_ids), labels)",
    "inputs_embeds": "the Gist token joins embedded words by itself; give input_ids",
    "past_key_values": "a text is classified in one call; remove it",
    "cache": "a text is classified in one call; remove it",
}


class BlockNames(NamedTuple):
    """Where a block has its layers, by their dotted names."""

    norms: tuple[str, str]
    outputs: tuple[str, str]
    layers: dict[str, str]
    """Of q, k, v, proj, and of fc1 and fc2 or gate, up and down; joined by + in one layer."""
    entries: tuple[str, str] | None = None


class TransformersText(BackboneFamily):
    """One of transformers' models for sequence classification.

    The model's own forward pools its words, so that the class token's logits are its own. A
    subclass says what the pooled words go through, and where a block has its layers.
    """

    main_input_name: ClassVar[str] = "input_ids"
    block: ClassVar[BlockNames]
    last_layer: ClassVar[str] = "classifier"
    """The name of the linear layer that gives the logits."""
    last_bias: ClassVar[bool] = True

    # ---- blocks

    @property
    def encoder(self) -> Any:
        """The model without its classifier."""
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.encoder.layers

    def parts(self, index: int) -> BlockParts:
        block, names = self.blocks[index], self.block

        def pair(of: tuple[str, str]) -> tuple[nn.Module, nn.Module]:
            return block.get_submodule(of[0]), block.get_submodule(of[1])

        found: dict[str, Projection] = {}
        for name, path in names.layers.items():
            layer, held = block.get_submodule(path), name.split("+")
            found |= projections({name: layer}) if len(held) == 1 else packed(layer, held)
        entries = None if names.entries is None else pair(names.entries)
        return BlockParts(pair(names.norms), pair(names.outputs), found, entries)

    @property
    def embed_dim(self) -> int:
        return self.model.config.hidden_size

    # ---- words

    @property
    def embedding(self) -> nn.Module:
        """The module that gives the first block its input."""
        return self.encoder.embeddings

    @property
    def token_init(self) -> str:
        return "words"

    @torch.no_grad()
    def word_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        words, embedding = self.encoder.get_input_embeddings(), self.embedding
        size = self.model.config.vocab_size
        rows = torch.arange(0, size, -(-size // _MOST_WORDS), device=words.weight.device)
        embedded = self._normed(words(rows), embedding).float()
        return embedded.mean(0), embedded.std(0, correction=0)

    def _normed(self, words: torch.Tensor, embedding: Any) -> torch.Tensor:
        """Embedded words as the first block gets them, but for positions."""
        return embedding.LayerNorm(words)

    def check_inputs(self, others: Mapping[str, Any]) -> None:
        for name, reason in _REFUSED_INPUTS.items():
            if others.get(name) is not None:
                raise TypeError(f"a wrapped text model takes no {name}: {reason}")
        mask = others.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be (B, N), 1 for words and 0 for padding; it is "
                f"{tuple(mask.shape)}"
            )

    def features(self, images: torch.Tensor, **others: Any) -> torch.Tensor:
        return self.encoder(input_ids=images, **others)[0]

    def logits(self, output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output.logits

    # ---- the classifier

    @property
    def heads(self) -> Sequence[nn.Module]:
        return [getattr(self.model, self.last_layer.partition(".")[0])]

    @property
    def logit_layers(self) -> Sequence[nn.Module]:
        return [self.model.get_submodule(self.last_layer)]

    @property
    def num_classes(self) -> int:
        return self.model.num_labels

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.keep_pooling(global_pool)
        above, _, name = self.last_layer.rpartition(".")
        holder: Any = self.model.get_submodule(above)
        if above and hasattr(holder, "modules_to_save"):
            # HF PEFT's copy, which it trains, in place of PEFT's module with copy and original.
            holder = next(iter(holder.modules_to_save.values()))
            setattr(self.model, above, holder)
        like = next(self.encoder.parameters())
        new: nn.Module = nn.Identity()
        if num_classes:
            new = linear = nn.Linear(
                self.embed_dim, num_classes, self.last_bias, device=like.device, dtype=like.dtype
            )
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        setattr(holder, name, new.train(getattr(holder, name).training))
        self.model.config.num_labels = self.model.num_labels = num_classes

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        if self.pooling == "token":
            return features[:, 0]
        raise ValueError("a text's tokens are pooled by its padding; call the model with the text")

    def set_grad_checkpointing(self, enable: bool) -> None:
        set_checkpointing(self.model, enable)

    # ---- what images have

    @property
    def class_position(self) -> torch.Tensor | None:
        raise ValueError(
            "token_init='class' is for images; a text starts with a word, so take 'words'"
        )

    @property
    def patch_projection(self) -> nn.Conv2d:
        self._refuse("no patch embedding, which the method needs; take another method")

    @property
    def image_size(self) -> tuple[int, int, int]:
        self._refuse("no image size, so that torch.jit.script does not take it")

    @property
    def final_norm(self) -> nn.Module:
        self._refuse("no features of patches, which the method needs; take another method")

    @property
    def output_norm(self) -> nn.Module:
        self._refuse("no norm that every classifier of its kind reads")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"a {type(self.model).__name__} has {what}")

    # ---- checks

    def refusal(self, gist: bool, new_head: bool = False) -> str | None:
        config = self.model.config
        if config.problem_type in ("regression", "multi_label_classification"):
            return (
                f"is for {config.problem_type} (config.problem_type), where GIST's divergence of "
                "two class distributions is not defined; take single-label classification"
            )
        if self.num_classes == 1 and not new_head:
            return "has one output, which is regression; GIST needs at least 2 classes"
        return super().refusal(gist, new_head)

    def hooked_parts(self) -> Iterator[nn.Module]:
        yield self.encoder
        yield from super().hooked_parts()


class TransformersEncoder(TransformersText):
    """An encoder, whose first token is the class token. The Gist token is the second."""

    token_place: ClassVar[str] = "second"
    num_prefix_tokens = 1
    has_class_token = True

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.encoder.encoder.layer

    @property
    def pooling(self) -> str:
        return "token"

    def attach_token(self, hook: Callable[[str], Callable[..., Any]]) -> None:
        self.encoder.register_forward_pre_hook(hook("extend_mask"), with_kwargs=True)
        self.embedding.register_forward_hook(hook("enter_embedding"))
        self.encoder.register_forward_hook(hook("leave_encoder"))

    def refusal(self, gist: bool, new_head: bool = False) -> str | None:
        if getattr(self.model.config, "is_decoder", False):
            return (
                "is an encoder with causal attention (config.is_decoder), whose second token sees "
                "one word; set is_decoder=False"
            )
        return super().refusal(gist, new_head)
