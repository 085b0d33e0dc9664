"""CUDA graphs: replay a function's kernels instead of launching them again from Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from gist.training.state import rng_state, set_rng_state

# Calls before a capture: they compile and load binaries, and fill caches.
WARM_UP = 3
# Graphs at most: each keeps its activations' addresses, and a capture takes as long as some steps.
MOST = 8


def graphed(
    function: Callable[..., torch.Tensor],
    accumulated: Callable[[], Iterable[torch.Tensor]],
    processes: int,
) -> CudaGraphed | None:
    """The function by CUDA graphs; None, with a warning, in one of several processes: captures
    beside their communication are not tested."""
    if processes > 1:
        _warn(f"steps: these are {processes} processes")
        return None
    return CudaGraphed(function, accumulated)


class CudaGraphed:
    """A function of tensors, captured in one CUDA graph per repeated kind of call.

    It must launch the same work whenever its tensors' shapes and its options are the same. Tensors
    it accumulates into, such as the parameters' ``grad``, must stay where they are. Random numbers
    are drawn again at each replay.

    What can't be captured is called as if without graphs, and a warning says so once: all calls
    after one whose capture failed, and calls of new kinds after ``MOST`` graphs. A failed capture
    leaves generators and ``accumulated`` as they were before.

    Args:
        function: takes tensors and options by name, and returns a tensor on their device, which the
            next call overwrites.
        accumulated: returns the tensors that the function adds to.
    """

    failed = False
    """Whether a capture has failed; no call is replayed from then on."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        accumulated: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> None:
        self._function = function
        self._accumulated = accumulated
        self._calls: dict[Any, int] = {}
        self._captured: dict[Any, tuple[Callable[[], None], torch.Tensor, Any]] = {}
        self._pool: Any = None
        self._full = False

    def __call__(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        if self.failed:
            return self._function(*tensors, **options)
        key = tuple((t.shape, t.dtype) for t in tensors), tuple(sorted(options.items()))
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls <= WARM_UP:
            return self._apart(*tensors, **options)
        if key not in self._captured and not self._try_capture(key, tensors, options):
            return self._function(*tensors, **options)
        replay, result, places = self._captured[key]
        for place, given in zip(places, tensors, strict=True):
            place.copy_(given)
        replay()
        return result

    def _try_capture(
        self, key: Any, tensors: tuple[torch.Tensor, ...], options: dict[str, Any]
    ) -> bool:
        if len(self._captured) == MOST:
            if not self._full:
                _warn(f"batches of other kinds than the first {MOST} (by shape and share)")
            self._full = True
            return False
        before = _State(tensors[0].device, self._accumulated())
        try:
            places = tuple(t.clone() for t in tensors)
            self._captured[key] = (*self._capture(places, options), places)
        except Exception as error:  # of any type: that of what the function does
            # Earlier graphs draw from the generator that the failed capture was given.
            self.failed, self._captured, self._pool = True, {}, None
            before.restore()
            _warn(f"steps: a capture failed ({type(error).__name__}: {error})")
        return not self.failed

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


class _State:
    """What a failed capture may have changed, though none of its kernels ran."""

    def __init__(self, device: torch.device, accumulated: Iterable[torch.Tensor]) -> None:
        self._device = device
        self._random = rng_state(device)
        self._tensors = [(tensor, tensor.clone()) for tensor in accumulated]
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._generator = _generator(device).clone_state()

    def restore(self) -> None:
        if self._device.type == "cuda":
            # torch.cuda.graph leaves its stream current if the capture's end raises, and the
            # generator in a state that refuses draws outside of a capture.
            torch.cuda.set_stream(self._stream)
            _generator(self._device).graphsafe_set_state(self._generator)
        set_rng_state(self._random, self._device)
        for tensor, before in self._tensors:
            tensor.copy_(before)


def _generator(device: torch.device) -> torch.Generator:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _warn(what: str) -> None:
    warnings.warn(
        f"no CUDA graph replays {what}; Python launches each of their kernels. "
        "The results are the same, and --no-cuda-graph turns graphs off",
        stacklevel=2,
    )
