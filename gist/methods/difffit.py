"""DiffFit: biases, norms, and a new scale on each sublayer's output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.methods.base import (
    AttachedMethod,
    FusedParts,
    LayerUpdate,
    Method,
    Refusal,
    new_parameters,
    widened,
)
from gist.methods.hooks import Hook
from gist.methods.selective import BitFit, LayerNormTuning
from gist.untouched import is_bare

_NAMES = ("proj", "fc2")
"""What the gammas are called; a gated text MLP's last layer is called down elsewhere."""


@dataclass(frozen=True)
class DiffFit(Method):
    """Train biases and norms, and a scale on each sublayer's output (arXiv:2304.06648)::

        x = x + drop_path(gamma1 * attn(norm1(x)));  x = x + drop_path(gamma2 * mlp(norm2(x)))

    Both gammas have a value for each feature and start at 1. The publication adapts diffusion
    models, whose class embedding it trains too; here that is the classifier.

    Parameters: those of :class:`BitFit`, the norms' scales, and ``depth * 2 * D`` gammas:
    ``depth * 15 * D + 3 * D`` for a plain ViT; 140,544 for ViT-B/16.
    """

    name: ClassVar[str] = "difffit"

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        last = [
            dict(zip(_NAMES, family.last_layers(index), strict=True))
            for index in range(len(family.blocks))
        ]
        gammas, options = Gammas(), new_parameters(family.model)
        for index, layers in enumerate(last):
            gammas.append(nn.ModuleDict({n: Gamma(family.embed_dim, options) for n in layers}))
            for name, layer in layers.items():
                layer.register_forward_hook(Hook(gammas, "scaled", index, name))
        return gammas

    def trained(self, family: BackboneFamily) -> Iterable[nn.Parameter]:
        both = (*BitFit().trained(family), *LayerNormTuning().trained(family))
        return list({id(parameter): parameter for parameter in both}.values())

    def num_parameters(self, family: BackboneFamily) -> int:
        for index in range(len(family.blocks)):
            family.last_layers(index)
        trained = sum(parameter.numel() for parameter in self.trained(family))
        return trained + 2 * len(family.blocks) * family.embed_dim


class Gamma(nn.Module):
    """``weight * y`` over (..., D) features."""

    def __init__(self, width: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, **options))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.weight.to(y.dtype) * y


class Gammas(nn.ModuleList, AttachedMethod):
    """For each block a :class:`Gamma` for "proj", the attention's last layer, and for "fc2"."""

    def scaled(
        self, index: int, name: str, layer: nn.Module, args: object, output: torch.Tensor
    ) -> torch.Tensor:
        """Hook: a layer's output, scaled."""
        of_block: Any = self[index]
        scaled: torch.Tensor = of_block[name](output)
        return scaled

    def fused(self, index: int) -> FusedParts | Refusal:
        of_block: Any = self[index]
        if not all(is_bare(gamma) for gamma in of_block.values()):
            return Refusal("its method's modules are not as gist made them")
        return FusedParts(updates={n: LayerUpdate(scale=g.weight) for n, g in of_block.items()})

    def merge(self, family: BackboneFamily) -> None:
        for index, of_block in enumerate(self):
            gammas = of_block.values()  # type: ignore[operator]
            for layer, gamma in zip(family.last_layers(index), gammas, strict=True):
                scale = widened(gamma.weight)
                layer.weight.copy_(scale[:, None] * widened(layer.weight))
                if layer.bias is not None:
                    layer.bias.copy_(scale * widened(layer.bias))
