"""Triton's interpreter: where it differs from a GPU, and what it does without need."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def round_to_bfloat16() -> None:
    """Round float32 to the nearest bf16, as a GPU does: the interpreter cuts digits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = type(interpreter.interpreter_builder)
    cut = builder.cast_impl

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cut(self, source, kind)
        rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16()
        return interpreter.TensorHandle(
            rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16
        )

    builder.cast_impl = cast


def save_time() -> None:
    """Replace what takes most of the interpreter's time. Kernels compute the same.

    It patches the language at each call of a kernel or of a device function, though an outer call
    has done so; it copies tensors back from the host, on which they are; it calls the function of
    a reduction for one number after the other; and it makes a table of dtypes to look up one.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(language)
    patched = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: patched
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    interpreter.ReduceOps.generic_reduce = _reduce_by_halves
    of_scalar = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    )


def _reduce_by_halves(self: Any, inputs: Any) -> list[Any]:
    """As a GPU does: one half of the numbers with the other, until there is one."""
    assert self.axis is not None, "no kernel reduces several dimensions by a function of its own"
    dtypes = [each.dtype for each in inputs]
    arrays = [each.handle.data for each in inputs]
    while arrays[0].shape[self.axis] > 1:
        halves = zip(*(np.split(array, 2, self.axis) for array in arrays), strict=True)
        both = [
            self.to_tensor(array, dtype)
            for half in halves
            for array, dtype in zip(half, dtypes, strict=True)
        ]
        found = self.combine_fn.fn(*both)
        arrays = [each.handle.data for each in (found if isinstance(found, tuple) else (found,))]
    if not self.keep_dims:
        arrays = [array.squeeze(self.axis) for array in arrays]
    return [self.to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
