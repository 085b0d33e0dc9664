"""The base classes of a PEFT method: a config, and a module that joins a backbone by hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from gist.backbones.base import BackboneFamily
from gist_kernels import AdapterWeights

_WITHOUT_FLOAT64 = ("mps",)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, for a fold that is rounded once; in float32 on devices without it."""
    return tensor.float() if tensor.device.type in _WITHOUT_FLOAT64 else tensor.double()


class LayerUpdate(NamedTuple):
    """A method's update of a layer's or a norm's output y: ``scale * y + shift + up (down x)``."""

    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    down: torch.Tensor | None = None
    """(r, in); only for linear layers."""
    up: torch.Tensor | None = None
    """(out, r); only for linear layers."""


class FusedParts(NamedTuple):
    """A method's part in a block, as the fused sublayers take it."""

    attention: AdapterWeights | None = None
    """The adapter beside the attention."""
    mlp: AdapterWeights | None = None
    """The adapter beside the MLP."""
    updates: Mapping[str, LayerUpdate] | None = None
    """Updates of the layers, by the names norm1, norm2, qkv, proj, fc1 and fc2; None for none."""


class Refusal(NamedTuple):
    """Why a block or a backbone does not run as fused sublayers."""

    reason: str


class AttachedMethod(nn.Module):
    """The module with a method's new parameters, joined to a backbone by hooks.

    Hooks must be :class:`gist.methods.hooks.Hook` of this module or of its children: the hooks of a
    copy then use the copy's parameters. No module's ``forward`` is replaced. Parameters are read
    within their module's own ``forward``, where offloading and sharding have them at hand. Nothing
    of a call is kept on a module.
    """

    reaches_embedding = False
    """Whether the method has parameters before the first block."""
    appended_tokens = 0
    """Number of tokens that the method adds at the end of the sequence, within the blocks."""
    added_tokens = (0, 0)
    """Numbers of Gist tokens after the class token, and of all methods' tokens at the end."""

    def fused(self, index: int) -> FusedParts | Refusal:
        """The method's part in a block of fused sublayers, or why the block can't be fused."""
        return Refusal(f"its method is {type(self).__name__}, which runs by hooks")

    def before_block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The input of a block that runs as fused sublayers, from the previous output."""
        return x

    def after_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the blocks, if the last one runs as fused sublayers."""
        return x

    def merge(self, family: BackboneFamily) -> None:
        """Put the method into the backbone's own weights, without hooks.

        Raises:
            ValueError: the backbone's weights can't express the method.
        """
        raise ValueError(f"{type(self).__name__} can't be merged into the backbone's weights")


@dataclass(frozen=True)
class Method(ABC):
    """Config of a PEFT method. Its fields are JSON values; a saved adapter records them."""

    name: ClassVar[str]

    def attach(self, family: BackboneFamily) -> AttachedMethod | None:
        """Join a backbone; return the module with the new parameters, or None without any.

        Raises:
            ValueError: the backbone lacks what the method attaches to. Nothing is attached then.
        """
        return None

    def trained(self, family: BackboneFamily) -> Iterable[nn.Parameter]:
        """Parameters of the backbone itself that the method trains."""
        return ()

    @abstractmethod
    def num_parameters(self, family: BackboneFamily) -> int:
        """Number of parameters that the method trains, by its formula, without the classifier's.

        Raises:
            ValueError: as :meth:`attach`.
        """

    def settings(self) -> Mapping[str, Any]:
        """The fields, as a saved adapter records them."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def new_parameters(backbone: nn.Module) -> dict[str, Any]:
    """``device`` and ``dtype`` of new parameters: the backbone's, but at least float32.

    Below float32 rounding would lose an optimiser's small steps.
    """
    like = next(backbone.parameters())
    return {"device": device_of(backbone), "dtype": torch.promote_types(like.dtype, torch.float32)}


def device_of(model: nn.Module) -> torch.device:
    """The device that a model's parameters are computed on, also where they are offloaded."""
    like = next(model.parameters())
    if like.is_meta:  # accelerate's hooks know the device they bring the parameters to
        for module in model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return like.device


def unique(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Each module once, in order."""
    return list({id(module): module for module in modules}.values())
