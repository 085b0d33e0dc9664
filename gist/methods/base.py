"""What every PEFT method's config offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@dataclass(frozen=True)
class Method(ABC):
    """Config of a PEFT method. Its fields, JSON values all, are what a checkpoint records."""

    name: ClassVar[str]

    @abstractmethod
    def attach(self, backbone: VisionTransformer) -> nn.Module:
        """Attach to ``backbone`` by hooks and return a module that owns the new parameters.

        Hooks must be bound methods of that module or of its children: ``copy.deepcopy`` then
        binds the copy's hooks to the copy's parameters. No module's ``forward`` is replaced.

        Raises:
            ValueError: the backbone lacks what the method attaches to. Nothing is attached then.
        """


def new_parameters(backbone: nn.Module) -> dict[str, Any]:
    """``device`` and ``dtype`` of parameters to add: the backbone's, but never below float32,
    where small steps of an optimiser would be rounded away."""
    like = next(backbone.parameters())
    return {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
