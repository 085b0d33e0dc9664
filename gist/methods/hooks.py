"""Hooks that join a module to a backbone, and what one hook hands on to another within a call.

A hook keeps nothing on a module: concurrent calls, copies and replicas would share it, and a call
that fails would leave its graph there. What a later hook needs is kept by thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Hook:
    """A forward hook or pre-hook that calls a method of the module it belongs to.

    A deep copy or a pickled copy of owner and backbone calls the copied owner. In a replica of
    :class:`torch.nn.DataParallel` the hook calls the replica's owner, see :func:`replica_owners`.

    Args:
        owner: the module.
        method: the name of its method.
        args: arguments that precede the hook's own: module, inputs and, after forward, output.
    """

    def __init__(self, owner: nn.Module, method: str, *args: Any) -> None:
        self.owner, self.method, self.args = owner, method, args
        owner.__dict__.setdefault("_hook_key", object())  # replicas share it

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        owner = self.owner
        if not torch.compiler.is_compiling() and getattr(module, "_is_replica", False):
            owner = _thread.replicas[owner._hook_key]
        return getattr(owner, self.method)(*self.args, module, *args)

    def __repr__(self) -> str:
        return f"{type(self.owner).__name__}.{self.method}"


class FreeHook:
    """A hook of gist's that needs no parameters of its own: it calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.handed_on: dict[int, torch.Tensor] = {}
        self.asked: dict[int, list[torch.Tensor]] = {}
        self.replicas: dict[object, nn.Module] = {}


_thread = _Thread()


def hand_on(owner: nn.Module, tensor: torch.Tensor) -> None:
    """Keep a tensor for the next :func:`taken` by the same owner in this thread.

    Activation checkpointing that runs a part again stops where nothing more is needed, which may be
    before the taker. What was handed on within a backward pass is dropped at its end.
    """
    kept = _thread.handed_on
    kept[id(owner)] = tensor
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: kept.pop(id(owner), None))


def taken(owner: nn.Module) -> torch.Tensor | None:
    """The tensor that the owner handed on, which is then no longer kept; or None."""
    return _thread.handed_on.pop(id(owner), None)


@contextmanager
def asking(owner: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list for one of the owner's hooks to fill, by :func:`asked_for`, in this thread."""
    answer: list[torch.Tensor] = []
    before = _thread.asked.get(id(owner))
    _thread.asked[id(owner)] = answer
    try:
        yield answer
    finally:
        if before is None:
            del _thread.asked[id(owner)]
        else:
            _thread.asked[id(owner)] = before


def asked_for(owner: nn.Module) -> list[torch.Tensor] | None:
    """The list of the innermost :func:`asking`, or None where nobody asks."""
    return _thread.asked.get(id(owner))


@contextmanager
def replica_owners(owners: Collection[nn.Module]) -> Iterator[None]:
    """Let the hooks on a replica of ``torch.nn.DataParallel`` find their owners' replicas.

    ``DataParallel`` copies the dictionaries of hooks, so that a replica's hooks are bound to the
    original's modules.
    """
    before = _thread.replicas
    _thread.replicas = {owner._hook_key: owner for owner in owners if hasattr(owner, "_hook_key")}
    try:
        yield
    finally:
        _thread.replicas = before


def is_owned(hook: object, owners: Collection[int]) -> bool:
    """Whether a hook belongs to one of the modules with these ids, or is a :class:`FreeHook`."""
    return isinstance(hook, FreeHook) or (isinstance(hook, Hook) and id(hook.owner) in owners)


def hooks_on(backbone: nn.Module, owners: Collection[int]) -> list[tuple[str, Hook]]:
    """The hooks of the modules with these ids on a backbone, each with the name of its place."""
    return [
        (name, hook)
        for name, part in backbone.named_modules()
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        if isinstance(hook, Hook) and id(hook.owner) in owners
    ]


def lost(
    backbone: nn.Module, placed: Iterable[tuple[str, Hook]], owners: Collection[int]
) -> str | None:
    """What was replaced since :func:`hooks_on` gave ``placed``, so that a hook is lost; or None.

    A module that holds the replaced one, such as a layer of HF PEFT around it, loses nothing.
    """
    present: set[int] = set()
    for part in backbone.modules():
        for carried in (part._forward_pre_hooks, part._forward_hooks):
            if carried:
                present.update(map(id, carried.values()))
    for name, hook in placed:
        if id(hook) not in present:
            return f"backbone.{name} was replaced, or its hooks were removed: {hook} is lost"
        if id(hook.owner) not in owners:
            return f"the {type(hook.owner).__name__} with the hook on backbone.{name} was replaced"
    return None


def remove_hooks(backbone: nn.Module, owners: Collection[int], *, free: bool = True) -> None:
    """Take gist's hooks, of the modules with these ids, off a backbone; free ones if asked."""
    for part in backbone.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [
                key
                for key, hook in hooks.items()
                if is_owned(hook, owners) and (free or isinstance(hook, Hook))
            ]:
                del hooks[key]
                part._forward_hooks_always_called.pop(key, None)
                part._forward_hooks_with_kwargs.pop(key, None)
                part._forward_pre_hooks_with_kwargs.pop(key, None)
