"""The earlier place of :mod:`gist.training.evaluation`, for programs that import from it."""

from gist.training.evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
