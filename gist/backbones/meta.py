"""Models without numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Also the steps of which libraries compose an initialisation, such as a truncated normal.
_INITIALISE = {
    "add_", "clamp_", "constant_", "copy_", "div_", "erfinv_", "fill_", "kaiming_normal_",
    "kaiming_uniform_", "mul_", "normal_", "ones_", "orthogonal_", "sub_", "trunc_normal_",
    "uniform_", "xavier_normal_", "xavier_uniform_", "zero_", "zeros_",
}  # fmt: skip


@contextmanager
def structure_only() -> Iterator[None]:
    """Have modules made on the meta device, without their initialisation.

    An operation on a meta tensor takes PyTorch 0.1 ms to find the shape of its result, and a
    model's initialisation has thousands. Random draws afterwards are as without it.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _WithoutInitialisation():
        yield


class _WithoutInitialisation(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.__name__ in _INITIALISE and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
