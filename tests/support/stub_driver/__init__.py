"""The Triton backend on a stub of the CUDA driver: all of a launch but the device.

Import it in a process of its own, before gist_kernels and instead of a device. Triton then compiles
for a card that is not here, and its launcher passes the parameters to ``libcuda.c``, which records
them. The kernels' results are whatever memory held.

    PYTHONPATH=tests/support python -c "import stub_driver; stub_driver.install(); ..."

As a pytest plugin (``-p stub_driver.plugin``), it lets the tests marked ``gpu`` launch.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

_HERE = Path(__file__).parent
_MOST_PARAMETERS = 128
# Compute capability and the most shared memory of a program, as of bench/binaries.py.
HOPPER = (9, 0, 227 * 1024)


def compiler() -> str | None:
    """The C compiler, as Triton finds it; None if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def unusable() -> str | None:
    """Why the stub can't be used here; None if it can."""
    from importlib.util import find_spec

    if sys.platform != "linux":
        return "the stub driver is a Linux library"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if compiler() is None:
        return "there is no C compiler, for the stub driver"
    return None


def build(folder: Path) -> Path:
    """Compile ``libcuda.so.1`` into a folder, against the CUDA header that Triton comes with."""
    from importlib.util import find_spec

    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    include = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    found = compiler()
    assert found is not None
    subprocess.run(
        [
            *(found, "-std=c11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"),
            *("-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", f"-I{include}"),
            *("-o", str(library), str(_HERE / "libcuda.c")),
        ],
        check=True,
    )
    return library


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("parameters", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * _MOST_PARAMETERS),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", _Kernel),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("values", ctypes.c_uint64 * _MOST_PARAMETERS),
    )


class Launch(NamedTuple):
    """One launch as the driver got it."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    """Bytes of shared memory."""
    stream: int
    parameters: tuple[bytes, ...]
    """Each parameter, of the size that the binary declares; the last two are Triton's own."""


_library: Any = None


def install(card: tuple[int, int, int] = HOPPER) -> None:
    """Put the stub below Triton, and give the Triton backend CPU tensors.

    ``card`` is a compute capability, two numbers, and the most bytes of shared memory. What
    depends on the card in gist_kernels itself is Hopper's, as in the interpreter.
    """
    global _library
    if _library is not None:
        raise RuntimeError("the stub driver is installed once in a process")
    if "gist_kernels" in sys.modules:
        raise RuntimeError("install the stub driver before gist_kernels is imported")
    import torch

    if torch.cuda.is_available():
        raise RuntimeError("there is a CUDA device here; the stub driver is for machines without")
    # Triton's cache knows its own modules by this name, so it must not change. Other processes may
    # have the library there open.
    folder = _HERE.parents[2] / "build" / "stub-driver"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        os.replace(build(Path(own)), folder / "libcuda.so.1")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    _library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    _library.stub_recorded.restype = ctypes.c_long
    _library.stub_launch.restype = ctypes.POINTER(_Launch)
    assert _library.stub_launch_size() == ctypes.sizeof(_Launch)
    _library.stub_card(*card)

    import triton

    triton.runtime.driver.set_active(_driver(card[:2]))
    # The backend asks for a device when it is imported.
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        import gist_kernels
    _serve_cpu_tensors(gist_kernels)


def _driver(capability: tuple[int, ...]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        """Triton's own, with the answers that it takes from torch.cuda."""

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device: capability
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    return Driver()


def _serve_cpu_tensors(gist_kernels: Any) -> None:
    import dataclasses

    from gist_kernels import backend
    from gist_kernels.kernels import triton
    from gist_kernels.kernels.triton import launch

    served = dataclasses.replace(triton.BACKEND, device_types=("cpu",))
    backend.BACKENDS = tuple(served if each.name == "triton" else each for each in backend.BACKENDS)
    backend._cached_choice.cache_clear()
    triton.BACKEND = served
    triton.DEVICE_TYPES = launch.DEVICE_TYPES = ("cpu",)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches inside the block, in order, once it has ended."""
    found: list[Launch] = []
    _library.stub_forget()
    yield found
    for index in range(_library.stub_recorded()):
        raw = _library.stub_launch(index).contents
        kernel = raw.kernel
        found.append(
            Launch(
                kernel.name.decode(),
                tuple(raw.grid),
                tuple(raw.block),
                raw.shared,
                raw.stream,
                tuple(
                    raw.values[i].to_bytes(8, "little")[: kernel.sizes[i]]
                    for i in range(kernel.parameters)
                ),
            )
        )
