"""The exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gist.model.wrapped import GistModel


class Ema:
    """``average = decay * average + (1 - decay) * parameter`` of the trained parameters.

    The average starts at their current values. The frozen backbone is not copied.
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
        """Inside, the model holds the averages; afterwards its own parameters again."""
        own = {name: p.clone() for name, p in self.model.trainable_state_dict().items()}
        self.model.load_state_dict(self.average, strict=False)
        try:
            yield
        finally:
            self.model.load_state_dict(own, strict=False)
