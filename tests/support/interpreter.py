"""Triton's interpreter: where it differs from a GPU, and what it does without need."""

from __future__ import annotations

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


def patch_once() -> None:
    """Patch the language once a process, not at each call of a kernel or of a device function.

    A call patches what an outer one has patched already: most of the time of a small kernel. Nor
    are tensors copied back from the host, on which they are.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    seen = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(seen)
    patched = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: patched
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
