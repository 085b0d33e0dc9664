"""CUDA graphs: replay a function's kernels instead of launching them again from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Calls before a capture: they compile and load binaries, and fill caches.
WARM_UP = 3


class CudaGraphed:
    """A function of tensors, captured in one CUDA graph per repeated kind of call.

    It must launch the same work whenever its tensors' shapes and its options are the same. Tensors
    it accumulates into, such as the parameters' ``grad``, must stay where they are. Random numbers
    are drawn again at each replay.

    Args:
        function: takes tensors and options by name, and returns a tensor on their device, which the
            next call overwrites.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function
        self._calls: dict[Any, int] = {}
        self._captured: dict[Any, tuple[Callable[[], None], torch.Tensor, Any]] = {}
        self._pool: Any = None

    def __call__(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        key = tuple((t.shape, t.dtype) for t in tensors), tuple(sorted(options.items()))
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls <= WARM_UP:
            return self._apart(*tensors, **options)
        if key not in self._captured:
            places = tuple(t.clone() for t in tensors)
            self._captured[key] = (*self._capture(places, options), places)
        replay, result, places = self._captured[key]
        for place, given in zip(places, tensors, strict=True):
            place.copy_(given)
        replay()
        return result

    def _apart(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        """Call the function on a side stream, as a capture does."""
        with torch.cuda.device(tensors[0].device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                result = self._function(*tensors, **options)
            current.wait_stream(side)
        return result

    def _capture(
        self, places: tuple[torch.Tensor, ...], options: dict[str, Any]
    ) -> tuple[Callable[[], None], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may pin a loader's batches meanwhile, which a global capture would forbid.
        captured = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with torch.cuda.device(places[0].device), captured:
            result = self._function(*places, **options)
        self._pool = graph.pool()  # graphs share memory: only one runs at a time
        return graph.replay, result
