"""Predicted times of the Triton kernels and of a training step on named cards: no device is needed.

    python -m bench.roofline [H100 A100 L4 4090] [--kernels] [--tokens N]

A prediction, to be held against the first measurement. Of each kernel it counts the bytes that its
tensors have, the operations of its matmuls, and the instructions that its compiled programs issue
(SASS of the card's architecture: straight code once, loops as often as the launch has them go
round). The largest of the three, at the card's published rates, bounds the time; what overlaps is
not modelled, nor are latencies and caches. PyTorch's own kernels are bounded by bytes and
operations. The step is that of ViT-B with 198 tokens and rank-4 adapters under autocast; beside it,
the same structure by torch.compile and SDPA, every element-wise chain fused into one kernel.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel

from bench import binaries
from gist_kernels.kernels.triton import heuristics

DEPTH, WIDTH, HEADS, RANK = 12, 768, 12, 4
BATCHES = (32, 256)
HEAD_DIM, HIDDEN = WIDTH // HEADS, 4 * WIDTH
HALF, SINGLE = 2, 4  # bytes
# Eager launches that Python and the driver take longer over than a small kernel runs.
SECONDS_A_LAUNCH = 5e-6
ISSUES_A_CYCLE = 4  # of a multiprocessor: one a scheduler


class Card(NamedTuple):
    """Published rates."""

    target: str
    multiprocessors: int
    gigahertz: float
    """Boost clock."""
    bytes_per_second: float
    half_flop_per_second: float
    """Of dense bf16 matmuls summed in float32."""


CARDS = {
    "H100": Card("sm_90", 132, 1.83, 3.35e12, 989e12),
    "A100": Card("sm_80", 108, 1.41, 2.04e12, 312e12),
    "L4": Card("sm_89", 58, 2.04, 0.30e12, 121e12),
    "4090": Card("sm_89", 128, 2.52, 1.01e12, 165e12),
}


class Work(NamedTuple):
    """What some launches of one kind need."""

    name: str
    launches: int
    bytes: float
    flop: float = 0.0
    issues: float = 0.0
    """Instructions of warps, over all programs."""

    def times(self, count: int) -> Work:
        return Work(self.name, *(count * value for value in self[1:]))

    def bounds(self, card: Card) -> dict[str, float]:
        """Seconds by what limits them."""
        rate = ISSUES_A_CYCLE * card.multiprocessors * card.gigahertz * 1e9
        return {
            "bytes": self.bytes / card.bytes_per_second,
            "matmuls": self.flop / card.half_flop_per_second,
            "issue": self.issues / rate,
        }

    def seconds(self, card: Card) -> float:
        return max(self.bounds(card).values())


def issued(sass: str, *rounds: int) -> int:
    """Instructions that a warp of a program issues, its loops ``rounds`` times each: those of the
    outer loops, then those within them.

    What follows the first way out after an atomic is left out: only the last program runs it.
    """
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
    atomic = next((i for i, (_, text) in enumerate(code) if "ATOMG" in text), None)
    if atomic is not None:
        leaves = (i for i, (_, text) in enumerate(code) if i > atomic and "EXIT" in text)
        code = code[: next(leaves) + 1]
    loops = [
        (int(jump[1], 16), address)
        for address, text in code
        if (jump := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) and int(jump[1], 16) < address
    ]
    depths = (sum(first <= at <= last for first, last in loops) for at, _ in code)
    return sum(math.prod(rounds[:depth]) for depth in depths)


def disassembled(binary: CompiledKernel) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.check_output([tool, "-sass", cubin], text=True, stderr=subprocess.DEVNULL)


class Program(NamedTuple):
    """One kernel's compiled code."""

    sass: str
    warps: int

    def issues(self, programs: int, *rounds: int) -> float:
        return float(programs * self.warps * issued(self.sass, *rounds))


@lru_cache(maxsize=256)
def program(family: str, target: str, name: str, *sizes: int) -> Program:
    """The first launch of a kernel among those that a family makes for these sizes."""
    launches = {
        "loss": binaries.launches,
        "adapter": binaries.adapter_launches,
        "attention": binaries.attention_launches,
    }[family](*sizes, binaries.TARGETS[target])
    chosen = next(
        each for each in launches if each.name() in (f"{name}_kernel", f"{name}_tiles_kernel")
    )
    binary = binaries.compiled(chosen, binaries.TARGETS[target])
    return Program(disassembled(binary), chosen.options["num_warps"])


