"""How the cost of a loss grows with the batch and with the number of classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import loss
from bench.measure import Case

# One size varies, the other stays: on both sides of where a call costs more than the work.
ROWS = tuple(4**k for k in range(7))
CLASSES = (10, 40, 160, 640, 2560, 10240, 40960, 163840)


def absent(device: torch.device) -> dict[str, str]:
    return {}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for rows in ROWS:
        yield _case("B", rows, 1000, dtype, device)
    for classes in CLASSES:
        yield _case("C", 64, classes, dtype, device)


def _case(varied: str, rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> Case:
    case = loss.case(rows, classes, dtype, device, {})
    case.sizes["varied"] = rows if varied == "B" else classes
    case.calls = {name: case.calls[name] for name in ("ours", "ours, no autograd")}
    case.floors.clear()
    case.graphs = False
    return case
