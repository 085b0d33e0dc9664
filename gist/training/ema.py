"""The exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gist.model.wrapped import GistModel


class Ema:
    """``average = decay * average + (1 - decay) * parameter`` of the trainables alone.

    Starts at their values when made; the frozen backbone is not copied.
    """

    def __init__(self, model: GistModel, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = {name: p.clone() for name, p in model.trainable_state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.model.trainable_state_dict().items():
            self.average[name].lerp_(parameter, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages within, and its own parameters again after."""
        own = {name: p.clone() for name, p in self.model.trainable_state_dict().items()}
        self.model.load_state_dict(self.average, strict=False)
        try:
            yield
        finally:
            self.model.load_state_dict(own, strict=False)
