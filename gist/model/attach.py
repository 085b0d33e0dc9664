"""What :func:`gist.wrap` changes on a backbone, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.model.config import GistConfig


class Before(NamedTuple):
    """A backbone as it was given to :func:`gist.wrap`."""

    parameters: dict[str, tuple[bool, torch.dtype]]
    """By name: whether it was trained, and its dtype."""
    calls: dict[str, bool]
    """By name of timm's attention: whether it calls its packed projection, or reads the weight."""

    @classmethod
    def of(cls, backbone: nn.Module) -> Before:
        return cls(
            {n: (p.requires_grad, p.dtype) for n, p in backbone.named_parameters()},
            {n: m.qkv_bias_separate for n, m in _with_separate_biases(backbone)},
        )

    def restore(self, backbone: nn.Module) -> None:
        """Put back which parameters are trained, the dtype of those that wrap trained, and how
        biases are added.

        Parameters that have joined since stay as they are. Dtypes stay where a frozen parameter has
        another one than before: then the whole model was cast since.
        """
        known = self.parameters
        found = [(p, *known[n]) for n, p in backbone.named_parameters() if n in known]
        cast = any(p.dtype != dtype for p, _, dtype in found if not p.requires_grad)
        for parameter, requires_grad, dtype in found:
            if parameter.dtype != dtype and not cast:
                parameter.data = parameter.data.to(dtype)
                parameter.grad = None
            parameter.requires_grad_(requires_grad)
        for name, attention in _with_separate_biases(backbone):
            attention.qkv_bias_separate = self.calls.get(name, attention.qkv_bias_separate)


def _with_separate_biases(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in backbone.named_modules() if hasattr(m, "qkv_bias_separate"))


def attach_methods(config: GistConfig, family: BackboneFamily) -> nn.Module | None:
    """Join the config's methods to a backbone: the module with their new parameters, or None."""
    attached = {method.name: method.attach(family) for method in config.methods}
    modules = {name: module for name, module in attached.items() if module is not None}
    appended = sum(module.appended_tokens for module in modules.values())
    for module in modules.values():
        module.added_tokens = config.num_tokens if config.gist else 0, appended
    family.call_hooked_layers()
    if len(config.methods) > 1:
        return nn.ModuleDict(modules)
    return next(iter(modules.values()), None)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Put ``old``'s hooks on the module that replaces it; their handles still remove them."""
    vars(new).update({name: hooks for name, hooks in vars(old).items() if "_hooks" in name})


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Put ``old``'s parameters into ``new``, a method's module for the first blocks of ``old``'s.

    Parameters stay the same objects, unless one holds all blocks: its first entries are copied.
    """
    trained = dict(old.named_parameters())
    for name, parameter in list(new.named_parameters()):
        source = trained[name]
        owner, _, leaf = name.rpartition(".")
        if source.shape == parameter.shape:
            setattr(new.get_submodule(owner), leaf, source)
            continue
        with torch.no_grad():
            parameter.copy_(source[: len(parameter)])
        parameter.requires_grad_(source.requires_grad)
    new.train(old.training)