def loss(card: Card, rows: int, classes: int) -> Iterator[Work]:
    """Both heads' logits in bf16; one pass over them forward, one and their gradients backward."""
    logits = 2 * rows * classes * HALF
    for name, tile, moved in (
        ("forward", heuristics.forward(classes), logits),
        ("backward", heuristics.backward(classes), 2 * logits),
    ):
        programs = tile.programs(rows) * tile.chunks(classes)
        issues = program("loss", card.target, name, classes).issues(programs)
        yield Work(f"loss {name} {rows} x {classes}", 1, moved, issues=issues)


def adapter(card: Card, rows: int) -> tuple[Work, Work]:
    """LayerNorm and adapter forward; both backward, with the sums of their partial sums."""
    elements = rows * WIDTH
    found = []
    for name, launches, tile, moved in (
        ("forward", 1, heuristics.adapter_forward(WIDTH, RANK), 2 * SINGLE + HALF),
        ("backward", 2, heuristics.adapter_backward(WIDTH, RANK), 3 * SINGLE + HALF),
    ):
        parts, each = tile.parts(rows, card.multiprocessors)
        code = program("adapter", card.target, name, WIDTH, RANK)
        issues = code.issues(parts, each)
        found.append(Work(f"norm + adapter {name}", launches, elements * moved, issues=issues))
    return found[0], found[1]


