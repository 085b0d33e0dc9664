"""VPT: visual prompt tuning, shallow and deep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.backbones.timm_vit import TimmEva
from gist.backbones.transformers_vit import TransformersDINOv3
from gist.methods.base import AttachedMethod, FusedParts, Method, Refusal, new_parameters
from gist.methods.hooks import Hook
from gist.validate import check_count, check_rate


@dataclass(frozen=True)
class VPT(Method):
    """Trained prompt tokens among the patches (arXiv:2203.12119).

    Shallow prompts enter before the first block and pass through all; deep ones are replaced by new
    ones before each block. They stand at the end of the sequence, where the publication has them
    after the class token: blocks without positions of their own treat all places alike. They are
    removed before the final norm, so that no pooling sees them. They start uniform within
    ``sqrt(6 / (3 * p * p + D))`` for patches of p x p pixels.

    Parameters: ``num_tokens * D``, times ``depth`` if deep.

    Args:
        num_tokens: prompts a block, at least 1; the publication chooses among 1, 5, 10, 50, 100
            and 200 for each task; its code's default is 5.
        deep: VPT-Deep rather than VPT-Shallow.
        dropout: dropout rate of the prompts, drawn for each image, in [0, 1).
    """

    name: ClassVar[str] = "vpt"
    num_tokens: int = 5
    deep: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("num_tokens", self.num_tokens)
        check_rate("dropout", self.dropout)

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        self.num_parameters(family)
        prompts = Prompts(self, family)
        for index in range(len(family.blocks) if self.deep else 1):
            family.blocks[index].register_forward_pre_hook(Hook(prompts, "enter", index))
        family.blocks[-1].register_forward_hook(Hook(prompts, "leave"))
        return prompts

    def num_parameters(self, family: BackboneFamily) -> int:
        if isinstance(family, (TimmEva, TransformersDINOv3)):
            raise ValueError(
                "VPT's prompts have no place among the rotary positions of a "
                f"{type(family.model).__name__}; use another method"
            )
        _ = family.patch_projection  # a ValueError of a model without patches
        return self.num_tokens * family.embed_dim * (len(family.blocks) if self.deep else 1)


class Prompts(AttachedMethod):
    """(depth or 1, num_tokens, D) prompts."""

    def __init__(self, config: VPT, family: BackboneFamily) -> None:
        super().__init__()
        height, width = family.patch_projection.kernel_size
        bound = math.sqrt(6 / (3 * height * width + family.embed_dim))
        prompts = torch.empty(
            len(family.blocks) if config.deep else 1,
            config.num_tokens,
            family.embed_dim,
            **new_parameters(family.model),
        )
        self.prompts = nn.Parameter(prompts.uniform_(-bound, bound))
        self.dropout = config.dropout
        self.appended_tokens = config.num_tokens

    def extra_repr(self) -> str:
        return f"prompts={tuple(self.prompts.shape)}, dropout={self.dropout}"

    def fused(self, index: int) -> FusedParts | Refusal:
        return FusedParts()

    def before_block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self(index, x)
        return tokens

    def forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """A block's input with its prompts, in place of the previous block's."""
        if index >= len(self.prompts):
            return x
        prompts = self.prompts[index].to(x.dtype).expand(x.shape[0], -1, -1)
        prompts = F.dropout(prompts, self.dropout, self.training)
        kept = x if index == 0 else self.after_blocks(x)
        return torch.cat((kept, prompts), dim=1)

    def after_blocks(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : -self.appended_tokens]

    def enter(
        self, index: int, block: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Hook before a block: add its prompts."""
        return (self.before_block(index, args[0]), *args[1:])

    def leave(self, block: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        """Hook after the last block: remove the prompts."""
        return self.after_blocks(output)
