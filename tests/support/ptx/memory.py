"""Memory: tensors and shared memory, and what a program may access.

A pointer is the number of a tensor and an offset, so that an access outside one tensor never lands
in another. Tensors may share a storage: a gradient that overwrites the logits is a race with
whoever still reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ptx.races import Clocks, FaultError, History

_SPACING = 40  # bits of an offset, which starts from their middle
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Storage:
    """Bytes, with what is known of each element."""

    def __init__(self, data: np.ndarray, unit: int) -> None:
        self.unit = unit
        """Bytes of an element."""
        self.words = {
            size: data[: len(data) // size * size].view(dtype) for size, dtype in _WORDS.items()
        }
        self.elements = -(-len(data) // unit)
        self.defined: np.ndarray | None = None
        """Elements whose contents somebody wrote; None: all."""
        self.history: History | None = None
        """None: nobody writes there."""

    def watch(self) -> None:
        if self.history is None:
            self.history = History(self.elements)

    def elements_of(self, at: np.ndarray, size: int) -> np.ndarray:
        """The elements in ``size`` bytes from each of the bytes ``at``: accesses by elements."""
        return at[:, None] // self.unit + np.arange(max(1, size // self.unit))


class Tensor:
    """A view of a storage: from byte ``start``, by strides in bytes."""

    def __init__(
        self, name: str, storage: Storage, start: int, shape: tuple[int, ...],
        strides: tuple[int, ...], unit: int, *, writable: bool,
    ) -> None:  # fmt: skip
        self.name, self.storage, self.start, self.unit = name, storage, start, unit
        self.shape, self.strides, self.writable = shape, strides, writable
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        self.extent = 0 if 0 in shape else last + unit
        """Bytes from its first to its last."""
        self._dense = self.extent == unit * math.prod(shape)
        if writable:
            storage.watch()

    @property
    def history(self) -> History:
        if not self.writable or self.storage.history is None:
            raise FaultError(f"input: {self.name} is written to")
        return self.storage.history

    def undefine(self, at: np.ndarray | None = None, size: int = 0) -> None:
        """Nobody wrote ``size`` bytes from each of the bytes ``at`` yet; None: anything."""
        storage = self.storage
        if storage.defined is None:
            storage.defined = np.ones(storage.elements, np.bool_)
        if at is not None:
            storage.defined[storage.elements_of(at, size)] = False
            return
        first = storage.defined[self.start // storage.unit :]
        strides = [step // storage.unit for step in self.strides]
        np.lib.stride_tricks.as_strided(first, self.shape, strides)[...] = False

    def at(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Bytes of the storage, for accesses of ``size`` bytes."""
        if ((offsets + self.start) % size).any():
            raise FaultError(f"misaligned access of {size} bytes to {self.name}")
        outside = (offsets < 0) | (offsets + size > self.extent)
        if outside.any():
            raise FaultError(
                f"outside: {size} bytes from {int(offsets[outside][0])} of {self.name}, "
                f"which has {self.extent}"
            )
        if not self._dense:
            between = ~self._belong(offsets[:, None] + np.arange(0, size, self.unit)).all(1)
            if between.any():
                byte = int(offsets[between][0])
                raise FaultError(f"outside: byte {byte} lies between the rows of {self.name}")
        return offsets + self.start

    def _belong(self, offsets: np.ndarray) -> np.ndarray:
        """Which offsets are of an element."""
        rest = offsets // self.unit * self.unit
        for step, n in sorted(zip(self.strides, self.shape, strict=True), reverse=True):
            if step:
                rest = rest - np.minimum(rest // step, n - 1) * step
        return rest == 0

    def check_read(self, at: np.ndarray, size: int, clocks: Clocks, warp: np.ndarray) -> None:
        """Check and note a read of ``size`` bytes from each of the bytes ``at``, by warps."""
        storage = self.storage
        if storage.defined is None and storage.history is None:
            return
        elements = storage.elements_of(at, size)
        if storage.defined is not None:
            missing = ~storage.defined[elements].all(1)
            if missing.any():
                byte = int(at[missing][0]) - self.start
                raise FaultError(f"unwritten: byte {byte} of {self.name} is read; nobody wrote it")
        if storage.history is not None:
            late = storage.history.unordered(clocks, warp, elements)
            if late.any():
                raise self._race(storage.history, at, elements, late, "read")
            storage.history.read(clocks, warp, elements)

    def check_write(
        self, at: np.ndarray, size: int, clocks: Clocks, warp: np.ndarray,
        changed: Callable[[], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """The same of a write. ``changed``: which of them write something new."""
        history = self.history
        elements = self.storage.elements_of(at, size)
        late = history.unordered(clocks, warp, elements)
        if late.any() and changed is not None:
            late = late & changed()[:, None]
        if late.any():
            raise self._race(history, at, elements, late, "written")
        reader = history.unread(clocks, warp, elements)
        if reader is not None:
            raise FaultError(
                f"race: {self.name}, about byte {int(at[0]) - self.start}, is written, and was "
                f"read by program {reader}, in no order"
            )
        history.write(clocks, warp, elements)

    def _race(
        self, history: History, at: np.ndarray, elements: np.ndarray, late: np.ndarray, done: str
    ) -> FaultError:
        byte = int(at[late.any(1)][0]) - self.start
        writer = history.writer_of(int(elements[late][0]))
        return FaultError(
            f"race: byte {byte} of {self.name} is {done}, and was written by {writer}, in no order"
        )

    def write(self, at: np.ndarray, values: np.ndarray, clocks: Clocks, warp: np.ndarray) -> None:
        """Store the rows of ``values`` at the bytes ``at``.

        Triton stores a value that several threads hold several times. That is no race, and it does
        not matter who wins, as long as it is the same value.
        """
        size = values.itemsize
        words, places = self.storage.words[size], at[:, None] // size + np.arange(values.shape[1])
        whole = size * values.shape[1]
        self.check_write(at, whole, clocks, warp, lambda: (words[places] != values).any(1))
        words[places] = values
        if (words[places] != values).any():
            raise FaultError(f"race: threads store different values to one place of {self.name}")
        if self.storage.defined is not None:
            self.storage.defined[self.storage.elements_of(at, whole)] = True


class Memory:
    """The tensors of a launch."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, tensor: Tensor) -> int:
        """A pointer to its first element."""
        self._tensors.append(tensor)
        return self._pointer(len(self._tensors))

    def _pointer(self, number: int) -> int:
        start = self._tensors[number - 1].start
        return (number << _SPACING) + (1 << (_SPACING - 1)) + start % 16

    def locate(self, addresses: np.ndarray, size: int) -> tuple[Tensor, np.ndarray]:
        """The tensor that accesses of ``size`` bytes are in, and their bytes of its storage."""
        numbers = addresses >> _SPACING
        number = int(numbers[0])
        if not 1 <= number <= len(self._tensors):
            raise FaultError(f"outside: no tensor has address {int(addresses[0]):#x}")
        if (numbers != number).any():
            raise FaultError("outside: one instruction accesses several tensors")
        tensor = self._tensors[number - 1]
        return tensor, tensor.at(addresses - self._pointer(number), size)


def shared_memory(size: int, unit: int) -> Tensor:
    """A program's own, of which nobody wrote anything yet."""
    storage = Storage(np.full(size, 0xFF, np.uint8), unit)
    tensor = Tensor("shared memory", storage, 0, (size // unit,), (unit,), unit, writable=True)
    tensor.undefine()
    return tensor
