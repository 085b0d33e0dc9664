"""Loader processes: how many, and for which data."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gist.data.base import DataError, Preloaded
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
    """Loader processes for this data: 0 for images in memory, which need no decoding."""
    return 0 if isinstance(data, Preloaded) else workers


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
