"""PTX executed on a CPU: what Triton compiled for an NVIDIA GPU, without one, and checked.

    from ptx.driver import executed

    with executed(80, seed=0):
        loss.forward(...)  # of CPU tensors

The way down, one file each:

- ``driver``: a Triton driver. Specialisation and compilation are Triton's own; a launch comes here.
- ``parser``: the text of a kernel, as instructions.
- ``instructions``: an instruction, as a function of arrays.
- ``arithmetic``, ``warp``: what these functions compute, for each thread or for a warp.
- ``machine``: the threads of a program, which step together; programs that take turns.
- ``memory``: addresses, and what a program may access.
- ``races``: who knows of whose accesses.

Registers are NumPy arrays with one element per thread. :class:`FaultError` says what a program did
that none may do: an access outside a tensor or misaligned, a read of what nobody wrote, a write to
an input, a race, a wait in vain.
"""

from ptx.machine import Launch
from ptx.memory import FaultError, Memory
from ptx.parser import UnsupportedError, parse

__all__ = ["FaultError", "Launch", "Memory", "UnsupportedError", "parse"]
