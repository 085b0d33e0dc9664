"""The end of a training whose loss is not finite, or stays far above its start."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gist.training.config import TrainConfig
from gist.training.result import FitResult

FAR = 10.0
"""A loss this many times that of the start is far above it."""
IN_A_ROW = 20
"""Steps in a row far above the start that end a training: a spike passes sooner."""


class DivergedError(FloatingPointError):
    """A training diverged. The text names step, epoch, learning rate and what to try.

    Attributes:
        result: what was measured before. The model then holds the parameters of its best epoch.
    """

    result: FitResult

    def __str__(self) -> str:
        best = self.result.best_epoch if hasattr(self, "result") else None
        kept = "No epoch was finished." if best is None else f"Kept is epoch {best}, the best."
        return f"{super().__str__()} {kept}"


@dataclass
class LossWatch:
    """Raises at the step at which a training has diverged.

    The start is the first step's loss. It counts as at least log(classes), the cross-entropy of a
    guess: a classifier that came with the backbone may start at 0.

    Args:
        config: names the settings to change. A loss whose KL terms grow is only checked for being
            finite.
        classes: at least 2.
    """

    config: TrainConfig
    classes: int
    first: float | None = None
    high: int = 0

    def state(self) -> dict[str, float | int | None]:
        """The part of a training's state that :meth:`restore` takes."""
        return {"first": self.first, "high": self.high}

    def restore(self, state: dict[str, float | int | None]) -> None:
        self.first, self.high = state["first"], int(state["high"] or 0)

    def check(self, loss: float, step: int, epoch: int, lr: float) -> None:
        """Look at one step's loss, in order.

        Raises:
            DivergedError: it is not finite, or the last of :data:`IN_A_ROW` losses above
                :data:`FAR` times the start.
        """
        where = f"at step {step} (epoch {epoch}), with a learning rate of {lr:.3g}"
        if not math.isfinite(loss):
            if self.first is None:
                raise DivergedError(
                    f"the loss is {loss} {where}: it never was finite. Look for values that are "
                    "not finite in the images and in the weights."
                )
            raise DivergedError(f"the loss is {loss} {where}: the training diverged. {self._try()}")
        if self.first is None:
            self.first = loss
        far = FAR * max(self.first, math.log(self.classes))
        self.high = self.high + 1 if loss > far and not self.config.kl_warmup_epochs else 0
        if self.high >= IN_A_ROW:
            raise DivergedError(
                f"the loss is {loss:.4g} {where}, and was above {far:.3g} for {IN_A_ROW} steps in "
                f"a row; it started at {self.first:.3g}: the training diverged. {self._try()}"
            )

    def _try(self) -> str:
        config = self.config
        more = []
        if not config.clip_grad_norm:
            more.append("set clip_grad_norm to 1")
        if config.warmup_epochs < 1:
            more.append("set warmup_epochs to 1 or more")
        also = f" If that does not help, {' and '.join(more)}." if more else ""
        return f"Lower lr, to {config.lr / 10:.3g} for example.{also}"
