"""The tables of README and docs that show benchmarks, made from the JSON files in bench/results.

``python -m bench.tables`` rewrites them in place; ``--check`` names those that differ and fails.
A page holds a table where it has the table's first line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

AVX512, ZEN3, HELD_TO_AVX2 = "cpu-amd-epyc", "cpu-amd-epyc-zen3", "cpu-amd-epyc-avx2"
AMX = "cpu-intel-amx"

Result = dict[str, float]
Case = dict[str, Any]


@cache
def _cases(source: str) -> list[Case]:
    return json.loads((RESULTS / f"{source}.json").read_text())["cases"]


@dataclass(frozen=True)
class Table:
    """A Markdown table of a page: its lines, of which the first one is like no other's there."""

    page: str
    head: Sequence[str]
    rows: Iterable[Sequence[str]]
    left: int = 1
    """The columns aligned to the left; the others are numbers."""

    def lines(self) -> list[str]:
        rule = ["---"] * self.left + ["---:"] * (len(self.head) - self.left)
        return [
            _line(self.head),
            f"|{'|'.join(rule)}|",
            *(_line(row) for row in self.rows),
        ]


def _line(cells: Sequence[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def figure(value: float) -> str:
    """Three digits, or all of a larger number's."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.9995 else f"{value:.3f}"


def ms(result: Result) -> str:
    return f"{1e3 * result['median']:,.0f} ms"


def ms_and_factor(result: Result) -> str:
    return f"{ms(result)} ({result['times_ours']:.2f}x)"


def mb(result: Result) -> str:
    return f"{result['peak_bytes'] / 1e6:,.0f} MB"


@dataclass(frozen=True)
class Column:
    """A case's figures, in a form; of ours in bold, and without the factor."""

    source: str
    case: int
    form: Callable[[Result], str]

    def cell(self, contender: str) -> str:
        """``contender`` is its name in the JSON file; empty for ours, which comes first there."""
        results = _cases(self.source)[self.case]["results"]
        if not contender:
            found = next(iter(results.values()))
            return mb(found) if self.form is mb else f"**{ms(found)}**"
        return self.form(results[contender]) if contender in results else "not run"


def times_and_memory(source: str, *cases: int) -> list[Column]:
    return [Column(source, case, form) for case in cases for form in (ms_and_factor, mb)]


def by_contender(
    page: str, head: Sequence[str], contenders: dict[str, str], columns: Sequence[Column]
) -> Table:
    """A row for ours and for each contender: its label, and its name in the JSON files."""
    named = {"**gist**": "", **contenders}
    rows = [[label, *(column.cell(name) for column in columns)] for label, name in named.items()]
    return Table(page, head, rows)


def _loss() -> Table:
    head = [
        "B x C", "released, eager", "log-softmax, eager", "torch.compile of that", "**gist**",
        "over compile", "over released", "of copy bandwidth",
    ]  # fmt: skip
    rows = []
    for case in _cases(f"{AVX512}/loss"):
        sizes, of = case["sizes"], case["results"]
        times = [
            of[name]["median"] for name in ("released", "log-softmax", "torch.compile", "ours")
        ]
        factors = [of[name]["times_ours"] for name in ("torch.compile", "released")]
        rows.append(
            [
                f"{sizes['B']} x {sizes['C']}",
                *(figure(1e3 * seconds) for seconds in times),
                *(f"{factor:.1f}x" for factor in factors),
                f"{of['ours']['of_floor']:.0%}",
            ]
        )
    return Table("docs/results.md", head, rows)


def _matmuls() -> Table:
    """GFLOP/s onto a new tensor, forward / gradient of the input."""

    def speeds(source: str) -> dict[tuple[int, ...], dict[bool, Case]]:
        found: dict[tuple[int, ...], dict[bool, Case]] = {}
        for case in _cases(source):
            sizes = case["sizes"]
            if not sizes["adds"]:
                shape = (sizes["M"], sizes["I"], sizes["O"])
                found.setdefault(shape, {})[sizes["backward"]] = case
        return found

    native, held = speeds(f"{AVX512}/matmul"), speeds(f"{HELD_TO_AVX2}/matmul")

    def cell(found: dict[bool, Case], shape: tuple[int, ...], library: str) -> str:
        flops = 2 * shape[0] * shape[1] * shape[2]
        return " / ".join(
            f"{flops / found[backward]['results'][library]['median'] / 1e9:.0f}"
            for backward in (False, True)
        )

    rows = [
        [
            " x ".join(map(str, shape)),
            *(
                cell(of[shape], shape, lib)
                for of in (native, held)
                for lib in ("PyTorch", "oneDNN")
            ),
        ]
        for shape in native
    ]
    head = ["rows x inputs x outputs", "PyTorch", "oneDNN", "with AVX2: PyTorch", "oneDNN"]
    return Table("docs/kernels.md", head, rows)


RELEASED = {
    "released structure, eager": "released",
    "released structure, `torch.compile`": "released, torch.compile",
}
TOKEN_ALONE = {
    "token only, no adapter, eager": "released, token alone",
    "gist, token only": "ours, token alone",
    "only the matmuls and attentions that must remain": "products alone",
}
COMPILED = {"gist, `torch.compile`": "ours, torch.compile"}
OWN_FORWARD = {
    "own forward": "own forward",
    "own forward, `torch.compile`": "own forward, torch.compile",
}
DIVERGENCES = {"`torch.compile`": "torch.compile", "eager PyTorch": "eager"}
MASKED = {
    "gist, no row masked": "no row masked",
    "gist on the rows that count, and zeros for the rest": "half of the rows, and zeros",
}
LINEAR = {
    "gist, `chunk_rows=64`": "ours, chunks of 64",
    "its matmuls alone": "matmuls alone",
    "unfused: one matmul, then `gist_loss`": "unfused, ours",
    "eager PyTorch": "log-softmax",
    "`torch.compile` of it": "torch.compile",
    "checkpointed chunks of 128": "checkpointed chunks",
    "`linear_cross_entropy`, no KL, best chunk": "linear_cross_entropy, no KL, 512 rows",
}


def tables() -> list[Table]:
    readme, results = "README.md", "docs/results.md"
    of_step = ["", "ViT-S/16, 8 images", "", "ViT-B/16, 4 images", ""]
    of_divergence = ["", "KL both ways", "", "Jensen-Shannon", ""]
    of_linear = [
        "pairs x features x classes", "512 x 384 x 30,522, head trained", "",
        "the same, head frozen", "", "192 x 768 x 128,256, frozen", "",
    ]  # fmt: skip
    others = {
        "DINOv3-S/16 (timm), 8 images": ("step-other-models", 0),
        "ViT-B/16 (transformers), 8 images": ("step-other-models", 1),
        "BERT-base (transformers), 16 texts": ("step-bert", 0),
    }
    step = times_and_memory(f"{AVX512}/step", 0, 1)
    divergence = times_and_memory(f"{ZEN3}/divergence", 0, 1)
    in_pytorch = {"the same by PyTorch's own operators": "products alone, PyTorch's"}
    return [
        by_contender(readme, of_step, RELEASED, step),
        by_contender(readme, of_divergence, DIVERGENCES, divergence),
        by_contender(results, of_step, RELEASED | TOKEN_ALONE | in_pytorch, step),
        by_contender(
            results,
            ["", "ViT-S/16, 8 images", "memory"],
            COMPILED | RELEASED | TOKEN_ALONE,
            times_and_memory(f"{ZEN3}/step", 0),
        ),
        by_contender(
            results,
            ["", *others],
            COMPILED | OWN_FORWARD,
            [Column(f"{ZEN3}/{name}", case, ms_and_factor) for name, case in others.values()],
        ),
        by_contender(
            results,
            ["", "ViT-S/16, float32", "", "ViT-S/16, bf16", "", "ViT-B/16, bf16", ""],
            COMPILED | RELEASED | TOKEN_ALONE,
            [
                *times_and_memory(f"{AMX}/step", 0),
                *times_and_memory(f"{AMX}/step-bf16", 0, 1),
            ],
        ),
        by_contender(
            results,
            ["", "DINOv3-S/16", "ViT-B/16 (transformers)", "BERT-base", "BERT-base, bf16"],
            COMPILED | OWN_FORWARD,
            [
                *(Column(f"{AMX}/step", case, ms_and_factor) for case in (2, 3, 4)),
                Column(f"{AMX}/step-bf16", 2, ms_and_factor),
            ],
        ),
        _loss(),
        by_contender(results, of_divergence, DIVERGENCES | MASKED, divergence),
        by_contender(results, of_linear, LINEAR, times_and_memory(f"{ZEN3}/linear-loss", 0, 1, 2)),
        _matmuls(),
    ]


def replaced(page: str, table: Table) -> str:
    """The page with the table's lines in place of those below its first line."""
    lines, new = page.split("\n"), table.lines()
    places = [at for at, line in enumerate(lines) if line == new[0]]
    if len(places) != 1:
        raise ValueError(
            f"{table.page} has {len(places)} tables that begin with {new[0]!r}, not one"
        )
    start = end = places[0]
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:start], *new, *lines[end:]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one differs")
    check = parser.parse_args(arguments).check
    differ = []
    for table in tables():
        path = ROOT / table.page
        before = path.read_text()
        after = replaced(before, table)
        if after == before:
            continue
        differ.append(f"{table.page}: {_line(table.head)}")
        if not check:
            path.write_text(after)
    for name in differ:
        print("differs" if check else "rewritten", name)
    if check and differ:
        sys.exit("run: python -m bench.tables")


if __name__ == "__main__":
    main()
