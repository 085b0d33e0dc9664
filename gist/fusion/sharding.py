"""Blocks that FSDP2's ``fully_shard`` has sharded: their fused sublayers, between its own hooks.

``fully_shard`` gives a block a subclass of its class and two hooks. The first gathers the weights
before forward. The second frees them after it, and prepares the same for the backward pass. The
fused sublayers take the place of the block's call, so they call both hooks themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


def has_shards(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with this module."""
    sharded = _sharded_class()
    return sharded is not None and isinstance(module, sharded)


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class, or the one that it had before ``fully_shard``."""
    sharded = _sharded_class()
    kinds = type(module).__mro__
    return next(kind for kind in kinds if sharded is None or not issubclass(kind, sharded))


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter's part over one-dimensional processes.

    On a mesh of more dimensions, parts may remain parts where ``fully_shard`` has gathered them.
    """
    mesh = getattr(tensor, "device_mesh", None)
    return hasattr(tensor, "full_tensor") and mesh is not None and mesh.ndim == 1


class Sharding(NamedTuple):
    """What ``fully_shard`` does around a block's forward."""

    block: nn.Module
    gather: Callable[..., Any]
    """Its forward pre-hook, with keyword arguments."""
    free: Callable[..., Any]
    """Its forward hook."""

    @classmethod
    def of(cls, block: nn.Module) -> Sharding | None:
        """That of a block that was sharded by itself; None for any other."""
        if not has_shards(block):
            return None
        from torch.distributed.fsdp import fully_shard

        state: Any = fully_shard.state(block)  # type: ignore[attr-defined]
        before, after = (
            [hook for hook in hooks.values() if getattr(hook, "__self__", None) is state]
            for hooks in (block._forward_pre_hooks, block._forward_hooks)
        )
        # Blocks that were sharded together have other hooks.
        return cls(block, before[0], after[0]) if len(before) == len(after) == 1 else None

    @property
    def hooks(self) -> tuple[object, object]:
        return self.gather, self.free

    def call(self, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
        """``forward(x)`` in the place of the block's, with its weights gathered."""
        (x,), _ = self.gather(self.block, (x,), {})
        return self.free(self.block, (x,), forward(x))


def _sharded_class() -> type | None:
    """``FSDPModule``; None where nobody has imported it, and so sharded nothing."""
    found: type | None = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return found
