"""An instruction, as a function of arrays and the operands that it takes.

A modifier that is not listed here, or an instruction, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ptx import arithmetic, warp
from ptx.arithmetic import Function, dtype_of
from ptx.parser import SPECIAL, Instruction, Kernel, UnsupportedError


class Operand(NamedTuple):
    """A register, a constant, a special register or a parameter, read as a type.

    A type narrower than the register is one of its parts, the lowest first.
    """

    name: str
    dtype: np.dtype
    part: int = 0
    constant: int | None = None
    """The bits of one."""


class Operation(NamedTuple):
    """``function`` of the sources, assigned to the destinations where threads are active.

    A name is that of a method of the block, which takes ``arguments`` and the active threads.
    """

    function: Function | str
    destinations: list[Operand]
    sources: list[Operand]
    arguments: tuple[Any, ...] = ()


# Modifiers besides types, of instructions on each thread's own registers.
_MODIFIERS = {
    "add": "rn ftz", "sub": "rn ftz", "mul": "rn ftz lo hi wide", "mad": "lo wide", "fma": "rn ftz",
    "div": "rn full approx ftz", "rem": "", "min": "ftz", "max": "ftz", "neg": "ftz",
    "abs": "ftz", "and": "", "or": "", "xor": "", "not": "", "mov": "", "selp": "", "shl": "",
    "shr": "", "bfe": "", "prmt": "", "cvta": "to global", "ex2": "approx ftz", "lg2": "approx ftz",
    "rcp": "approx rn ftz", "sqrt": "approx rn ftz", "rsqrt": "approx ftz", "tanh": "approx",
    "cvt": "rn rna rzi rni rmi rpi", "setp": "ftz",
    # Hints for caches change nothing here. Loads and stores with an order of their own: left out.
    "ld": "global shared param cta nc ca cg cs L1 L2 evict_first evict_last evict_normal v2 v4",
    "st": "global shared cta wb cg cs L1 L2 evict_first evict_last evict_normal v2 v4",
    "atom": "global relaxed acquire release acq_rel cta gpu sys add exch min max and or cas",
    "red": "global relaxed release cta gpu sys add min max and or",
    "cp": "async ca cg shared global cta commit_group wait_group wait_all L2",
    "ldmatrix": "sync aligned m8n8 x1 x2 x4 trans shared cta",
    "stmatrix": "sync aligned m8n8 x1 x2 x4 trans shared cta",
    "mma": "sync aligned m16n8k16 m16n8k8 row col",
    "shfl": "sync bfly idx up down", "redux": "sync add min max and or xor",
    "bar": "sync warp", "barrier": "sync aligned", "bra": "uni", "ret": "", "exit": "",
}  # fmt: skip
_TYPE = re.compile(r"pred|[busf](8|16|32|64)|bf16|b?f16x2|tf32")
_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def translated(kernel: Kernel, instruction: Instruction) -> list[Operation]:
    try:
        return _Translator(kernel, instruction).operations()
    except (KeyError, ValueError, TypeError) as error:
        raise UnsupportedError(f"{instruction}: {error!r}") from error


class _Translator:
    def __init__(self, kernel: Kernel, instruction: Instruction) -> None:
        self.kernel, self.instruction = kernel, instruction
        self.operands = instruction.operands
        self.stem, *rest = re.sub(r"::(?=\w)", ".", instruction.opcode).split(".")
        self.types = [each for each in rest if _TYPE.fullmatch(each)]
        self.modifiers = [each for each in rest if not _TYPE.fullmatch(each)]
        if self.stem not in _MODIFIERS:
            raise UnsupportedError(str(instruction))
        known = _MODIFIERS[self.stem].split()
        if self.stem == "setp":
            known += [*arithmetic.COMPARE, *arithmetic.COMPARE_FLOAT, *arithmetic.COMBINE]
        if self.stem == "cp":
            known += ["128B"]
        unknown = [each for each in self.modifiers if each not in known]
        if unknown:
            raise UnsupportedError(f"{instruction}: .{unknown[0]}")

    def operations(self) -> list[Operation]:
        special = getattr(self, f"_{self.stem}", None)
        return (special or self._arithmetic)()

    # --- operands

    def operand(self, text: str, kind: str, part: int = 0) -> Operand:
        if text in self.kernel.symbols:
            return Operand(f"{text}:{kind}", dtype_of(kind), constant=0)
        if text.startswith("%") and text not in SPECIAL:
            self.kernel.width(text)  # declared
        if text.startswith("%") or text in self.kernel.parameters:
            return Operand(text, dtype_of(kind), part)
        bits = int(text[2:], 16) if text.startswith(("0f", "0d")) else int(text.rstrip("U"), 0)
        return Operand(f"{text}:{kind}", dtype_of(kind), constant=bits)

    def destination(self, text: str, kind: str) -> Operand:
        """All of the register: a narrower result is extended, by its sign if it has one."""
        width = self.kernel.width(text)
        return self.operand(text, "pred" if width == "pred" else kind[0] + width)

    def _names(self, text: str) -> list[str]:
        return [each.strip() for each in text.strip("{} ").split(",")]

    def _address(self, text: str) -> tuple[Operand, int]:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise UnsupportedError(str(self.instruction))
        base = match[1]
        kind = f"b{self.kernel.width(base)}" if base.startswith("%") else "b32"
        return self.operand(base, kind), int(match[2] or "0", 0)

    # --- on each thread's own registers

    def _assign(
        self, function: Function, to: str, of: str | list[str], sources: list[str] | None = None
    ) -> list[Operation]:
        first, *rest = self.operands
        sources = rest if sources is None else sources
        kinds = [of] * len(sources) if isinstance(of, str) else of
        if "ftz" in self.modifiers:
            function = arithmetic.flushed(function)
        operands = [self.operand(each, kind) for each, kind in zip(sources, kinds, strict=True)]
        return [Operation(function, [self.destination(first, to)], operands)]

    def _arithmetic(self) -> list[Operation]:
        (kind,) = self.types
        if kind == "f32":
            return self._assign(arithmetic.FLOAT[self.stem], kind, kind)
        half = re.fullmatch(r"(b?f16)(x2)?", kind)
        if half is not None and self.stem in ("mul", "fma") and "ftz" not in self.modifiers:
            parts, bits = (2, "b32") if half[2] else (1, "b16")
            function = arithmetic.in_halves(arithmetic.FLOAT[self.stem], half[1], parts)
            return self._assign(function, bits, bits)
        if kind[0] not in "busp" or half is not None:
            raise UnsupportedError(str(self.instruction))
        return self._assign(arithmetic.INTEGER[self.stem], kind, kind)

    def _mul(self) -> list[Operation]:
        (kind,) = self.types
        wide = kind[0] + str(2 * int(kind[1:])) if kind[0] in "us" else kind
        if "wide" in self.modifiers:
            kinds = [kind, kind, wide][: len(self.operands) - 1]
            product = arithmetic.widened(arithmetic.INTEGER[self.stem], kind)
            return self._assign(product, wide, kinds)
        if "hi" in self.modifiers:
            return self._assign(arithmetic.high_product(kind), kind, kind)
        return self._arithmetic()

    _mad = _mul

    def _shl(self) -> list[Operation]:
        (kind,) = self.types
        return self._assign(arithmetic.INTEGER[self.stem], kind, [kind, "u32"])

    _shr = _shl

    def _bfe(self) -> list[Operation]:
        (kind,) = self.types
        if kind not in ("u32", "s32"):
            raise UnsupportedError(str(self.instruction))
        return self._assign(arithmetic.extract_bits, kind, [kind, "u32", "u32"])

    def _selp(self) -> list[Operation]:
        (kind,) = self.types
        kind = "b" + kind[1:]
        return self._assign(arithmetic.select, kind, [kind, kind, "pred"])

    def _setp(self) -> list[Operation]:
        (kind,) = self.types
        destinations, *sources = self.operands
        table = arithmetic.COMPARE_FLOAT if kind == "f32" else arithmetic.COMPARE
        compare, *combine = [each for each in self.modifiers if each != "ftz"]
        function = table[compare]
        if combine:
            both = arithmetic.COMBINE[combine[0]]
            function = lambda a, b, c, compare=table[compare]: both(compare(a, b), c)  # noqa: E731
        given = [self.operand(each, "pred" if i == 2 else kind) for i, each in enumerate(sources)]
        if "ftz" in self.modifiers or "|" in destinations:
            raise UnsupportedError(str(self.instruction))
        return [Operation(function, [self.operand(destinations, "pred")], given)]

    def _mov(self) -> list[Operation]:
        (kind,) = self.types
        kind = kind if kind == "pred" else "b" + kind[1:]
        destination, source = self.operands
        if source.startswith("{"):
            parts = self._names(source)
            narrow = f"b{int(kind[1:]) // len(parts)}"
            return self._assign(arithmetic.joined(dtype_of(kind)), kind, narrow, parts)
        if destination.startswith("{"):
            parts = self._names(destination)
            narrow = f"b{int(kind[1:]) // len(parts)}"
            return [
                Operation(
                    arithmetic.identity,
                    [self.destination(each, narrow)],
                    [self.operand(source, narrow, i)],
                )
                for i, each in enumerate(parts)
                if each != "_"
            ]
        return self._assign(arithmetic.identity, kind, kind)

    def _cvt(self) -> list[Operation]:
        to, of = self.types
        if (to, of) == ("f32", "bf16"):
            return self._assign(arithmetic.from_bf16, "f32", "b16")
        if (to, of) == ("f32", "f16") or (to, of, self.modifiers) == ("f32", "f64", ["rn"]):
            return self._assign(arithmetic.identity, to, of)
        if of == "f32" and self.modifiers == ["rn"] and to in ("bf16", "f16"):
            return self._assign(getattr(arithmetic, f"to_{to}"), "b16", of)
        if of == "f32" and self.modifiers == ["rn"] and to in ("bf16x2", "f16x2"):
            half = getattr(arithmetic, f"to_{to[:-2]}")
            return self._assign(arithmetic.pair(half), "b32", of)
        if (to, of, self.modifiers) == ("tf32", "f32", ["rna"]):
            return self._assign(arithmetic.to_tf32, "b32", of)
        if of == "f32" and to[0] in "su" and len(self.modifiers) == 1:
            rounded = arithmetic.to_integer(_ROUND[self.modifiers[0]], dtype_of(to))
            return self._assign(rounded, to, of)
        if of[0] in "su" and ((to == "f32" and self.modifiers == ["rn"]) or to[0] in "su"):
            dtype = dtype_of(to)
            return self._assign(lambda x: x.astype(dtype), to, of)
        raise UnsupportedError(str(self.instruction))

    # --- memory

    def _space(self) -> str:
        return next(each for each in ("global", "shared") if each in self.modifiers)

    def _ld(self) -> list[Operation]:
        (kind,) = self.types
        destination, source = self.operands
        if "param" in self.modifiers:
            return self._assign(arithmetic.identity, kind, kind, [source.strip("[] ")])
        names = self._names(destination)
        destinations = [self.destination(each, kind) for each in names]
        arguments = self._space(), *self._address(source), dtype_of(kind), destinations
        return [Operation("load", [], [], arguments)]

    def _st(self) -> list[Operation]:
        (kind,) = self.types
        destination, source = self.operands
        kind = "b" + kind[1:]
        values = [self.operand(each, kind) for each in self._names(source)]
        arguments = self._space(), *self._address(destination), dtype_of(kind), values
        return [Operation("store", [], [], arguments)]

    def _atom(self) -> list[Operation]:
        (kind,) = self.types
        destination = None
        rest = self.operands
        if self.stem == "atom":
            destination, *rest = rest
        where, *values = rest
        dtype = dtype_of(kind)

        def chosen(of: str, default: str | None = None) -> str:
            return next((each for each in self.modifiers if each in of.split()), default or "")

        arguments = (
            *self._address(where), dtype,
            None if destination in (None, "_") else self.operand(destination, kind),
            [self.operand(each, kind) for each in values],
            chosen("add exch min max and or cas"),
            chosen("relaxed acquire release acq_rel", "relaxed"), chosen("cta gpu sys", "gpu"),
        )  # fmt: skip
        return [Operation("atomic", [], [], arguments)]

    _red = _atom

    def _cp(self) -> list[Operation]:
        if "commit_group" in self.modifiers:
            return [Operation("commit", [], [])]
        if "wait_group" in self.modifiers:
            return [Operation("wait_copies", [], [], (int(self.operands[0], 0),))]
        if "wait_all" in self.modifiers:
            return [Operation("commit", [], []), Operation("wait_copies", [], [], (0,))]
        to, of, size, *count = self.operands
        copied = self.operand(count[0] if count else size, "u32")
        arguments = (*self._address(to), *self._address(of), int(size, 0), copied)
        return [Operation("copy", [], [], arguments)]

    def _ldmatrix(self) -> list[Operation]:
        registers, where = self.operands
        if self.stem == "stmatrix":
            registers, where = where, registers
        matrices = [self.operand(each, "b32") for each in self._names(registers)]
        arguments = *self._address(where), matrices, "trans" in self.modifiers
        name = "load_matrices" if self.stem == "ldmatrix" else "store_matrices"
        return [Operation(name, [], [], arguments)]

    _stmatrix = _ldmatrix

    # --- a warp together

    def _mma(self) -> list[Operation]:
        shape = next(each for each in self.modifiers if each.startswith("m"))
        given, left, right, total = self.types
        if (given, left, total) != ("f32", right, "f32") or (shape, left) not in (
            ("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32"),
        ):  # fmt: skip
            raise UnsupportedError(str(self.instruction))
        d, *sources = ([self.operand(each, "b32") for each in self._names(group)]
                       for group in self.operands)  # fmt: skip
        return [Operation(warp.multiplied(left), d, [each for group in sources for each in group])]

    def _whole(self, members: str) -> None:
        if int(members, 0) not in (-1, 0xFFFFFFFF):
            raise UnsupportedError(f"{self.instruction}: a part of a warp")

    def _shfl(self) -> list[Operation]:
        destination, value, by, control, members = self.operands
        self._whole(members)
        (mode,) = (each for each in self.modifiers if each != "sync")
        sources = [self.operand(value, "b32"), self.operand(by, "u32")]
        sources.append(self.operand(control, "u32"))
        return [Operation(warp.shuffled(mode), [self.operand(destination, "b32")], sources)]

    def _redux(self) -> list[Operation]:
        (kind,) = self.types
        destination, value, members = self.operands
        self._whole(members)
        (name,) = (each for each in self.modifiers if each != "sync")
        function = warp.reduced(arithmetic.INTEGER[name])
        return [Operation(function, [self.operand(destination, kind)], [self.operand(value, kind)])]

    # --- control: what the block does itself

    def _bar(self) -> list[Operation]:
        if "warp" in self.modifiers:
            self._whole(self.operands[0])
        elif self.operands != ["0"]:
            raise UnsupportedError(str(self.instruction))
        return []

    _barrier = _bar

    def _bra(self) -> list[Operation]:
        return []

    _ret = _exit = _bra


def bound(operation: Operation, block: Any) -> Callable[..., None]:
    """A function of the active threads, a mask or True for all, on a block's arrays."""
    array = block.array

    def resolved(value: Any) -> Any:
        if isinstance(value, Operand):
            return array(value)
        return [array(each) for each in value] if isinstance(value, list) else value

    function = operation.function
    if isinstance(function, str):
        method = getattr(block, function)
        arguments = [resolved(each) for each in operation.arguments]
        return lambda where: method(*arguments, where=where)
    sources = [array(each) for each in operation.sources]
    destinations = [array(each) for each in operation.destinations]
    if len(destinations) > 1:

        def assign_all(where: Any) -> None:
            for each, value in zip(destinations, function(*sources), strict=True):
                np.copyto(each, value, where=where)

        return assign_all
    (destination,) = destinations
    kinds = {each.dtype for each in (*sources, destination)}
    if isinstance(function, np.ufunc) and (len(kinds) == 1 or destination.dtype == np.bool_):
        return lambda where: function(*sources, out=destination, where=where)

    def assign(where: Any) -> None:
        np.copyto(destination, function(*sources), where=where, casting="unsafe")

    return assign
