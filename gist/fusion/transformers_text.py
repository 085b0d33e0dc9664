"""What transformers' text encoders have in common, as the fused sublayers take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from gist.fusion.backbone import Embedded
from gist.fusion.padding import lengths_of, padded_lengths, pads_on_the_right
from gist.fusion.transformers_parts import FusedTransformers, library_forward
from gist.methods.base import Refusal
from gist_kernels.tracing import needs_dispatcher


class FusedTextEncoder(FusedTransformers):
    """A text encoder for sequence classification."""

    INPUTS: ClassVar[tuple[str, ...]] = ("attention_mask", "position_ids")
    """What a call may have beside its words."""
    # A block's own forward takes a mask that the model's makes.
    ALL_BLOCKS = True

    def call_refusal(self, images: torch.Tensor, others: Mapping[str, Any]) -> Refusal | None:
        given = {name: value for name, value in others.items() if value is not None}
        for name in given:
            if name not in self.INPUTS:
                return Refusal(f"the call has {name}")
        mask = given.get("attention_mask")
        if mask is not None and mask.shape != images.shape:  # which transformers refuses
            return Refusal("its attention mask has another shape than its words")
        if _compiled():
            return None
        if needs_dispatcher(*given.values()):
            return Refusal("it is traced, and a text's padding is a matter of its values")
        if mask is not None and not self.takes(mask):
            return Refusal("its attention mask is not 1 for a row's first words and 0 for others")
        return None

    def takes(self, mask: torch.Tensor) -> bool:
        """Whether the attention takes a (B, N) mask, by its values."""
        return pads_on_the_right(mask)

    def is_later(self, parameter: str) -> bool:
        return not parameter.startswith(f"{self.model.base_model_prefix}.embeddings")

    def lengths(self, *, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        if attention_mask is None:
            return None
        return padded_lengths(attention_mask) if _compiled() else lengths_of(attention_mask)

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
        return x  # which each post-norm block has normed


def whole_forwards(
    module: ModuleType, prefix: str, *names: str
) -> dict[Any, Callable[..., Any] | None]:
    """The forwards that run the embeddings, the blocks and what comes after them, by class."""
    kinds = (getattr(module, prefix + name) for name in ("ForSequenceClassification", *names))
    return {kind: library_forward(kind) for kind in kinds}


def parts_refusal(block: nn.Module, parts: Mapping[str, Any]) -> str | None:
    """Why parts of a block are not of the classes given, by their dotted names; or None."""
    for path, kind in parts.items():
        part = block.get_submodule(path)
        if type(part) is not kind:
            return f"its {kind.__name__} is a {type(part).__name__}"
    return None


def layers_refusal(norms: tuple[Any, ...], linears: tuple[Any, ...]) -> str | None:
    """Why norms and linear layers are not plain ones, or None."""
    for norm in norms:
        if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
            return f"its norm is a {type(norm).__name__}"
    if not all(type(layer) is nn.Linear for layer in linears):
        return "its linear layers are not plain ones"
    return None


def _compiled() -> bool:
    """Whether torch.compile traces the call, and no transform whose rules an operator lacks."""
    return torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
