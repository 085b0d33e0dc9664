"""LoRA: low-rank updates of linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from gist.untouched import is_bare
from gist.validate import check_count, check_finite, check_known, check_rate

# The fused sublayers' layers, by target; and those that hold several targets.
_FUSED = {"proj": "proj", "fc1": "fc1", "fc2": "fc2", "down": "fc2"}
_PACKED = {"qkv": ("q", "k", "v"), "fc1": ("gate", "up")}

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2", "gate", "up", "down")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank updates of linear layers (arXiv:2106.09685): ``y = W x + alpha / rank * B A x``.

    A starts Kaiming-uniform and B at 0. The publication adapts the queries and values.

    Parameters: ``depth * rank * (in + out)`` of each target.

    Args:
        rank: rank of each update, at least 1.
        alpha: scale times rank.
        targets: any of "q", "k", "v", "proj", "fc1", "fc2". Text models with gated MLPs have
            "gate", "up" and "down" instead of "fc1" and "fc2".
        dropout: dropout rate of the update's input, in [0, 1).
    """

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 8.0
    targets: Sequence[str] = ("q", "v")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_finite("alpha", self.alpha)
        check_rate("dropout", self.dropout)
        object.__setattr__(self, "targets", tuple(self.targets))
        for target in self.targets:
            check_known("target", target, TARGETS)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must name each layer once, one at least; {self.targets!r}")

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        found = [
            {target: family.projection(index, target) for target in self.targets}
            for index in range(len(family.blocks))
        ]
        updates = LowRankUpdates(self)
        for index, projections in enumerate(found):
            of_block = {}
            of_layer: dict[nn.Linear, list[tuple[str, int]]] = {}
            for target, projection in projections.items():
                of_block[target] = LowRank(
                    projection.in_features, projection.out_features, self.rank, family
                )
                of_layer.setdefault(projection.layer, []).append((target, projection.start))
            updates.append(nn.ModuleDict(of_block))
            for layer, places in of_layer.items():
                layer.register_forward_hook(Hook(updates, "update", index, tuple(places)))
        return updates

    def num_parameters(self, family: BackboneFamily) -> int:
        return sum(
            self.rank * (projection.in_features + projection.out_features)
            for index in range(len(family.blocks))
            for projection in (family.projection(index, target) for target in self.targets)
        )


class LowRank(nn.Module):
    """The factors of one update: ``down`` (rank, in), A, and ``up`` (out, rank), B."""

    def __init__(self, inputs: int, outputs: int, rank: int, family: BackboneFamily) -> None:
        super().__init__()
        options = new_parameters(family.model)
        self.down = nn.Parameter(torch.empty(rank, inputs, **options))
        self.up = nn.Parameter(torch.zeros(outputs, rank, **options))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``up (down x)``, not scaled."""
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.down.shape[1]} -> {self.down.shape[0]} -> {self.up.shape[0]}"


class LowRankUpdates(nn.ModuleList, AttachedMethod):
    """Each block's :class:`LowRank` factors, by target."""

    def __init__(self, config: LoRA) -> None:
        super().__init__()
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def update(
        self,
        index: int,
        places: Sequence[tuple[str, int]],
        layer: nn.Linear,
        args: tuple[torch.Tensor],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Hook: add the targets' updates to a layer's output, each from its start column."""
        x = F.dropout(args[0], self.dropout, self.training) if self.dropout else args[0]
        of_block: Any = self[index]
        for target, start in places:
            update = self.scale * of_block[target](x)
            rest = output.shape[-1] - start - update.shape[-1]
            output = output + F.pad(update, (start, rest)) if start or rest else output + update
        return output

    def fused(self, index: int) -> FusedParts | Refusal:
        if self.dropout and self.training:
            return Refusal("its update has dropout")
        of_block: Any = self[index]
        if not all(is_bare(factors) for factors in of_block.values()):
            return Refusal("its method's modules are not as gist made them")
        updates = {
            name: LayerUpdate(down=of_block[target].down, up=self.scale * of_block[target].up)
            for target, name in _FUSED.items()
            if target in of_block
        }
        for name, parts in _PACKED.items():
            packed = [(i, of_block[part]) for i, part in enumerate(parts) if part in of_block]
            if packed:
                # Each part has an equal share of the packed layer's outputs.
                last = len(parts) - 1
                up = [F.pad(f.up, (0, 0, i * len(f.up), (last - i) * len(f.up))) for i, f in packed]
                updates[name] = LayerUpdate(
                    down=torch.cat([f.down for _, f in packed]),
                    up=self.scale * torch.cat(up, dim=1),
                )
        return FusedParts(updates=updates)

    def merge(self, family: BackboneFamily) -> None:
        for index, of_block in enumerate(self):
            for target, factors in of_block.items():  # type: ignore[operator]
                layer, start, stop, _ = family.projection(index, target)
                weight = layer.weight
                update = self.scale * (widened(factors.up) @ widened(factors.down))
                weight[start:stop] = (widened(weight[start:stop]) + update).to(weight.dtype)
