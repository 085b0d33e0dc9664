"""Argument checks. Each raises an error that names the argument, what it got and what it takes.

TypeError is for a wrong kind of value or dtype, ValueError for a wrong shape, device or range.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Real

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; its layout is {value.layout}")


def floating(name: str, value: torch.Tensor) -> None:
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64; it is {value.dtype}"
        )


def shape(name: str, value: torch.Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """``expected`` lists the sizes, None for any size; ``meaning`` describes them in words."""
    tensor(name, value)
    fits = value.ndim == len(expected) and all(
        size is None or size == given for size, given in zip(expected, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{name} must have shape {meaning}, here ({wanted}); it has {tuple(value.shape)}"
        )


def alike(
    name: str,
    value: torch.Tensor,
    other_name: str,
    other: torch.Tensor,
    *,
    any_float: bool = False,
) -> None:
    """The device must be the same; so must the dtype, unless ``any_float`` (autocast converts)."""
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device} and {other_name} on {other.device}; "
            "move them to one device"
        )
    if any_float:
        floating(name, value)
    elif value.dtype != other.dtype:
        raise TypeError(
            f"{name} is {value.dtype} and {other_name} {other.dtype}; convert one of them"
        )


def number(name: str, value: float) -> None:
    # Real has NumPy's scalars in it too. A tensor would cost a synchronisation to read.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")


def finite(name: str, value: float) -> None:
    number(name, value)
    # Not math.isfinite, of which a tracer knows nothing; an integer may be too large for a float.
    if not value - value == 0 or (isinstance(value, int) and abs(value) > sys.float_info.max):
        raise ValueError(f"{name} must be finite; it is {value}")


def boolean(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type(value).__name__}")


def positive(name: str, value: float) -> None:
    finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be greater than 0; it is {value}")


def weight_pair(name: str, value: Sequence[float]) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers; it is {value!r}")
    for index, weight in enumerate(value):
        finite(f"{name}[{index}]", weight)


def token_count(name: str, count: int | None, tokens: int) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= tokens:
        raise ValueError(f"{name} must be an integer in [1, {tokens}], or None; it is {count!r}")


def token_lengths(name: str, lengths: torch.Tensor, tokens: int) -> None:
    """Wait for the device, and check each row's number of tokens, (B,) integers."""
    for row, length in enumerate(lengths.tolist()):
        if not 1 <= length <= tokens:
            raise ValueError(f"{name}[{row}] is {length}; it must be in [1, {tokens}]")


def class_indices(name: str, value: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Wait for the device, and check class indices. Probabilities need no check."""
    if value.is_floating_point():
        return
    outside = (value < 0) | (value >= classes)
    outside &= value != ignore_index
    if outside.any():
        row = int(outside.nonzero()[0])
        raise out_of_range(name, row, int(value[row]), classes, ignore_index)


def out_of_range(name: str, row: int, index: int, classes: int, ignore_index: int) -> IndexError:
    return IndexError(
        f"{name}[{row}] is {index}, outside the {classes} classes 0 to {classes - 1} "
        f"(ignore_index is {ignore_index})"
    )


def unknown_name(argument: str, given: str, known: Iterable[str], hint: str = "") -> str:
    """The sentence for a name that is not in ``known``: nearest ones first, all when few.

    >>> from gist_kernels.check import unknown_name
    >>> unknown_name("method", "adaptor", ["adapter", "lora"])
    "method: 'adaptor' is not known; did you mean 'adapter'? Known: adapter, lora"
    """
    names = sorted(known)
    near = get_close_matches(given, names, n=3, cutoff=0.5)
    text = f"{argument}: {given!r} is not known"
    if near:
        text += "; did you mean " + " or ".join(map(repr, near)) + "?"
    if len(names) <= 20:
        text += ("" if near else ".") + " Known: " + ", ".join(names)
    return f"{text}{hint}"
