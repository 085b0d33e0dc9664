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
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init gives it by name
        if func.__name__ in _INITIALISE and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)
