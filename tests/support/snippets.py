"""Pieces of PTX written by hand, run by the interpreter."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
from ptx import Launch, Memory, parse
from ptx.memory import Storage, Tensor

_TEXT = """
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel({parameters}) .reqntid {threads}
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %rd<8>;
    .reg .b32 %lane, %near; .reg .b64 %far;
    {pointers}
    mov.u32 %lane, %tid.x;
    shl.b32 %near, %lane, 2;
    cvt.u64.u32 %far, %near;
    {body}
    ret;
}}
"""


def run(
    body: str, *, threads: int = 32, programs: int = 1, shared: int = 1024,
    seed: int | None = None, written: tuple[str, ...] = ("out",), undefined: tuple[str, ...] = (),
    barriers: Container[str] | None = None, **tensors: np.ndarray,
) -> None:  # fmt: skip
    """Run a kernel's body on tensors, in place.

    The pointer of ``name`` is in ``%name``, that of the thread's element of 4 bytes in
    ``%at_name``; ``%lane`` is the thread's number, ``%near`` 4 times that, as ``%far`` in 64 bits.
    """
    pointers = "".join(
        f".reg .b64 %{name}, %at_{name}; ld.param.u64 %{name}, [{name}];" for name in tensors
    )
    at = "".join(f"add.u64 %at_{name}, %{name}, %far;" for name in tensors)
    parameters = ", ".join(f".param .u64 {name}" for name in tensors)
    text = _TEXT.format(parameters=parameters, threads=threads, pointers=pointers, body=at + body)
    memory = Memory()
    arguments = {}
    storages: dict[int, Storage] = {}
    for name, values in tensors.items():
        whole = values if values.base is None else values.base
        if id(whole) not in storages:
            storages[id(whole)] = Storage(whole.reshape(-1).view(np.uint8), values.itemsize)
        tensor = Tensor(
            name,
            storages[id(whole)],
            values.ctypes.data - whole.ctypes.data,
            values.shape,
            values.strides,
            values.itemsize,
            writable=name in written,
        )
        if name in undefined:
            tensor.undefine()
        arguments[name] = memory.add(tensor)
    Launch(parse(text), (programs, 1, 1), arguments, memory, shared, seed=seed,
           barriers=barriers).run()  # fmt: skip


def each_thread(body: str, **inputs: np.ndarray) -> np.ndarray:
    """What ``body`` leaves in ``%r0``, of registers ``%r1``, ``%r2``, ... that hold the inputs."""
    count = max(np.size(each) for each in inputs.values())
    threads = -(-count // 32) * 32
    given = {
        name: np.resize(np.asarray(each), threads).view(np.uint32) for name, each in inputs.items()
    }
    loads = "".join(f"ld.global.b32 %r{i}, [%at_{name}];" for i, name in enumerate(given, 1))
    out = np.zeros(threads, np.uint32)
    run(f"{loads} {body} st.global.b32 [%at_out], %r0;", threads=threads, **given, out=out)
    return out[:count]
