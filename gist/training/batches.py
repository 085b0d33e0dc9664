"""The items of each step, and the part of them that this process computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from gist.data.base import Draw

# Batches' worth of items that are sorted by length together: enough for little padding, and few
# enough for batches that differ from epoch to epoch.
WINDOW = 50


class Step(NamedTuple):
    """What one process computes of a batch."""

    images: int
    """Of the whole batch."""
    parts: int
    fillers: int = 0
    """The last parts, which another process computes too: they don't count."""


class BatchSampler(Sampler[list[int] | list[Draw]]):
    """The batches of an epoch, from any step on, split into the parts of one process.

    The order depends only on seed and epoch. Each batch is split into ``accumulate`` times
    ``processes`` parts of almost the same size, and process r computes every ``processes``-th of
    them from the r-th on; a part without an image is left out.

    Args:
        count: images in an epoch.
        batch_size: images a step, over all parts; the last batch of an epoch may be smaller.
        draws: give each image as a :class:`gist.data.Draw`, which :class:`gist.data.Augmented`
            takes, instead of its index.
        weights: of each image, its share of the draws; an epoch draws ``count`` images with
            replacement. None: an epoch takes each image once.
        lengths: of each text. A batch then takes texts of similar length: within each
            :data:`WINDOW` batches of the random order, texts are sorted by length, and the batches
            come in another random order. The last, smaller batch is left as drawn.
        fill: give every process as many parts, the missing ones with the batch's first image.

    Raises:
        ValueError: another number of weights or lengths than images.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        accumulate: int = 1,
        process: int = 0,
        processes: int = 1,
        draws: bool = False,
        weights: Sequence[float] | None = None,
        lengths: Sequence[int] | None = None,
        fill: bool = False,
    ) -> None:
        for name, given in (("weights", weights), ("lengths", lengths)):
            if given is not None and len(given) != count:
                raise ValueError(
                    f"{name} must have one number per image, {count:,}; they have {len(given):,}"
                )
        self.count, self.batch_size = count, batch_size
        self.accumulate, self.process, self.processes = accumulate, process, processes
        self.draws, self.fill = draws, fill
        self._weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self._lengths = None if lengths is None else torch.tensor(lengths)
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = 0
        self._parts: list[list[int] | list[Draw]] = []

    def __len__(self) -> int:
        """Number of steps in an epoch."""
        return -(-self.count // self.batch_size)

    def start(self, epoch: int, step: int = 0) -> list[Step]:
        """Go to an epoch, later than any before, and past its first ``step`` steps.

        Iterating then gives the images of each part of the steps that are returned."""
        while self._drawn < epoch:
            self._drawn += 1
            order = self._next_order()
        items: list[Any] = order.tolist()
        if self.draws:
            items = _draws(items, epoch)
        steps, self._parts = [], []
        for first in range(step * self.batch_size, self.count, self.batch_size):
            batch = items[first : first + self.batch_size]
            cut = torch.arange(len(batch)).tensor_split(self.accumulate * self.processes)
            own = [
                [batch[i] for i in part.tolist()]
                for part in cut[self.process :: self.processes]
                if len(part)
            ]
            most = -(-min(len(cut), len(batch)) // self.processes)  # the first process's
            fillers = most - len(own) if self.fill else 0
            self._parts += own + [batch[:1]] * fillers
            steps.append(Step(len(batch), len(own) + fillers, fillers))
        return steps

    def _next_order(self) -> torch.Tensor:
        """The items of one more epoch, whose batches are consecutive."""
        if self._weights is not None:
            order = torch.multinomial(
                self._weights, self.count, replacement=True, generator=self._generator
            )
        else:
            # The same draws, and so the same order, as DataLoader(shuffle=True).
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)
            order = torch.randperm(self.count, generator=self._generator)
            torch.randperm(self.count, generator=self._generator)
        return order if self._lengths is None else self._by_length(order, self._lengths)

    def _by_length(self, order: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        whole = self.count // self.batch_size
        drawn, rest = order.split([whole * self.batch_size, self.count % self.batch_size])
        windows = drawn.split(WINDOW * self.batch_size)
        in_order = torch.cat([window[lengths[window].argsort(stable=True)] for window in windows])
        shuffled = torch.randperm(whole, generator=self._generator)
        return torch.cat([in_order.view(whole, self.batch_size)[shuffled].flatten(), rest])

    def __iter__(self) -> Iterator[list[int] | list[Draw]]:
        return iter(self._parts)


def _draws(order: Sequence[int], epoch: int) -> list[Draw]:
    used: Counter[int] = Counter()
    draws = []
    for index in order:
        draws.append(Draw(index, epoch, used[index]))
        used[index] += 1
    return draws
