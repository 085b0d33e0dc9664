"""AdaptFormer: a bottleneck beside each MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.methods.adapter import ALTERED, Bottleneck
from gist.methods.base import AttachedMethod, FusedParts, Method, Refusal
from gist.untouched import is_bare
from gist.validate import check_activation, check_count, check_finite, check_rate
from gist_kernels.activations import ACTIVATIONS


@dataclass(frozen=True)
class AdaptFormer(Method):
    """A bottleneck parallel to each MLP, read from the residual stream (arXiv:2205.13535)::

        x = x + drop_path(mlp(norm2(x))) + scale * up(dropout(relu(down(x))))

    Down starts Kaiming-uniform, up and both biases at 0. Rank, scale and dropout are those of the
    released code. While training with dropout the blocks run by their own forward: set it to 0 for
    fused sublayers.

    Parameters: ``depth * (2 * D * rank + rank + D)``.

    Args:
        rank: bottleneck width, at least 1.
        scale: factor on the update.
        dropout: dropout rate of the bottleneck, in [0, 1).
        activation: one of those of :func:`gist_kernels.adapter`.
    """

    name: ClassVar[str] = "adaptformer"
    rank: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_finite("scale", self.scale)
        check_rate("dropout", self.dropout)
        check_activation(self.activation)

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        blocks = [family.parts(index) for index in range(len(family.blocks))]
        beside = MlpAdapters(DroppedBottleneck(self, family) for _ in blocks)
        for block, bottleneck, parts in zip(family.blocks, beside, blocks, strict=True):
            bottleneck.attach_parallel(block, parts.readers[1:], parts.branch_outputs[1:])  # type: ignore[operator]
        return beside

    def num_parameters(self, family: BackboneFamily) -> int:
        width = family.embed_dim
        return len(family.blocks) * (2 * width * self.rank + self.rank + width)


class DroppedBottleneck(Bottleneck):
    """A bottleneck with dropout, whose update starts at 0."""

    def __init__(self, config: AdaptFormer, family: BackboneFamily) -> None:
        super().__init__(config, family)
        self.dropout = config.dropout
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    @property
    def drops(self) -> bool:
        return self.training and self.dropout > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.drops:
            return super().forward(x)
        hidden = ACTIVATIONS[self.activation](self.down(x))
        return self.scale * self.up(F.dropout(hidden, self.dropout))


class MlpAdapters(nn.ModuleList, AttachedMethod):
    """A :class:`DroppedBottleneck` for each block's MLP."""

    def fused(self, index: int) -> FusedParts | Refusal:
        bottleneck: Any = self[index]
        if bottleneck.drops:
            return Refusal("its adapter has dropout")
        if not (is_bare(bottleneck) and bottleneck.is_untouched):
            return Refusal(ALTERED)
        return FusedParts(mlp=bottleneck.weights())
