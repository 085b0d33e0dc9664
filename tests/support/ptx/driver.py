"""A Triton driver whose device is this interpreter: launches of CPU tensors run compiled kernels.

Triton itself specialises on the arguments, compiles and caches, up to the PTX; ptxas is left out.
"""

from __future__ import annotations

import ctypes
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from ptx.machine import Launch
from ptx.memory import Memory, Storage, Tensor
from ptx.parser import parse

_SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory per program, by architecture."""


class _Compiler(CUDABackend):
    """Compiles to PTX, in entries of Triton's cache that no GPU will look up."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], *options: Any) -> None:
        super().add_stages(stages, *options)
        del stages["cubin"]

    def hash(self) -> str:
        return f"{super().hash()}-ptx"


class Driver:
    """As much of a driver as a launch asks for."""

    def __init__(self, arch: int, seed: int | None, edit: Callable[[str], str] | None) -> None:
        self.arch, self.seed, self.edit = arch, seed, edit
        self.statistics: Counter[str] = Counter()
        """Warp instructions executed, by kernel."""
        self.texts: list[str] = []
        """The PTX of each launch."""
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, *_: (name, binary.decode(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=self.get_device_properties,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED[self.arch]}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, text: str, *rest: Any) -> None:
            active = triton.runtime.driver.active  # a kernel outlives the driver it was loaded by
            active.execute(source, metadata, (x, y, z), text, rest[4:])

        return launch

    def execute(
        self, source: Any, metadata: Any, grid: tuple[int, int, int], text: str, given: Any
    ) -> None:
        self.texts.append(text)
        kernel = parse(text if self.edit is None else self.edit(text))
        values = list(_flat(source.signature.items(), given))
        tensors = [value for _, value in values if isinstance(value, torch.Tensor)]
        storages = {each.untyped_storage().data_ptr(): each for each in tensors}
        shared = {key: _storage(key, each, tensors) for key, each in storages.items()}
        memory = Memory()
        arguments = dict.fromkeys(kernel.parameters, 0)  # scratch memory that is not used
        written = _written(source.fn.fn)
        for parameter, (name, value) in zip(kernel.parameters, values, strict=False):
            bits = int(kernel.parameters[parameter][1:])
            if isinstance(value, torch.Tensor):
                storage = shared[value.untyped_storage().data_ptr()]
                writable = name.partition("[")[0] in written
                value = memory.add(_tensor(name, value, storage, writable=writable))
            elif isinstance(value, float):
                value = int(np.float32(value).view(np.uint32))
            arguments[parameter] = int(value) & ((1 << bits) - 1)
        launch = Launch(kernel, grid, arguments, memory, metadata.shared, seed=self.seed,
                        barriers=_barriers(source.fn.fn))  # fmt: skip
        launch.run()
        self.statistics[kernel.name] += launch.statistics["warp instructions"]


def _flat(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of all arguments that are not compile-time constants."""
    for (name, kind), value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(((f"{name}[{i}]", k) for i, k in enumerate(kind)), value)
        elif kind != "constexpr":
            yield name, value


@lru_cache
def _barriers(function: Callable[..., Any]) -> frozenset[str]:
    """The lines with a barrier of their own, in the files beside a kernel's."""
    return frozenset(
        f"{path.name}:{number}"
        for path in Path(inspect.getfile(function)).parent.glob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\btl\.(debug_barrier|atomic_\w+)\(", line)
    )


@lru_cache
def _written(function: Callable[..., Any]) -> set[str]:
    """The parameters that a kernel's signature says are written."""
    signature = inspect.getsource(function).split("):", 1)[0]
    lines = [line.partition("#") for line in signature.splitlines()]
    return {name for code, _, comment in lines if "written" in comment
            for name in re.findall(r"\w+", code)}  # fmt: skip


def _storage(pointer: int, tensor: torch.Tensor, tensors: list[torch.Tensor]) -> Storage:
    """The bytes from the last multiple of 16 before a storage on."""
    base = pointer // 16 * 16
    size = pointer - base + tensor.untyped_storage().nbytes()
    data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
    sharing = [each for each in tensors if each.untyped_storage().data_ptr() == pointer]
    return Storage(data, min(each.itemsize for each in sharing))


def _tensor(name: str, value: torch.Tensor, storage: Storage, *, writable: bool) -> Tensor:
    start = value.data_ptr() - value.untyped_storage().data_ptr() // 16 * 16
    strides = tuple(step * value.itemsize for step in value.stride())
    tensor = Tensor(
        name, storage, start, tuple(value.shape), strides, value.itemsize, writable=writable
    )
    # The tests fill what torch.empty returns with NaN.
    if value.is_floating_point() and value.numel() and bool(value.isnan().all()):
        tensor.undefine()
    return tensor


@contextmanager
def executed(
    arch: int, *, seed: int | None = None, edit: Callable[[str], str] | None = None
) -> Iterator[Driver]:
    """Inside, kernels compiled for an architecture (80, 90) run on CPU tensors.

    With a seed, programs and their warps take turns at random. ``edit`` changes the text of a
    kernel before it runs.
    """
    from gist_kernels.kernels.triton import launch

    driver = Driver(arch, seed, edit)
    compilers = {"nvidia": Backend(_Compiler, backends["nvidia"].driver)}
    before = triton.runtime.driver._active
    with (
        mock.patch.dict(backends, compilers),
        mock.patch.object(launch, "tensor_cores_read_shared_memory", return_value=arch >= 90),
    ):
        triton.runtime.driver.set_active(driver)
        try:
            yield driver
        finally:
            triton.runtime.driver._active = before
