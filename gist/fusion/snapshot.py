"""What a plan was made from, so that it is made again only where that has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

# A module's dictionaries, which change in place.
_KEPT = (
    "_modules",
    "_parameters",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Snapshot:
    """The state of modules: their parts, parameters, buffers, hooks, plain attributes and configs.

    :meth:`holds` runs at each call, so that it is one comparison of lists of dictionaries, which
    compares what they hold by identity first.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = list({id(m): m for root in roots for m in root.modules()}.values())
        # transformers' modules share the model's config, which says what attention computes.
        configs = {id(c): c for m in modules if hasattr(c := m.__dict__.get("config"), "__dict__")}
        self._now = [
            *(each.__dict__ for each in (*modules, *configs.values())),
            *(module.__dict__[name] for module in modules for name in _KEPT),
            # Eva's biases of keys are one; most modules have none to compare at each call.
            *(module._buffers for module in modules if module._buffers),
        ]
        self._then = [dict(now) for now in self._now]
        self._forwards = [(kind, kind.forward) for kind in {type(m) for m in modules}]
        parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
        self._parameters = list(parameters.values())
        self._tensors = _described(self._parameters)

    def holds(self) -> bool:
        """Whether all is as it was."""
        try:
            return (
                self._now == self._then
                and all(kind.forward is forward for kind, forward in self._forwards)
                and _described(self._parameters) == self._tensors
            )
        except (RuntimeError, ValueError, TypeError):  # two tensors have no truth value
            return False


def _described(parameters: list[nn.Parameter]) -> list[tuple[Any, ...]]:
    # A parameter may get other numbers, class and flags in place.
    return [(type(p), p.requires_grad, p.dtype, p.device, p.is_neg()) for p in parameters]
