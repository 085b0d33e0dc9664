"""What a training measured, epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """Measurements of a finished epoch; ``val_`` are None without validation images."""

    epoch: int
    train_loss: float
    val_accuracy: float | None
    val_loss: float | None
    train_seconds: float


@dataclass
class FitResult:
    """The history of a training.

    The model then holds the parameters of ``best_epoch``, which is the last one where there are no
    validation images.
    """

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int | None = None
    images_per_second: float = math.nan
    """Training throughput: images over the seconds spent in training steps."""
    interrupted: bool = False
    stopped_early: bool = False
    """Whether ``patience`` ended it before its last epoch."""
    seconds: float = 0.0
    """Time of all starts, with evaluation. A killed start counts up to its last save."""

    def stale_epochs(self) -> int:
        """Number of epochs since the first one of the best validation accuracy."""
        accuracies = [epoch.val_accuracy or 0.0 for epoch in self.history]
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
