"""What a search found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gist.tuning.space import Candidate

STATES = ("complete", "pruned", "diverged", "unfinished", "abandoned")


@dataclass(frozen=True)
class Trial:
    """One candidate's training.

    Attributes:
        number: from 0.
        state: "complete"; "pruned" by successive halving; "diverged"; "unfinished", which the next
            call resumes; or "abandoned", which ended its process again and again.
        candidate: None if the process ended before all settings were drawn.
        epochs: number of finished ones.
        best_epoch, val_accuracy, val_loss: of the best finished epoch; None without one.
        seconds: training and evaluation, over all starts.
        folder: the run's, below the search's own.
    """

    number: int
    state: str
    candidate: Candidate | None
    epochs: int
    best_epoch: int | None
    val_accuracy: float | None
    val_loss: float | None
    seconds: float
    folder: str

    def rank(self) -> tuple[float, float]:
        """The larger the better: by accuracy, then by loss."""
        if self.val_accuracy is None or self.val_loss is None:
            return -1.0, 0.0
        return self.val_accuracy, -self.val_loss


@dataclass(frozen=True)
class Tuned:
    """All trials of a search, those of earlier calls included."""

    trials: Sequence[Trial]

    @property
    def best(self) -> Trial | None:
        """The best complete trial; without one, the best trial with a finished epoch, or None."""
        measured = [t for t in self.trials if t.candidate is not None and t.epochs]
        complete = [t for t in measured if t.state == "complete"]
        return max(complete or measured, key=Trial.rank, default=None)

    @property
    def seconds(self) -> float:
        return sum(trial.seconds for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        best = self.best
        return {
            "best": None if best is None else best.number,
            "seconds": self.seconds,
            "trials": [asdict(trial) for trial in self.trials],
        }
