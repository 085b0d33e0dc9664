"""Loader processes: how many, and for which data."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gist.data.base import DataError, Preloaded
from gist.data.text import Tokenised
from gist.training.batches import BatchSampler

MOST_WORKERS = 8


def default_workers(processes_here: int = 1) -> int:
    """Loader processes of one training process, where nothing else is said.

    One for each CPU that the training processes of this machine share, at most
    :data:`MOST_WORKERS`; none in a daemonic process, which may start no others.
    """
    if multiprocessing.current_process().daemon:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cpus = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cpus // processes_here))


def workers_for(data: Dataset[Any], workers: int) -> int:
    """Loader processes for this data: 0 for what lies in memory, which needs no decoding."""
    return 0 if isinstance(data, Preloaded | Tokenised) else workers


def lengths_of(data: Dataset[Any]) -> list[int] | None:
    """Tokens of each text; None for images."""
    return data.lengths if isinstance(data, Tokenised) else None


def collate_of(data: Dataset[Any]) -> Callable[[Any], Any] | None:
    """What makes a batch of items; None: torch's own, which stacks images."""
    return data.collate if isinstance(data, Tokenised) else None


def training_loader(
    data: Dataset[Any], batches: BatchSampler, *, workers: int, seed: int, device: torch.device
) -> DataLoader[Any]:
    """A loader of the parts that ``batches`` gives; its workers live from epoch to epoch.

    Args:
        seed: of the workers' seeds.
        device: where the parts go next.
    """
    workers = workers_for(data, workers)
    return DataLoader(
        data,
        batch_sampler=batches,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate_of(data),
        pin_memory=device.type == "cuda",
    )


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's parts. The first one asked for starts or resets its workers.

    Raises:
        DataError: as in this process: the loader puts a worker's traceback before the text.
    """
    try:
        yield from loader
    except DataError as error:
        text = str(error).rpartition(f"{DataError.__module__}.{DataError.__qualname__}: ")[2]
        raise DataError(text.strip()) from error
