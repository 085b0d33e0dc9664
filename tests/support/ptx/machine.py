"""The threads of a program, and the programs of a launch.

The threads of a block step together, those that are furthest behind first, so that threads that
went different ways meet again. With a seed, warps and programs take turns at random.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container
from typing import Any

import numpy as np

from ptx.copies import Copies
from ptx.instructions import Operand, bound
from ptx.memory import Memory, Tensor, shared_memory
from ptx.parser import SPECIAL, WARP, Kernel, UnsupportedError
from ptx.races import Clocks, FaultError
from ptx.warp import from_lanes, to_lanes

Array = np.ndarray
_CONTROL = re.compile(r"(bra|ret|exit|bar\.sync|barrier)\b")
# A warp's threads wait for each other before these.
_TOGETHER = re.compile(r"(shfl|redux|mma|ldmatrix|stmatrix|bar\.warp)\b")
_ACTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
            "or": np.bitwise_or}  # fmt: skip


class Block:
    """The registers of one program at a time, and the kernel's instructions on them."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        if kernel.threads % WARP:
            raise UnsupportedError(f"{kernel.threads} threads, which are no whole warps")
        self.threads, self.warps = kernel.threads, kernel.threads // WARP
        self.thread = np.arange(self.threads)
        self.warp = self.thread // WARP
        self._arrays: dict[str, Array] = {}
        self.steps = [[bound(each, self) for each in some] for some in kernel.code]
        self.control = [bool(_CONTROL.match(each.opcode)) for each in kernel.instructions]
        self.together = [bool(_TOGETHER.match(each.opcode)) for each in kernel.instructions]
        self.guards = [
            None if guard is None else (self.array(Operand(guard[0], np.dtype(np.bool_))), guard[1])
            for guard in (each.guard for each in kernel.instructions)
        ]

    def array(self, operand: Operand) -> Array:
        """An operand's array, or every so many elements of a wider one."""
        found = self._arrays.get(operand.name)
        if found is None:
            found = self._arrays[operand.name] = self._made(operand)
        if found.dtype == operand.dtype:
            return found
        return found.view(operand.dtype)[operand.part :: found.itemsize // operand.dtype.itemsize]

    def _made(self, operand: Operand) -> Array:
        name, dtype = operand.name, operand.dtype
        if operand.constant is not None:
            if dtype == np.bool_:
                return np.array([operand.constant != 0])
            bits = operand.constant & ((1 << 8 * dtype.itemsize) - 1)
            return np.array([bits], f"u{dtype.itemsize}").view(dtype)
        if name in SPECIAL:
            return np.zeros(self.threads, np.uint32)
        if name in self.kernel.parameters:
            return np.zeros(1, f"u{int(self.kernel.parameters[name][1:]) // 8}")
        width = self.kernel.width(name)
        kind = np.bool_ if width == "pred" else np.dtype(f"u{int(width) // 8}")
        return np.zeros(self.threads, kind)

    def start(self, launch: Launch, number: int) -> None:
        """Become a program of a launch."""
        self.launch, self.number = launch, number
        columns, rows, _ = launch.grid
        place = number % columns, number // columns % rows, number // (columns * rows)
        values: dict[str, Any] = {f"%ctaid.{axis}": place[i] for i, axis in enumerate("xyz")}
        values |= {f"%nctaid.{axis}": launch.grid[i] for i, axis in enumerate("xyz")}
        values |= {f"%ntid.{axis}": (self.threads, 1, 1)[i] for i, axis in enumerate("xyz")}
        values |= {"%tid.x": self.thread, "%laneid": self.thread % WARP, "%tid.y": 0, "%tid.z": 0}
        values |= launch.arguments
        for name, array in self._arrays.items():
            if name in values:
                array[:] = values[name]
            elif ":" not in name:
                array.fill(0 if array.dtype == np.bool_ else 0xDEAD)
        self.shared = shared_memory(launch.shared, self.kernel.shared_unit)
        self.clocks = Clocks(number, self.warps, launch.programs)
        self.shared_clocks = Clocks(number, self.warps, launch.programs)
        self.copies = Copies(self.threads)
        self.counter = np.zeros(self.threads, np.int64)
        self.exited, self.waiting, self.stalled = np.zeros((3, self.threads), np.bool_)

    # --- the order of execution

    def run(self, chosen: Array, budget: int) -> None:
        """Up to ``budget`` instructions of the chosen threads, or until none of them can go on."""
        while budget > 0:
            if self.stalled.any():
                self._meet()
            active = chosen & ~(self.exited | self.waiting | self.stalled)
            if not active.any():
                return
            counters = self.counter[active]
            first = int(counters.min())
            at = active & (self.counter == first)
            others = counters[counters > first]
            until = int(others.min()) if others.size else len(self.steps)
            budget -= self._straight(at, first, min(until, first + budget))

    def _straight(self, at: Array, first: int, until: int) -> int:
        """Threads ``at`` one counter go on until another, or to a branch; how far they came."""
        every: Any = True if at.all() else at
        parted = np.zeros(1, np.bool_)
        if every is not True:
            each = at.reshape(self.warps, WARP)
            parted = each.any(1) & ~each.all(1)
        now = first
        try:
            while now < until and not self.control[now]:
                if self.together[now] and parted.any():
                    self.stalled |= at & np.repeat(parted, WARP)
                    break
                where = self._guarded(now, every)
                if where is not None:
                    for step in self.steps[now]:
                        step(where)
                now += 1
            self.counter[at] = now
            if now < until and self.control[now]:
                self._branch(now, at)
                now += 1
        except FaultError as fault:
            raise self._named(fault, now) from None
        self.exited[at] |= self.counter[at] >= len(self.steps)
        warps = self.warps if every is True else int(each.any(1).sum())
        self.launch.statistics["warp instructions"] += warps * (now - first)
        return max(1, now - first)

    def _guarded(self, now: int, every: Any) -> Any:
        """The active threads whose predicate holds; None if there is none."""
        guard = self.guards[now]
        if guard is None:
            return every
        where = every & (~guard[0] if guard[1] else guard[0])
        return where if where.any() else None

    def _named(self, fault: FaultError, now: int) -> FaultError:
        instruction = self.kernel.instructions[now]
        return FaultError(f"{fault}\n{self.kernel.name}, program {self.number}, {instruction}")

    def _meet(self) -> None:
        """Threads that waited for the rest of their warp go on when it has come."""
        for warp in np.unique(self.warp[self.stalled]):
            threads = self.warp == warp
            counters = self.counter[threads]
            if (counters == counters[0]).all() and not self.exited[threads].any():
                self.stalled[threads] = False
            elif not (threads & ~(self.exited | self.waiting | self.stalled)).any():
                now = int(self.counter[threads & self.stalled][0])
                raise self._named(FaultError("hang: a part of a warp waits for the rest"), now)

    def _branch(self, now: int, at: Array) -> None:
        instruction = self.kernel.instructions[now]
        taken = self._guarded(now, at)
        self.counter[at] = now + 1
        if taken is None:
            return
        if instruction.stem == "bra":
            self.counter[taken] = self.kernel.labels[instruction.operands[0]]
        elif instruction.stem in ("ret", "exit"):
            self.exited[taken] = True
        else:
            self.waiting[taken] = True
        if self.waiting.any() and (self.waiting | self.exited).all():
            if self.exited.any():
                raise FaultError("hang: threads wait at a barrier that others never reach")
            if (self.counter != self.counter[0]).any():
                raise FaultError("hang: threads wait at different barriers")
            self.waiting[:] = False
            self.shared_clocks.barrier()
            if self.launch.barriers is None or instruction.source in self.launch.barriers:
                self.clocks.barrier()

    # --- memory

    def _locate(
        self, space: str, address: Array, offset: int, size: int, threads: Array
    ) -> tuple[Tensor, Array]:
        addresses = np.broadcast_to(address, self.threads)[threads].astype(np.int64) + offset
        if space == "shared":
            return self.shared, self.shared.at(addresses, size)
        return self.launch.memory.locate(addresses, size)

    def _active(self, where: Any) -> Array:
        return self.thread if where is True else self.thread[where]

    def _clocks(self, tensor: Tensor) -> Clocks:
        return self.shared_clocks if tensor is self.shared else self.clocks

    def _read(self, tensor: Tensor, at: Array, size: int, threads: Array) -> None:
        tensor.check_read(at, size, self._clocks(tensor), self.warp[threads])

    def _write(self, tensor: Tensor, at: Array, values: Array, threads: Array) -> None:
        tensor.write(at, values, self._clocks(tensor), self.warp[threads])

    def load(
        self, space: str, address: Array, offset: int, dtype: np.dtype, destinations: list[Array],
        where: Any,
    ) -> None:  # fmt: skip
        threads = self._active(where)
        size = dtype.itemsize * len(destinations)
        tensor, at = self._locate(space, address, offset, size, threads)
        self._read(tensor, at, size, threads)
        words = tensor.storage.words[dtype.itemsize].view(dtype)
        first = at // dtype.itemsize
        for i, destination in enumerate(destinations):
            destination[threads] = words[first + i]

    def store(
        self, space: str, address: Array, offset: int, dtype: np.dtype, values: list[Array],
        where: Any,
    ) -> None:  # fmt: skip
        threads = self._active(where)
        columns = [np.broadcast_to(value, self.threads)[threads] for value in values]
        tensor, at = self._locate(space, address, offset, dtype.itemsize * len(values), threads)
        self._write(tensor, at, np.stack(columns, 1), threads)

    def load_matrices(
        self, address: Array, offset: int, destinations: list[Array], transposed: bool, where: Any
    ) -> None:
        """8 x 8 matrices of 16 bits; lane 8 i + r has the address of row r of matrix i."""
        threads = self._active(where)
        for i, destination in enumerate(destinations):
            rows = threads[threads % WARP // 8 == i]
            tensor, at = self._locate("shared", address, offset, 16, rows)
            self._read(tensor, at, 16, rows)
            found = tensor.storage.words[2][at[:, None] // 2 + np.arange(8)].reshape(-1, 8, 8)
            destination[threads] = to_lanes(found.swapaxes(1, 2) if transposed else found)

    def store_matrices(
        self, address: Array, offset: int, sources: list[Array], transposed: bool, where: Any
    ) -> None:
        """The reverse of :meth:`load_matrices`."""
        threads = self._active(where)
        for i, source in enumerate(sources):
            rows = threads[threads % WARP // 8 == i]
            tensor, at = self._locate("shared", address, offset, 16, rows)
            matrices = from_lanes(source[threads])
            values = matrices.swapaxes(1, 2) if transposed else matrices
            self._write(tensor, at, values.reshape(-1, 8), rows)

    def atomic(
        self, address: Array, offset: int, dtype: np.dtype, destination: Array | None,
        values: list[Array], action: str, order: str, scope: str, where: Any,
    ) -> None:  # fmt: skip
        """One thread after the other. Atomics race with plain accesses only: as a read does."""
        for thread in self._active(where):
            one = self.thread[thread : thread + 1]
            tensor, at = self._locate("global", address, offset, dtype.itemsize, one)
            self._read(tensor, at, dtype.itemsize, one)
            left = tensor.history.left.setdefault(int(at[0]), {})
            self.clocks.atomic(int(self.warp[thread]), left, order, scope)
            words = tensor.storage.words[dtype.itemsize].view(dtype)
            place = at // dtype.itemsize
            old = words[place]
            given = [np.broadcast_to(each, self.threads)[one] for each in values]
            if action == "cas":
                new = np.where(old == given[0], given[1], old)
            else:
                new = given[0] if action == "exch" else _ACTIONS[action](old, given[0])
            if destination is not None:
                destination[one] = old
            words[place] = new

    # --- copies into shared memory

    def copy(
        self, to: Array, to_offset: int, of: Array, of_offset: int, size: int, count: Array,
        where: Any,
    ) -> None:  # fmt: skip
        """``cp.async``: read now. It lands when it is waited for, which is the latest it may."""
        threads = self._active(where)
        count = np.broadcast_to(count, self.threads)[threads]
        if not np.isin(count, (0, size)).all():
            raise UnsupportedError("cp.async of a part of its bytes")
        data = np.zeros((len(threads), size), np.uint8)
        some = count > 0
        if some.any():
            tensor, at = self._locate("global", of, of_offset, size, threads[some])
            self._read(tensor, at, size, threads[some])
            data[some] = tensor.storage.words[1][at[:, None] + np.arange(size)]
        _, at = self._locate("shared", to, to_offset, size, threads)
        self.shared.check_write(at, size, self.shared_clocks, self.warp[threads])
        self.shared.undefine(at, size)  # until it has landed
        self.copies.add(threads, at, data)

    def commit(self, where: Any) -> None:
        self.copies.commit(where)

    def wait_copies(self, pending: int, where: Any) -> None:
        for threads, at, data in self.copies.landed(pending, where):
            self._write(self.shared, at, data, threads)


class Launch:
    """A grid of programs.

    Args:
        arguments: bits of each parameter of the kernel, by name.
        shared: bytes of shared memory.
        seed: of the order in which programs and their warps run; None runs one program after the
            other, all warps together, which is the fastest.
        resident: how many programs take turns.
        barriers: lines of the source whose barriers order accesses of tensors too; None: all do.
    """

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: dict[str, int],
        memory: Memory, shared: int = 0, *, seed: int | None = None, resident: int = 8,
        barriers: Container[str] | None = None,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.memory, self.shared = kernel, grid, memory, shared
        self.arguments, self.resident, self.barriers = arguments, resident, barriers
        self.programs = grid[0] * grid[1] * grid[2]
        self.random = None if seed is None else np.random.default_rng(seed)
        self.statistics: Counter[str] = Counter()
        missing = set(kernel.parameters) - set(arguments)
        if missing:
            raise ValueError(f"{kernel.name} has parameters without a value: {missing}")

    def run(self) -> None:
        idle, self.kernel.blocks = self.kernel.blocks, []
        waiting = list(range(self.programs))
        if self.random is not None:
            waiting = list(self.random.permutation(self.programs))
        running: list[Block] = []
        most = 1 if self.random is None else self.resident
        with np.errstate(all="ignore"):
            while waiting or running:
                while waiting and len(running) < most:
                    running.append(idle.pop() if idle else Block(self.kernel))
                    running[-1].start(self, int(waiting.pop(0)))
                block = self._turn(running)
                if block.exited.all():
                    running.remove(block)
                    idle.append(block)
        self.kernel.blocks = idle[:1]  # for the next launch; more would take memory

    def _turn(self, running: list[Block]) -> Block:
        if self.random is None:
            block = running[0]
            block.run(np.ones(block.threads, np.bool_), 1_000_000)
            return block
        block = running[self.random.integers(len(running))]
        warps = self.random.random(block.warps) < self.random.random()
        block.run(warps[block.warp], int(self.random.choice([1, 10, 100, 10_000])))
        return block
