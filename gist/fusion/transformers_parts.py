"""What transformers' models have in common, as the fused sublayers take it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gist.fusion.backbone import FusedBackbone
from gist.fusion.padding import pads_on_the_right
from gist.methods.base import Refusal
from gist.untouched import is_own, written_forward

ACTIVATIONS: dict[Any, str] = {
    activations.LinearActivation: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    getattr(activations, "SiLUActivation", nn.SiLU): "silu",
    activations.NewGELUActivation: "gelu_tanh",
}


def library_forward(kind: Any) -> Callable[..., Any] | None:
    """A class's forward; None where another one, decorated as that one or not, is in its place.

    transformers' own decorators carry the name of what they decorate, as anyone's may.
    """
    own: Any = written_forward(kind)
    link = own
    while link is not None:
        if not inspect.isfunction(link):
            return None
        if link.__globals__.get("__name__", "").partition(".")[0] not in ("transformers", "torch"):
            return None
        link = getattr(link, "__wrapped__", None)
    return own


def attention_function_refusal(config: Any) -> Refusal | None:
    name = config._attn_implementation or "eager"
    functions = {"eager": None, "sdpa": sdpa_attention_forward}
    if name not in functions:
        return Refusal(f"its attention implementation is {name!r}")
    if ALL_ATTENTION_FUNCTIONS.get(name) is not functions[name]:
        return Refusal(f"another function was registered for its {name!r} attention")
    if getattr(config, "is_causal", None):
        return Refusal("its attention is causal")
    if config.output_attentions or config.output_hidden_states:
        return Refusal("its config asks for attentions or hidden states")
    return None


def activation_name(act: Any) -> str | None:
    """The name of an activation in :data:`gist_kernels.activations.Activation`, or None."""
    if type(act) is activations.GELUActivation:
        return "gelu" if act.act is F.gelu else None
    if type(act) is activations.GELUTanh:
        called: Any = act.act
        known = isinstance(called, partial) and called.func is F.gelu
        return "gelu_tanh" if known and called.keywords == {"approximate": "tanh"} else None
    return ACTIVATIONS.get(type(act))


ACTIVATION_FORWARDS = {
    kind: library_forward(kind)
    for kind in (activations.GELUActivation, activations.GELUTanh, *ACTIVATIONS)
}


def mask_refusal(mask: torch.Tensor, shape: torch.Size, what: str) -> Refusal | None:
    """Why a padding mask, 1 for ``what`` of this shape, can't be told by each row's length, or
    None. Waits for the device."""
    if mask.shape != shape:  # which transformers refuses
        return Refusal(f"its attention mask has another shape than its {what}")
    if not pads_on_the_right(mask):
        return Refusal(f"its attention mask is not 1 for a row's first {what} and 0 for others")
    return None


class FusedTransformers(FusedBackbone):
    """What the fused forwards of transformers' models have in common."""

    WHOLE: ClassVar[Mapping[Any, Callable[..., Any] | None]]
    """The forwards that run the embeddings, the blocks and what comes after them, by class."""

    def __init__(self, family: Any) -> None:
        super().__init__(family.model)
        self.family = family

    @property
    def blocks(self) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = self.family.blocks
        return blocks

    def refusal(self) -> Refusal | None:
        encoder = self.family.encoder
        within = (getattr(encoder, name, None) for name in ("encoder", "model", "transformer"))
        for part in (self.model, encoder, *within):
            if part is None:
                continue
            kind = type(part)
            if self.WHOLE.get(kind) is None or kind.forward is not self.WHOLE[kind]:
                return Refusal(f"{kind.__name__} has a forward of its own")
            if not is_own(part, "forward"):
                return Refusal(f"the forward of its {kind.__name__} was replaced")
        return attention_function_refusal(encoder.config)

    @property
    def checkpointed(self) -> bool:
        return any(self.recomputes(index) for index in range(len(self.blocks)))

    def recomputes(self, index: int) -> bool:
        block: Any = self.blocks[index]
        recomputed: bool = block.gradient_checkpointing and block.training
        return recomputed
