"""Trained parameters in float32 beside the frozen weights of a half backbone."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from gist.methods.hooks import FreeHook
from gist_kernels.tracing import autocast_enabled

# Within attention's function none of the others is seen.
_LAYERS = (F.linear, F.conv2d, F.layer_norm, F.rms_norm, F.multi_head_attention_forward)


def half_dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype | None:
    """The dtype of the first that has less than 32 bits, bfloat16 or float16; or None."""
    halves = (p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize < 4)
    return next(halves, None)


def train(parameters: Iterable[nn.Parameter]) -> None:
    """Train parameters, in float32 at least: near 1, bfloat16 loses steps below 0.4 %."""
    for parameter in parameters:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.dtype is not dtype:
            parameter.data, parameter.grad = parameter.data.to(dtype), None
        parameter.requires_grad_(True)


class InputDtype(TorchFunctionMode):
    """Inside, PyTorch's layers take weights of any dtype, and compute in that of their input.

    As autocast does, but for norms too, and without a dtype of its own.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LAYERS:
            dtype = (args[0] if args else kwargs["input"]).dtype
            args = tuple(_converted(value, dtype) for value in args)
            kwargs = {name: _converted(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def mixes(parameters: Sequence[nn.Parameter], x: torch.Tensor) -> bool:
    """Whether float32 parameters are trained beside half weights or a half input."""
    wide = any(p.requires_grad and p.dtype.itemsize >= 4 for p in parameters)
    return wide and (x.dtype.itemsize < 4 or half_dtype(parameters) is not None)


class _Entered(threading.local):
    def __init__(self) -> None:
        self.modes: list[InputDtype | None] = []


_entered = _Entered()


def convert_when_run_again(backbone: nn.Module) -> None:
    """Convert at use also where activation checkpointing runs a part of the backbone again.

    PyTorch restores autocast for that run, but no TorchFunctionMode. Layers that own trained
    parameters enter it themselves: a library may checkpoint a block's ``forward``, without hooks.
    """
    for layer in backbone.modules():
        if any(p.requires_grad for p in layer.parameters(recurse=False)):
            layer.register_forward_pre_hook(_ENTER)
            layer.register_forward_hook(_LEAVE, always_call=True)


def _enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    again = torch._C._current_graph_task_id() >= 0  # within a backward pass
    half = again and isinstance(args[0], torch.Tensor) and args[0].dtype.itemsize < 4
    mode = InputDtype() if half else None
    _entered.modes.append(mode)
    if mode is not None:
        mode.__enter__()


def _leave(layer: nn.Module, args: object, output: object) -> None:
    if torch.compiler.is_compiling():
        return
    mode = _entered.modes.pop()
    if mode is not None:
        mode.__exit__(None, None, None)


_ENTER, _LEAVE = FreeHook(_enter), FreeHook(_leave)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def _in_own_dtype(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook: a float32 head's input from a half backbone. Autocast converts by itself."""
    weight, (x, *others) = getattr(head, "weight", None), args
    if not isinstance(weight, torch.Tensor) or autocast_enabled(x.device.type):
        return args
    return x.to(weight.dtype), *others


IN_OWN_DTYPE = FreeHook(_in_own_dtype)
