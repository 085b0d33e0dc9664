"""Advice for a run that trains but learns nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from gist.data import LabelledData
from gist.training.config import TrainConfig
from gist.training.result import Epoch

EPOCHS = 3
"""Epochs at the full learning rate, after the warm-up, before a run is judged."""
MOVED = 0.01
"""A training loss has moved if it fell by more than this share since the first epoch."""


class Advisor:
    """Follows a run's epochs, and advises once if the run has learned nothing.

    Args:
        data: the run's images.
        config: its schedule.
        advise: called with the advice.

    Attributes:
        advice: None as long as there is none.
    """

    def __init__(
        self, data: LabelledData, config: TrainConfig, advise: Callable[[str], None]
    ) -> None:
        self._data, self._config, self._advise = data, config, advise
        self._history: list[Epoch] = []
        self.advice: str | None = None

    def resumes(self, history: Sequence[Epoch]) -> None:
        """Take the epochs of earlier starts, which have been advised on."""
        self._history += history
        self.advice = unmoved(self._history, self._data, self._config)

    def epoch(self, epoch: Epoch) -> None:
        self._history.append(epoch)
        if self.advice is None:
            self.advice = unmoved(self._history, self._data, self._config)
            if self.advice is not None:
                self._advise(self.advice)


def unmoved(history: Sequence[Epoch], data: LabelledData, config: TrainConfig) -> str | None:
    """Advice if a run has learned nothing :data:`EPOCHS` epochs after its warm-up, else None.

    With validation images: no epoch so far got more of them right than naming their most frequent
    class does. Without: the training loss fell by no more than :data:`MOVED` since the first epoch,
    and is no lower than the entropy of the classes, which is the cross-entropy of a constant guess.
    """
    judged = math.ceil(config.warmup_epochs) + EPOCHS
    if len(history) < judged:
        return None
    accuracies = [e.val_accuracy for e in history[:judged] if e.val_accuracy is not None]
    if data.val is not None and accuracies:
        most = max(_shares(data.val.labels))
        if max(accuracies) > most:
            return None
        found = (
            f"no validation accuracy was above {most:.1%}, the share of the most frequent class, "
            f"in {judged} epochs"
        )
    else:
        first, last = history[0].train_loss, history[judged - 1].train_loss
        entropy = -sum(share * math.log(share) for share in _shares(data.train.labels))
        if last < first * (1 - MOVED) or last < entropy:
            return None
        found = f"the training loss was {first:.4g} in epoch 1 and {last:.4g} in epoch {judged}"
    return (
        f"{found}: nothing was learned. Try a learning rate 10 times as high "
        f"({10 * config.lr:.3g}) and one a tenth as high ({config.lr / 10:.3g}), or let gist tune "
        "search for one; check labels and weights."
    )


def _shares(labels: Sequence[int]) -> list[float]:
    """The share of each class that occurs."""
    return [count / len(labels) for count in Counter(labels).values()]
