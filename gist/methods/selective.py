"""Methods without new parameters: they train some of the backbone's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from gist.backbones.base import BackboneFamily
from gist.methods.base import Method


class _Selective(Method):
    def num_parameters(self, family: BackboneFamily) -> int:
        count = sum(parameter.numel() for parameter in self.trained(family))
        if not count:
            raise ValueError(
                f"{type(self).__name__} finds nothing to train: a {type(family.model).__name__} "
                "has no such parameters; take another method"
            )
        return count


@dataclass(frozen=True)
class BitFit(_Selective):
    """Train every bias of the backbone (arXiv:2106.10199).

    Parameters: ``depth * 11 * D + 2 * D`` for a plain ViT: the biases of the patch embedding, of
    both norms, qkv, proj, fc1 (4 D) and fc2 of each block, and of the final norm; 102,912 for
    ViT-B/16.
    """

    name: ClassVar[str] = "bitfit"

    def trained(self, family: BackboneFamily) -> Iterable[nn.Parameter]:
        others = _ids((*family.heads, *family.unread))
        return [
            parameter
            for name, parameter in family.model.named_parameters()
            if name.rpartition(".")[2] in ("bias", "q_bias", "v_bias")
            and id(parameter) not in others
        ]


@dataclass(frozen=True)
class LayerNormTuning(_Selective):
    """Train scale and shift of every norm (arXiv:2312.11420).

    Parameters: ``(2 * depth + 1) * 2 * D`` for a plain ViT; 38,400 for ViT-B/16.
    """

    name: ClassVar[str] = "layernorm"

    def trained(self, family: BackboneFamily) -> Iterable[nn.Parameter]:
        norms = (m for m in family.model.modules() if isinstance(m, family.norm_types))
        others = _ids((*family.heads, *family.unread))
        return [p for norm in norms for p in norm.parameters() if id(p) not in others]


@dataclass(frozen=True)
class Full(_Selective):
    """Train the whole backbone: the upper baseline, and no PEFT.

    Parameters: all but the classifier's, and a mask token, which classification never reads.
    """

    name: ClassVar[str] = "full"

    def trained(self, family: BackboneFamily) -> Iterable[nn.Parameter]:
        others = _ids((*family.heads, *family.unread))
        return [
            parameter
            for name, parameter in family.model.named_parameters()
            if id(parameter) not in others and not name.endswith("mask_token")
        ]


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}
