"""Whether a call is traced or transformed, so that kernels can't run on its tensors' memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gist_kernels.quantised import QuantisedWeight

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Looked up once: calls of a few microseconds ask these.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def needs_dispatcher(*tensors: torch.Tensor | None) -> bool:
    """Whether a call is traced, or its tensors have no memory to give a kernel."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not torch.Tensor and tensor is not None and kind is not torch.nn.Parameter:
            return True
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _tracing_state() is not None


def watched() -> bool:
    """Whether a TorchDispatchMode other than a compiler's sees the operators of this call."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def exporting() -> bool:
    """Whether a call is traced by torch.export."""
    # What torch.compiler.is_exporting() returns. PyTorch 2.11's Dynamo answers that with True.
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def takes_operators(*arguments: Any) -> bool:
    """Whether a call that :func:`needs_dispatcher` may become registered operators.

    They are unknown to runtimes other than PyTorch, to torch.func's transforms, to PyTorch's FLOP
    counter, and to a tensor subclass that gives PyTorch's operators a meaning of its own.
    """
    if torch._C._get_tracing_state() is not None:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if exporting() and torch.onnx.is_in_onnx_export():
        return False
    return _known_kinds(arguments) and (torch.compiler.is_compiling() or not _counts_flops())


def _counts_flops() -> bool:
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)


def _known_kinds(arguments: tuple[Any, ...]) -> bool:
    for value in arguments:
        if isinstance(value, torch.Tensor):
            kind = type(value)
            if kind not in _PLAIN and not kind.__module__.startswith("torch._subclasses."):
                return False
        elif isinstance(value, tuple):
            if not _known_kinds(value):
                return False
        elif isinstance(value, QuantisedWeight):
            return False
    return True


def under_transform() -> bool:
    """Whether a call is within a torch.func transform or forward-mode differentiation."""
    return bool(_transforms_active()) or forward_ad._current_level >= 0


def batched(tensor: torch.Tensor) -> bool:
    """Whether ``torch.vmap`` has batched a tensor: its values can then decide nothing."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def transformed(gradient: torch.Tensor | None) -> bool:
    """Whether an upstream gradient is batched, or has a tangent or a graph of torch.func."""
    if gradient is None:
        return False
    if _is_legacy_batched(gradient):  # autograd.grad(is_grads_batched=)
        return True
    return under_transform() and (
        torch._C._functorch.is_functorch_wrapped_tensor(gradient)
        or forward_ad.unpack_dual(gradient).tangent is not None
    )


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some, such as "meta", have none."""
    # Before PyTorch 2.15 Dynamo can't trace the first question.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)
