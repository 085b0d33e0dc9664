"""The earlier place of :mod:`gist.training`, for programs that import from it."""

from gist.training.config import TrainConfig
from gist.training.loop import Epoch, FitResult, fit

__all__ = ["Epoch", "FitResult", "TrainConfig", "fit"]
