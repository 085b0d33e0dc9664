"""Launch shapes of the Triton loss kernels, tried one by one on this device.

    python -m bench.sweep [--out FILE] [--classes 100 1000 ...]

For each number of classes and each pass it prints what
`gist_kernels/kernels/triton/heuristics.py` chooses and what was fastest. Nothing is tuned at run
time: a better choice is made by changing that file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import measure
from bench.machine import machine
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.kernels.triton import heuristics
from gist_kernels.kernels.triton.heuristics import Tile

CLASSES = (2, 10, 100, 397, 1000, 4096, 8192, 21843, 32000, 131072)
ELEMENTS = 1 << 26
OPTIONS = LossOptions(3.0, 1.0, 0.5, 0.75, 0.75, 0.0, -100, "mean")
THREADS = (128, 256, 512, 1024)


def candidates(kind: str, classes: int) -> Iterator[Tile]:
    """Tiles worth a try: of several short rows, of a row, and of chunks of a long one."""
    whole = max(16, 1 << (classes - 1).bit_length())
    if whole <= 1024:
        for elements in (256, 512, 1024, 2048):
            if elements >= whole:
                yield from (Tile(elements // whole, whole, threads) for threads in THREADS[:2])
    blocks = {whole} if whole <= 16384 else set()
    if kind != "kept":
        blocks |= {block for block in (1024, 2048, 4096, 8192) if block < classes}
    for block in sorted(blocks):
        yield from (Tile(1, block, threads) for threads in THREADS if 4 <= block // threads <= 64)


def sweep(kind: str, classes: int, device: torch.device, elements: int) -> dict[str, Any]:
    from gist_kernels.kernels.triton import loss

    rows = max(1, min(65536, elements // classes))
    cls, gist = torch.randn(2, rows, classes, device=device, dtype=torch.bfloat16).unbind()
    target = torch.randint(classes, (rows,), device=device)
    _, _, stats = loss.forward(cls, gist, target, OPTIONS)
    passes: dict[str, Callable[[], object]] = {
        "forward": lambda: loss.forward(cls, gist, target, OPTIONS, False),
        "backward": lambda: loss.backward(None, cls, gist, target, stats, OPTIONS, True, True),
        "kept": lambda: loss.forward_backward(cls, gist, target, OPTIONS),
    }
    on_device = device.type == "cuda"
    timer = measure._on_device if on_device else measure._on_host

    def milliseconds(tile: Tile) -> float:
        with mock.patch.object(heuristics, kind, return_value=tile):
            return 1e3 * statistics.median(timer(passes[kind], 1) for _ in range(10))

    chosen = getattr(heuristics, kind)(classes)
    times: dict[str, float] = {}
    for tile in dict.fromkeys([*([chosen] if chosen else []), *candidates(kind, classes)]):
        try:
            times[_name(tile)] = milliseconds(tile)
        except Exception as error:  # a shape that this device has no room for
            print(f"{kind} {classes} {_name(tile)}: {error}")
    return {
        "pass": kind,
        "rows": rows,
        "classes": classes,
        "chosen": _name(chosen) if chosen else None,
        "fastest": min(times, key=times.__getitem__),
        "milliseconds": times,
    }


def _name(tile: Tile) -> str:
    return f"{tile.rows} x {tile.block}, {tile.threads} threads"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of a logit tensor")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    report: dict[str, Any] = {"machine": machine(device), "sweeps": []}
    for classes in given.classes:
        for kind in ("forward", "backward", "kept"):
            found = sweep(kind, classes, device, given.elements)
            report["sweeps"].append(found)
            times = found["milliseconds"]
            now = f"{times[found['chosen']]:.4f}" if found["chosen"] else "not kept"
            print(
                f"{kind:<9}{classes:>8}  chosen {found['chosen']} ({now} ms), "
                f"fastest {found['fastest']} ({times[found['fastest']]:.4f} ms)",
                flush=True,
            )
            if given.out:
                given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
