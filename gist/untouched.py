"""Whether modules and tensors are as their library made them.

A kernel reads weights where the backbone would call modules. That is the same only if nothing hangs
on the call: no hook, no replaced ``forward``, no compiled call, no tensor subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as of_all


def calls_own_forward(module: nn.Module) -> bool:
    """Whether calling the module runs its class's ``forward``.

    Offloading, compilation in place (``module.compile()``) and experiments give one instance
    another.
    """
    return is_own(module, "forward") and module._compiled_call_impl is None


def written_forward(kind: Any, name: str = "forward") -> Callable[..., Any] | None:
    """A class's method as its library wrote it; None where another one has taken its place.

    ``import gist`` may come after the change.
    """
    found = getattr(kind, name)
    written = (kind.__module__, f"{kind.__qualname__}.{name}")
    return found if (found.__module__, found.__qualname__) == written else None


def any_global_hook() -> bool:
    """Whether there are hooks of all modules."""
    return bool(
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    )


def is_own(module: nn.Module, method: str) -> bool:
    """Whether a method is that of the module's class, not one given to this instance."""
    # To read it is for Dynamo, which guards on that, not on what the dictionary lacks.
    return callable(getattr(module, method)) and method not in module.__dict__


def hooks_of(module: nn.Module) -> list[object]:
    """The hooks that calling the module runs, forward and backward, those of all modules included.

    Those of all modules come from ``torch.nn.modules.module.register_module_forward_hook``.
    """
    return [
        *of_all._global_forward_hooks.values(),
        *of_all._global_forward_pre_hooks.values(),
        *of_all._global_backward_hooks.values(),
        *of_all._global_backward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's ``forward`` and nothing else."""
    return calls_own_forward(module) and not any(hooks_of(module))


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor and of no subclass, such as a quantised or a sharded one."""
    return isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, nn.Parameter)
