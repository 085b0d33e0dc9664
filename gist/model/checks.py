"""What :func:`gist.wrap` refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gist.backbones.base import BackboneFamily
from gist.model.config import GistConfig
from gist_kernels.quantised import is_quantised


def check(
    backbone: Any, family: BackboneFamily, config: GistConfig, num_classes: int | None
) -> None:
    """Raise a ValueError if a backbone can't be wrapped by a config."""
    if num_classes is not None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be an integer of at least 0; it is {num_classes!r}")
        if num_classes == 0 and config.separate_head:
            raise ValueError("separate_head needs a classifier, and num_classes is 0")
    by_peft = {} if family.model is backbone else backbone.peft_config
    for each in by_peft.values():
        if each.is_prompt_learning:
            # PEFT inserts its prompts in a forward of its own, around the backbone's.
            raise ValueError(
                f"backbone has HF PEFT's {each.peft_type.value}, whose prompts have no place "
                "beside a Gist token; take an adapter of PEFT's, such as LoRA, or a method of "
                "gist's"
            )
    reason = family.refusal(config.gist, new_head=num_classes is not None)
    if reason is not None:
        raise ValueError(f"backbone {reason}")
    if config.gist and config.separate_head:
        family.head_copy()
    if config.gist and config.token_init == "words":
        family.word_statistics()
    if config.gist and config.token_init == "class" and family.class_position is None:
        raise ValueError("token_init='class' needs a backbone with a class token")


def refuse_quantised(trained: Sequence[nn.Parameter], heads: Sequence[nn.Parameter]) -> None:
    """Raise a ValueError if parameters to be trained are quantised."""
    if any(map(is_quantised, trained)):
        raise ValueError("quantised weights can't be trained; take a method that has them frozen")
    if any(map(is_quantised, heads)):
        raise ValueError(
            "backbone's classifier is quantised, and can't be trained; quantise the layers of its "
            "blocks only, or pass num_classes for a new classifier"
        )
