"""What every PEFT method offers: a config, and a module that joins a backbone by hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from gist.backbones.base import BackboneFamily
from gist_kernels import AdapterWeights


class LayerUpdate(NamedTuple):
    """What a method does to a layer's or a norm's output: ``scale * y + shift + up (down x)``."""

    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    down: torch.Tensor | None = None
    """(r, in), of a linear layer alone, as up, (out, r)."""
    up: torch.Tensor | None = None


class FusedParts(NamedTuple):
    """What a method adds to a block, as the fused sublayers take it."""

    attention: AdapterWeights | None = None
    """The adapter beside it."""
    mlp: AdapterWeights | None = None
    updates: Mapping[str, LayerUpdate] = MappingProxyType({})
    """By the names norm1, norm2, qkv, proj, fc1 and fc2."""


class AttachedMethod(nn.Module):
    """Owner of a method's new parameters, joined to a backbone by hooks.

    Hooks must be bound methods of this module or of its children, or partials of them:
    ``copy.deepcopy`` then binds the copy's hooks to the copy's parameters. No module's ``forward``
    is replaced.
    """

    reaches_embedding = False
    """Whether it has parameters before the first block."""
    appended_tokens = 0
    """Tokens that it adds at the end of the sequence, within the blocks."""

    def fused(self, index: int) -> FusedParts | str:
        """Its part in a block that runs as fused sublayers, or why the block can't."""
        return f"its method is {type(self).__name__}, which runs by hooks"

    def before_block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What enters a block that runs as fused sublayers."""
        return x

    def after_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """What leaves the last one, if that runs as fused sublayers."""
        return x

    def merge(self, family: BackboneFamily) -> None:
        """Put the method into the backbone's own weights, without hooks.

        Raises:
            ValueError: it can't be expressed by them.
        """
        raise ValueError(f"{type(self).__name__} can't be merged into the backbone's weights")


@dataclass(frozen=True)
class Method(ABC):
    """Config of a PEFT method. Its fields, JSON values all, are what a checkpoint records."""

    name: ClassVar[str]

    def attach(self, family: BackboneFamily) -> AttachedMethod | None:
        """Join a backbone, and return the module with the new parameters, None if there are none.

        Raises:
            ValueError: the backbone lacks what the method attaches to. Nothing is attached then.
        """
        return None

    def trained(self, family: BackboneFamily) -> Iterable[nn.Parameter]:
        """Parameters of the backbone itself that the method trains."""
        return ()

    @abstractmethod
    def num_parameters(self, family: BackboneFamily) -> int:
        """How many parameters it trains, the classifier's left out, by its formula.

        Raises:
            ValueError: as :meth:`attach`.
        """

    def settings(self) -> Mapping[str, Any]:
        """Its fields as a checkpoint has them."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def new_parameters(backbone: nn.Module) -> dict[str, Any]:
    """``device`` and ``dtype`` of parameters to add: the backbone's, but never below float32,
    where small steps of an optimiser would be rounded away."""
    like = next(backbone.parameters())
    return {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}


def unique(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Each module once, in order."""
    return list({id(module): module for module in modules}.values())
