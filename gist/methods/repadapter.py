"""RepAdapter: linear adapters before each sublayer, which merge into its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.methods.base import (
    AttachedMethod,
    FusedParts,
    Method,
    Refusal,
    new_parameters,
    widened,
)
from gist.methods.hooks import Hook
from gist.methods.linear import CastLinear
from gist.validate import check_count, check_finite, check_rate

_PLACES = ("attention", "mlp")


@dataclass(frozen=True)
class RepAdapter(Method):
    """Linear adapters between norm and sublayer (arXiv:2302.08106)::

        n = norm(x);  n = n + scale * up(dropout(down(n)));  x = x + drop_path(sublayer(n))

    ``up`` is group-wise: output group g reads only its share of the bottleneck. Without a
    nonlinearity both fold into the linear layer that follows (:func:`gist.merge`). Down starts
    Xavier-uniform, up and both biases at 0.

    Parameters: ``2 * depth * (D * rank + rank + D * rank / groups + D)``.

    Args:
        rank: bottleneck width, a multiple of ``groups``.
        groups: of ``up``; D is a multiple of it.
        scale: factor on the update; the publication chooses it for each task of 0.1 to 10.
        dropout: dropout rate of the bottleneck, in [0, 1).
    """

    name: ClassVar[str] = "repadapter"
    rank: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_count("groups", self.groups)
        check_count("rank", self.rank)
        if self.rank % self.groups:
            raise ValueError(f"rank, {self.rank}, must be a multiple of groups, {self.groups}")
        check_finite("scale", self.scale)
        check_rate("dropout", self.dropout)

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        if family.embed_dim % self.groups:
            raise ValueError(
                f"groups, {self.groups}, must divide the backbone's width, {family.embed_dim}"
            )
        norms = [_norms(family, index) for index in range(len(family.blocks))]
        adapters = LinearAdapters(self)
        for index, of_block in enumerate(norms):
            pair = {place: GroupedLinear(self, family) for place in _PLACES}
            adapters.append(nn.ModuleDict(pair))
            for place, norm in zip(_PLACES, of_block, strict=True):
                norm.register_forward_hook(Hook(adapters, "adapt", index, place))
        return adapters

    def num_parameters(self, family: BackboneFamily) -> int:
        _norms(family, 0)
        width, rank = family.embed_dim, self.rank
        each = width * rank + rank + width * rank // self.groups + width
        return 2 * len(family.blocks) * each


def _norms(family: BackboneFamily, index: int) -> tuple[nn.Module, nn.Module]:
    parts = family.parts(index)
    if parts.entries is not None:
        raise ValueError(
            f"RepAdapter adapts what lies between a norm and its sublayer; a "
            f"{type(family.model).__name__} has its norms behind the sublayers, where the residual "
            "stream passes too; take LoRA, or an adapter"
        )
    return parts.norms


class GroupedLinear(nn.Module):
    """``up(down(n))``: (rank, D) down, and up as (groups, D / groups, rank / groups)."""

    def __init__(self, config: RepAdapter, family: BackboneFamily) -> None:
        super().__init__()
        width, rank, groups = family.embed_dim, config.rank, config.groups
        options = new_parameters(family.model)
        self.down = CastLinear(width, rank, **options)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.up_weight = nn.Parameter(
            torch.zeros(groups, width // groups, rank // groups, **options)
        )
        self.up_bias = nn.Parameter(torch.zeros(width, **options))

    def forward(self, n: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        low = F.dropout(self.down(n), dropout)
        low = low.unflatten(-1, (len(self.up_weight), -1))
        up = torch.einsum("...gr,gdr->...gd", low, self.up_weight.to(n.dtype))
        return up.flatten(-2) + self.up_bias.to(n.dtype)


class LinearAdapters(nn.ModuleList, AttachedMethod):
    """For each block a :class:`GroupedLinear` for "attention" and one for "mlp"."""

    def __init__(self, config: RepAdapter) -> None:
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout

    def adapt(
        self, index: int, place: str, norm: nn.Module, args: object, output: torch.Tensor
    ) -> torch.Tensor:
        """Hook: a norm's output, adapted."""
        of_block: Any = self[index]
        return output + self.scale * of_block[place](output, self.dropout * self.training)

    def fused(self, index: int) -> FusedParts | Refusal:
        # W (up down) n is an update of rank ``rank`` of qkv and fc1, exactly. It was no faster: it
        # touches 3 D and 4 D features for each token, where the hooks touch D.
        return Refusal("its method is RepAdapter, which is as fast by hooks")

    def merge(self, family: BackboneFamily) -> None:
        for index, of_block in enumerate(self):
            names = family.parts(index).layer_names
            first = {"attention": ("q", "k", "v"), "mlp": names[4:-1]}
            for place, names in first.items():
                adapter: Any = of_block[place]  # type: ignore[index]
                down, bias = widened(adapter.down.weight), widened(adapter.down.bias)
                up = torch.block_diag(*widened(adapter.up_weight))
                matrix = torch.eye(len(up), dtype=up.dtype, device=up.device)
                matrix = matrix + self.scale * up @ down
                shift = self.scale * (up @ bias + widened(adapter.up_bias))
                for name in names:
                    layer, start, stop, _ = family.projection(index, name).with_own_bias(
                        "RepAdapter, merged,"
                    )
                    if layer.bias is None:
                        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
                    weight = widened(layer.weight[start:stop])
                    layer.bias[start:stop] += (weight @ shift).to(layer.bias.dtype)
                    layer.weight[start:stop] = (weight @ matrix).to(layer.weight.dtype)
