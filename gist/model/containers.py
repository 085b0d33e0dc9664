"""The wrapped model within what other libraries put around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gist.fusion.sharding import has_shards
from gist.model.wrapped import GistModel


def gist_model_of(model: nn.Module) -> GistModel:
    """The GistModel in ``torch.compile``'s, DistributedDataParallel's or another's module.

    Raises:
        TypeError: there is none.
        ValueError: FSDP1 holds its parameters, flattened.
    """
    inner: Any = model
    while not isinstance(inner, GistModel):
        if type(inner).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "model is sharded by FullyShardedDataParallel, which flattens its parameters; "
                "shard it by torch.distributed.fsdp.fully_shard instead"
            )
        found = getattr(inner, "_orig_mod", None)
        found = getattr(inner, "module", None) if found is None else found
        if not isinstance(found, nn.Module):
            raise TypeError(
                f"model must be what gist.wrap returned; it is a {type(model).__name__}"
            )
        inner = found
    return inner


def is_replicated(model: nn.Module) -> bool:
    """Whether every process holds the same parameters, by DistributedDataParallel."""
    return any(isinstance(part, DistributedDataParallel) for part in model.modules())


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are sharded over processes, as by ``fully_shard``."""
    # Parameters that FSDP2 holds gathered after a forward are plain tensors.
    by_fsdp = any(has_shards(part) for part in model.modules())
    return by_fsdp or any(is_part(parameter) for parameter in model.parameters())


@contextmanager
def gathered_root(model: nn.Module) -> Iterator[None]:
    """Inside, what ``fully_shard(model)`` itself shards is whole, as in a call of the model. What
    is within sharded blocks stays sharded. Every process has to enter."""
    root: Any = model if has_shards(model) else None
    if root is not None:
        root.unshard()
    try:
        yield
    finally:
        if root is not None:
            root.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU. A sharded one is gathered: every process has to call this."""
    gathered: Any = tensor.detach()
    if is_part(gathered):
        gathered = gathered.full_tensor()
    result: torch.Tensor = gathered.cpu().contiguous()
    return result


def is_part(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "full_tensor")
