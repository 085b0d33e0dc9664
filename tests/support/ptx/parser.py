"""The text of a PTX kernel, as a list of instructions."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

WARP = 32
SPECIAL = (
    *(f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid", "ntid") for axis in "xyz"),
    "%laneid",
)
"""Registers that no program writes."""


class UnsupportedError(NotImplementedError):
    """What this interpreter leaves out, by name."""


class Instruction(NamedTuple):
    opcode: str
    operands: list[str]
    """Those in braces or brackets stay together."""
    guard: tuple[str, bool] | None
    """A predicate, and whether it is negated."""
    line: int
    """Of the text."""
    source: str
    """File and line that it comes from, as "loss.py:12"; "" if the text doesn't say."""

    @property
    def stem(self) -> str:
        return self.opcode.split(".")[0]

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' * self.guard[1]}{self.guard[0]} "
        return f"{guard}{self.opcode} {', '.join(self.operands)} ({self.place})"

    @property
    def place(self) -> str:
        return f"line {self.line}" + (f", {self.source}" if self.source else "")


_SKIPPED = re.compile(r"[\s{}]+")  # braces that open a statement are scopes
_LINE = re.compile(r"\.(loc|file|section)\b([^\n]*)")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([^\s;]+)\s*([^;]*);")


class Kernel:
    """The entry of a PTX module."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
        head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.S)
        if head is None:
            raise ValueError("the text has no .entry")
        self.name = head[1]
        words = [each.split() for each in head[2].split(",") if each.strip()]
        self.parameters = {each[-1]: each[1].lstrip(".") for each in words}
        """Their types: u64, b32, ..."""
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
        self.threads = int(threads[1]) if threads else WARP
        self.symbols = re.findall(r"\.shared\s+\.[^;]*?([\w$]+)\s*(?:\[\s*\d*\s*\])?\s*;", text)
        if len(self.symbols) > 1:
            raise UnsupportedError(f"several arrays in shared memory: {', '.join(self.symbols)}")
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._widths: dict[str, str] = {}
        self._statements(text, head.end())
        self.blocks: list[Any] = []
        """Bound to registers, for the next launch."""

    def _statements(self, text: str, at: int) -> None:
        files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:.*/)?(.*?)"', text, re.M))
        source, line = "", text.count("\n", 0, at) + 1
        while at < len(text):
            if match := _SKIPPED.match(text, at):
                pass
            elif match := _LINE.match(text, at):
                if match[1] != "loc":
                    return
                number, of_source, *_ = match[2].split()
                source = f"{files.get(number, '?')}:{of_source}"
            elif match := _LABEL.match(text, at):
                self.labels[match[1]] = len(self.instructions)
            elif match := _STATEMENT.match(text, at):
                self._statement(*match.groups(), line, source)
            else:
                raise ValueError(f"no statement: {text[at : at + 60]!r}")
            line += text.count("\n", at, match.end())
            at = match.end()

    def _statement(
        self, negated: str, predicate: str, opcode: str, rest: str, line: int, source: str
    ) -> None:
        if opcode == ".reg":
            kind, names = rest.split(None, 1)
            for name in names.split(","):
                width = "pred" if kind == ".pred" else kind[2:]
                self._widths[re.sub(r"<\d+>", "", name).strip()] = width
        elif opcode == ".pragma":
            pass
        elif opcode.startswith("."):
            raise UnsupportedError(f"{opcode} {rest} (line {line})")
        else:
            guard = (predicate, negated == "!") if predicate else None
            self.instructions.append(Instruction(opcode, _split(rest), guard, line, source))

    def width(self, register: str) -> str:
        """'pred', '16', '32' or '64'."""
        if register in self._widths:
            return self._widths[register]
        return self._widths[re.sub(r"\d+$", "", register)]

    @cached_property
    def shared_unit(self) -> int:
        """The bytes of the smallest access to shared memory, at most 4."""
        sizes = [4]
        for each in self.instructions:
            if re.match(r"(ld|st|atom|red)\b.*\.shared", each.opcode):
                sizes.append(int(re.sub(r".*\D", "", each.opcode)) // 8)
        return min(sizes)

    @cached_property
    def code(self) -> list[Any]:
        from ptx.instructions import translated

        return [translated(self, each) for each in self.instructions]


def _split(text: str) -> list[str]:
    found = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [each.strip() for each in found if each.strip()]


@lru_cache(maxsize=64)
def parse(text: str) -> Kernel:
    return Kernel(text)
