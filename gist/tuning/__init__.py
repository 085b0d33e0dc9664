"""Search of a run's settings on validation images: the space, the study on disk, the trials."""

from gist.tuning.result import Trial, Tuned
from gist.tuning.search import tune
from gist.tuning.space import Candidate, Space

__all__ = ["Candidate", "Space", "Trial", "Tuned", "tune"]
