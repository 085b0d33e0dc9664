"""SSF: scaling and shifting deep features."""

from __future__ import annotations

from collections.abc import Iterator
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
from gist.untouched import is_bare

_LINEARS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class SSF(Method):
    """A scale and a shift for each feature after every operation (arXiv:2210.08823)::

        y = scale * operation(x) + shift

    Operations are the patch embedding, each block's two norms and its linear layers (the packed
    qkv counts as one), and the final norm. Scales start at 1, shifts at 0, both with normal noise
    of standard deviation 0.02, as released.

    Parameters: two for each output feature of these operations: ``depth * 22 * D + 4 * D`` if the
    MLP's width is four times D; 205,824 for ViT-B/16.
    """

    name: ClassVar[str] = "ssf"

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        places = list(_places(family))
        features = Features()
        options = new_parameters(family.model)
        for name, _, width in places:
            features[name] = ScaleShift(width, options)
        for name, module, _ in places:
            module.register_forward_hook(Hook(features, "scaled", name))
        return features

    def num_parameters(self, family: BackboneFamily) -> int:
        return sum(2 * width for _, _, width in _places(family))


def _places(family: BackboneFamily) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, module and width of every operation."""
    width = family.embed_dim
    yield "patch_embed", family.patch_projection, width
    for index in range(len(family.blocks)):
        for name, norm in zip(("norm1", "norm2"), family.parts(index).norms, strict=True):
            yield f"{index}_{name}", norm, width
        seen: set[int] = set()
        for name in ("q", "k", "v", "proj", "fc1", "fc2"):
            layer = family.projection(index, name).with_own_bias("SSF").layer
            if id(layer) not in seen:
                seen.add(id(layer))
                packed = name == "q" and layer is family.projection(index, "v").layer
                yield f"{index}_{'qkv' if packed else name}", layer, layer.out_features
    yield "norm", family.final_norm, width


class ScaleShift(nn.Module):
    """``scale * y + shift`` over (..., width) features."""

    def __init__(self, width: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width, **options).normal_(1, 0.02))
        self.shift = nn.Parameter(torch.empty(width, **options).normal_(0, 0.02))

    def forward(self, y: torch.Tensor, channels_first: bool = False) -> torch.Tensor:
        scale, shift = self.scale.to(y.dtype), self.shift.to(y.dtype)
        if channels_first:
            scale, shift = scale[:, None, None], shift[:, None, None]
        return torch.addcmul(shift, scale, y)


class Features(nn.ModuleDict, AttachedMethod):
    """A :class:`ScaleShift` for each operation, by its name."""

    reaches_embedding = True

    def scaled(
        self, name: str, module: nn.Module, args: object, output: torch.Tensor
    ) -> torch.Tensor:
        """Hook: an operation's output, scaled and shifted."""
        return self[name](output, isinstance(module, nn.Conv2d))

    def fused(self, index: int) -> FusedParts | Refusal:
        qkv = ("qkv",) if f"{index}_qkv" in self else ("q", "k", "v")
        names = ("norm1", "proj", "norm2", "fc1", "fc2")
        parts: dict[str, Any] = {name: self[f"{index}_{name}"] for name in (*names, *qkv)}
        if not all(is_bare(part) for part in parts.values()):
            return Refusal("its method's modules are not as gist made them")
        updates = {name: LayerUpdate(parts[name].scale, parts[name].shift) for name in names}
        updates["qkv"] = LayerUpdate(
            torch.cat([parts[name].scale for name in qkv]),
            torch.cat([parts[name].shift for name in qkv]),
        )
        return FusedParts(updates=updates)

    def merge(self, family: BackboneFamily) -> None:
        for name, module, _ in list(_places(family)):
            _fold(module, self[name])


def _fold(module: Any, by: Any) -> None:
    """Fold scale and shift into a layer's or a norm's own weight and bias."""
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(by.shift, dtype=module.weight.dtype))
    scale, weight = widened(by.scale), module.weight
    shape = (-1,) + (1,) * (weight.ndim - 1)
    weight.copy_(scale.view(shape) * widened(weight))
    module.bias.copy_(scale * widened(module.bias) + widened(by.shift))