def attention(card: Card, images: int, tokens: int) -> tuple[Work, Work] | None:
    """None where the kernels refuse such heads, and PyTorch computes them."""
    launches = binaries.attention_launches(tokens, HEAD_DIM, binaries.TARGETS[card.target])
    if not launches:
        return None
    elements, heads = images * tokens * WIDTH, images * HEADS
    forward, backward = (
        program("attention", card.target, name, tokens, HEAD_DIM)
        for name in ("forward", "backward")
    )
    sizes = launches[0].arguments
    if "KEYS" in sizes:
        tile = heuristics.AttentionTile(sizes["COLUMNS"], sizes["KEYS"], sizes["QUERIES"], 0)
        parts, each = tile.parts(tokens, heads, card.multiprocessors)
        blocks = -(-tokens // tile.queries)
        scores = tile.keys * blocks * tile.queries
        matmuls = 2 * scores, 5 * scores
        issues = forward.issues(parts * heads, each), backward.issues(heads, blocks)
    else:
        rounds = []  # over the tiles' rows, and over the others for each
        matmuls = ()
        for launch, products in zip(launches, (2, 8), strict=True):
            rows, block = (launch.arguments[name] for name in ("ROWS", "BLOCK"))
            rounds.append((-(-tokens // rows), -(-tokens // block)))
            matmuls += (products * math.prod(rounds[-1]) * rows * block,)
        (tiles, blocks), of_backward = rounds
        issues = forward.issues(heads * tiles, blocks), backward.issues(heads, *of_backward)
    flop = [2 * HEAD_DIM * heads * each for each in matmuls]
    return (
        Work("attention forward", 1, 4 * HALF * elements, flop[0], issues[0]),
        Work("attention backward", 1, 7 * HALF * elements, flop[1], issues[1]),
    )


def sdpa(images: int, tokens: int) -> tuple[Work, Work]:
    """FlashAttention by PyTorch; its three gradients are copied into one packed tensor. Its
    instructions are not counted, in its favour."""
    elements, scores = images * tokens * WIDTH, 2 * images * HEADS * tokens**2 * HEAD_DIM
    return (
        Work("SDPA forward", 1, 4 * HALF * elements, 2 * scores),
        Work("SDPA backward", 5, (8 + 6) * HALF * elements, 5 * scores),
    )


def matmuls(rows: int) -> Iterator[Work]:
    """The four frozen layers of a block, forward, and backward to their inputs."""
    for name, inputs, outputs in (
        ("qkv", WIDTH, 3 * WIDTH), ("proj", WIDTH, WIDTH),
        ("fc1", WIDTH, HIDDEN), ("fc2", HIDDEN, WIDTH),
    ):  # fmt: skip
        moved = HALF * (rows * (inputs + outputs) + inputs * outputs)
        yield Work(f"matmuls {name}", 2, 2 * moved, 2 * 2 * rows * inputs * outputs)


def our_block(card: Card, images: int, tokens: int) -> list[Work]:
    rows = images * tokens
    elements = rows * WIDTH
    forward, backward = adapter(card, rows)
    gelu = Work("GELU, both ways", 2, (2 + 3) * HALF * rows * HIDDEN)
    return [
        *matmuls(rows),
        forward.times(2),
        backward.times(2),
        *(attention(card, images, tokens) or sdpa(images, tokens)),
        gelu,
        # By the last matmul, which reads and writes the residual instead of its result.
        Work("sublayer's output added", 0, 2 * elements * (2 * SINGLE - HALF)),
        Work("gradient to bf16", 2, 2 * elements * (SINGLE + HALF)),
        Work("adapter's gradients added", 4, 0),
    ]


def compiled_block(images: int, tokens: int) -> list[Work]:
    """The same structure by torch.compile: residual, LayerNorm, casts and the adapter's output are
    one kernel a sublayer, the adapter itself is matmuls."""
    rows = images * tokens
    elements = rows * WIDTH
    return [
        *matmuls(rows),
        Work("residual + norm forward", 2, 2 * elements * (2 * SINGLE + 4 * HALF)),
        Work("residual + norm backward", 2, 2 * elements * (3 * SINGLE + 3 * HALF)),
        Work("adapter forward", 6, 2 * elements * 2 * HALF),
        Work("adapter backward", 10, 2 * elements * 4 * HALF),
        *sdpa(images, tokens),
        Work("GELU, both ways", 2, (2 + 3) * HALF * rows * HIDDEN),
    ]


_HEADER = f"{'':<30}" + "".join(
    f"{name:>9}"
    for name in ("launches", "MB", "GFLOP", "M issues", "us bytes", "matmuls", "issue")
) + "  bound"  # fmt: skip


def _row(work: Work, card: Card) -> str:
    bounds = work.bounds(card)
    most = max(bounds, key=lambda name: bounds[name])
    micro = [1e6 * bounds[name] for name in ("bytes", "matmuls", "issue")]
    return (
        f"{work.name:<30}{work.launches:>9}{work.bytes / 1e6:>9.1f}{work.flop / 1e9:>9.1f}"
        f"{work.issues / 1e6:>9.1f}" + "".join(f"{value:>9.1f}" for value in micro) + f"  {most}"
    )


def _print_step(card: Card, images: int, tokens: int) -> None:
    print(_HEADER)
    totals = {}
    for label, block in (
        ("ours", our_block(card, images, tokens)),
        ("torch.compile + SDPA", compiled_block(images, tokens)),
    ):
        print(f"-- a block of {label}")
        for work in block:
            print(_row(work, card))
        launches = DEPTH * sum(work.launches for work in block)
        totals[label] = DEPTH * sum(work.seconds(card) for work in block), launches
    for label, (seconds, launches) in totals.items():
        python = launches * SECONDS_A_LAUNCH
        print(f"{label}: {1e3 * seconds:.1f} ms on the card, {launches} launches, of which Python "
              f"needs at least {1e3 * python:.1f} ms unless they are a CUDA graph")  # fmt: skip
    ours, theirs = (totals[label][0] for label in totals)
    print(f"predicted ratio as graphs: {theirs / ours:.2f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cards", nargs="*", help=f"of {', '.join(CARDS)}; default: all")
    parser.add_argument("--kernels", action="store_true", help="the loss's kernels alone")
    parser.add_argument(
        "--tokens",
        type=int,
        default=198,
        help="of an image; patches of 14 pixels: 258; default: 198",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cards if name not in CARDS]
    if unknown:
        parser.error(f"a card must be of {', '.join(CARDS)}; it is {unknown[0]}")
    print(f"A model, not a measurement. Triton {triton.__version__}, PyTorch {torch.__version__}.")
    for name in arguments.cards or CARDS:
        card = CARDS[name]
        print(f"\n{name} ({card.target})")
        print(_HEADER)
        for rows, classes in ((64, 1000), (4096, 32_000)):
            for work in loss(card, rows, classes):
                print(_row(work, card))
        for images in () if arguments.kernels else BATCHES:
            print(f"\nViT-B, {images} images of {arguments.tokens} tokens")
            _print_step(card, images, arguments.tokens)


if __name__ == "__main__":
    main()
