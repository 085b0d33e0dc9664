"""FacT: one factorised tensor for the updates of all linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

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

FORMS = ("tt", "tk")


@dataclass(frozen=True)
class FacT(Method):
    """Factor tuning (arXiv:2212.03145): all linear layers' updates as one factorised tensor.

    Every layer is split into D x D matrices (a block of MLP ratio 4 has twelve: q, k, v, proj, four
    of fc1, four of fc2), and the update of the k-th is ``scale * U S_k V^T``, with U and V, both
    (D, rank), shared by all. In the tensor-train form ("tt") each S_k is free; in the Tucker form
    ("tk") it is ``sum_r P_kr C_r`` of a core C, (rank, rank, rank). U, S, P and C start uniform as
    linear layers do, V at 0.

    While training with dropout the blocks run by their own forward: set dropout to 0 for fused
    sublayers.

    Parameters: of K matrices, 12 a block, ``2 * D * rank + K * rank**2`` (tt) or
    ``2 * D * rank + K * rank + rank**3`` (tk).

    Args:
        form: "tt" or "tk".
        rank: None for the publication's: 16 (tt), 32 (tk).
        scale: factor on the update; the publication chooses it for each task, from 0.01 to 100.
        dropout: dropout rate of the low-rank features, in [0, 1).
    """

    name: ClassVar[str] = "fact"
    form: str = "tt"
    rank: int | None = None
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_known("form", self.form, FORMS)
        if self.rank is None:
            object.__setattr__(self, "rank", 16 if self.form == "tt" else 32)
        check_count("rank", self.rank)
        check_finite("scale", self.scale)
        check_rate("dropout", self.dropout)

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        pieces, count = _pieces(family)
        factors = Factors(self, family, count)
        for layer, of_layer in pieces.items():
            layer.register_forward_hook(Hook(factors, "update", tuple(of_layer)))
        return factors

    def num_parameters(self, family: BackboneFamily) -> int:
        rank, count = self.rank or 0, _pieces(family)[1]
        cores = count * rank**2 if self.form == "tt" else count * rank + rank**3
        return 2 * family.embed_dim * rank + cores


class _Piece(NamedTuple):
    """The k-th D x D matrix: inputs and outputs from these columns on."""

    k: int
    inputs: int
    outputs: int


def _pieces(family: BackboneFamily) -> tuple[dict[nn.Linear, list[_Piece]], int]:
    """The matrices of each layer, and how many there are."""
    width, count = family.embed_dim, 0
    pieces: dict[nn.Linear, list[_Piece]] = {}
    for index in range(len(family.blocks)):
        for name in family.parts(index).layer_names:
            projection = family.projection(index, name)
            if projection.in_features % width or projection.out_features % width:
                raise ValueError(
                    f"FacT needs layers of multiples of {width} features; {name!r} of block "
                    f"{index} has {projection.in_features} and {projection.out_features}"
                )
            for start in range(0, projection.in_features, width):
                for stop in range(projection.start, projection.stop, width):
                    pieces.setdefault(projection.layer, []).append(_Piece(count, start, stop))
                    count += 1
    return pieces, count


def _matrices(family: BackboneFamily) -> list[tuple[slice, slice] | None]:
    """Each block's matrices in the tensor: those of all layers but the MLP's last, and its.

    None where q, k, v and proj are not one matrix each.
    """
    width, stop = family.embed_dim, 0
    found: list[tuple[slice, slice] | None] = []
    for index in range(len(family.blocks)):
        parts = [family.projection(index, name) for name in family.parts(index).layer_names]
        counts = [p.in_features * p.out_features // width**2 for p in parts]
        start, middle, stop = stop, stop + sum(counts[:-1]), stop + sum(counts)
        plain = counts[:4] == [1] * 4
        found.append((slice(start, middle), slice(middle, stop)) if plain else None)
    return found


class Factors(AttachedMethod):
    """The shared factors ``u``, ``v`` (D, rank) and the cores."""

    def __init__(self, config: FacT, family: BackboneFamily, count: int) -> None:
        super().__init__()
        rank, width, options = config.rank or 0, family.embed_dim, new_parameters(family.model)
        self.scale, self.dropout = config.scale, config.dropout
        self.matrices = _matrices(family)

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            bound = fan_in**-0.5
            return nn.Parameter(torch.empty(*shape, **options).uniform_(-bound, bound))

        self.u = uniform(width, rank, fan_in=width)
        self.v = nn.Parameter(torch.zeros(width, rank, **options))
        if config.form == "tt":
            self.cores = uniform(count, rank, rank, fan_in=rank)
        else:
            self.core = uniform(rank, rank, rank, fan_in=rank)
            self.mixture = uniform(count, rank, fan_in=rank)

    def core_of(self, k: int) -> torch.Tensor:
        """S_k, (rank, rank)."""
        if hasattr(self, "cores"):
            return self.cores[k]
        return torch.einsum("r,rij->ij", self.mixture[k], self.core)

    def cores_of(self, chosen: slice) -> torch.Tensor:
        """Some of the S_k, (matrices, rank, rank)."""
        if hasattr(self, "cores"):
            return self.cores[chosen]
        return torch.tensordot(self.mixture[chosen], self.core, dims=1)

    def update(
        self,
        pieces: Sequence[_Piece],
        layer: nn.Linear,
        args: tuple[torch.Tensor],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Hook: a layer's output with the updates of its matrices."""
        update: torch.Tensor = self(args[0], pieces)
        return output + update

    def forward(self, x: torch.Tensor, pieces: Sequence[_Piece]) -> torch.Tensor:
        """The update of the output of a layer with these matrices."""
        width = len(self.u)
        u, v = self.u.to(x.dtype), self.v.to(x.dtype)
        by_input = {
            start: x[..., start : start + width] @ u for start in {p.inputs for p in pieces}
        }
        by_output: dict[int, torch.Tensor] = {}
        for piece in pieces:
            low = by_input[piece.inputs] @ self.core_of(piece.k).to(x.dtype)
            low = F.dropout(low, self.dropout, self.training)
            by_output[piece.outputs] = by_output.get(piece.outputs, 0) + low
        # A layer's matrices cover all its outputs, in order.
        updates = torch.stack([by_output[start] for start in sorted(by_output)], dim=-2) @ v.T
        return self.scale * updates.flatten(-2)

    def fused(self, index: int) -> FusedParts | Refusal:
        if self.dropout and self.training:
            return Refusal("its update has dropout")
        if not is_bare(self):
            return Refusal("its method's modules are not as gist made them")
        matrices = self.matrices[index]
        if matrices is None:
            return Refusal("its attention is not as wide as its tokens")
        narrow, wide = matrices
        # What reads D features shares U; V S_k^T are the rows of its outputs.
        down, up = self.u.t(), self.scale * (self.v @ self.cores_of(narrow).mT)
        # fc2 reads several times D: the columns of its inputs are (U S_k)^T, and its outputs V.
        down_wide = (self.u @ self.cores_of(wide)).flatten(0, 1).t()
        return FusedParts(
            updates={
                "qkv": LayerUpdate(down=down, up=up[:3].flatten(0, 1)),
                "proj": LayerUpdate(down=down, up=up[3]),
                "fc1": LayerUpdate(down=down, up=up[4:].flatten(0, 1)),
                "fc2": LayerUpdate(down=down_wide, up=self.scale * self.v),
            }
        )

    def merge(self, family: BackboneFamily) -> None:
        width = len(self.u)
        for layer, of_layer in _pieces(family)[0].items():
            for k, inputs, outputs in of_layer:
                update = widened(self.u) @ widened(self.core_of(k)) @ widened(self.v).T
                part = layer.weight[outputs : outputs + width, inputs : inputs + width]
                part.copy_(widened(part) + self.scale * update.T)
