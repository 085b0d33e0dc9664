"""Accuracy and loss over a data set, by one process or several."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from gist.training.inputs import call, to_device
from gist.training.loading import collate_of, lengths_of, loaded, workers_for


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy in [0, 1] and mean cross-entropy of the class token's logits."""

    accuracy: float
    loss: float
    images: int
    images_per_second: float


def processes(device: torch.device | str) -> PartialState:
    """The processes of this training; the first call joins the launcher's process group."""
    return PartialState(cpu=torch.device(device).type == "cpu")


def share_of(count: int, state: PartialState) -> range:
    """The items, of ``count``, that a process of :func:`evaluate` measures."""
    return range(state.process_index, count, state.num_processes)


def evaluation_order(data: Dataset[Any]) -> list[int] | None:
    """The order in which :func:`evaluate` takes the items; None for their own."""
    lengths = lengths_of(data)
    return None if lengths is None else sorted(range(len(lengths)), key=lengths.__getitem__)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Dataset[Any], *, batch_size: int = 32, workers: int = 0
) -> Evaluation:
    """Accuracy and cross-entropy over every item of ``data``; leaves ``model`` in evaluation mode.

    Texts are taken from the shortest to the longest. With several processes, each measures its
    share, and all return the total.

    Raises:
        ValueError: ``data`` is empty.
    """
    model.eval()
    device = next(model.parameters()).device
    state, workers = processes(device), workers_for(data, workers)
    collate, order = collate_of(data), evaluation_order(data)
    if order is not None:
        data = Subset(data, order)
    items = len(data)  # type: ignore[arg-type]
    share = share_of(items, state)
    left = len(share)
    if state.num_processes > 1:
        # A sharded model is called by all processes as often: one with fewer items gets a filler.
        fillers = [0] * (-(-items // state.num_processes) - left)
        data = Subset(data, [*share, *fillers])
    batches: list[torch.Tensor] = []  # correct, loss, images
    start = time.perf_counter()
    loader = DataLoader(
        data,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        # The default is the global generator: its draw would change a training.
        generator=torch.Generator(),
    )
    for inputs, target in loaded(loader):
        target = target.to(device)
        logits = call(model, to_device(inputs, device)).float()[:left]
        target = target[:left]
        left -= len(target)
        right = (logits.argmax(1) == target).sum()
        loss = F.cross_entropy(logits, target, reduction="sum")
        batches.append(torch.stack((right.float(), loss, loss.new_full((), len(target)))))
    # Python sums them: not every device has float64.
    rows = gather_object(torch.stack(batches).tolist() if batches else [])
    if not rows:
        raise ValueError("data has no items to evaluate")
    correct, total, count = (math.fsum(column) for column in zip(*rows, strict=True))
    seconds = time.perf_counter() - start
    return Evaluation(correct / count, total / count, int(count), count / seconds)
