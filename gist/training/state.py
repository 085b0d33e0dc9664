"""Training state on disk, so that a killed run can resume."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gist.files import write_atomically

FORMAT = 1


class ResumeFile:
    """A file, replaced as a whole: a kill or a full disk during a save leaves the earlier state.

    Args:
        path: the file.
        identity: JSON values that decide the training's outcome. A state with another identity is
            not resumed.
        every: steps between saves, beside the one at each epoch's end; 0 for none.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, every: int = 0) -> None:
        if every < 0:
            raise ValueError(f"steps between saves must be at least 0; they are {every}")
        self.path, self.every = path, every
        self.identity = json.loads(json.dumps(identity))

    def save(self, state: Mapping[str, Any]) -> None:
        """Write tensors, numbers, strings, lists, tuples and dicts of them.

        Raises:
            OSError: it could not be written, with the file's name; the state saved before is kept.
        """
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "identity": self.identity, **state}, buffer)
        write_atomically(self.path, buffer.getvalue())

    def load(self) -> dict[str, Any] | None:
        """The last saved state, on the CPU; None without a file.

        Raises:
            FileExistsError: it is another training's.
            ValueError: not a file that this version wrote.
        """
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["format"] != FORMAT:
                raise ValueError(f"its format is {state['format']!r}")
        except (RuntimeError, ValueError, LookupError, EOFError, pickle.PickleError) as error:
            raise ValueError(
                f"{self.path} is not a training's state that this version reads; delete it to "
                f"start again ({error})"
            ) from error
        check_same(self.identity, state["identity"], self.path)
        return state

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def check_same(
    ours: Mapping[str, Any], found: Mapping[str, Any], where: Path, what: str = "run"
) -> None:
    """Raise FileExistsError where ``found`` at ``where`` describes another run than ``ours``."""
    differing = sorted(k for k in ours.keys() | found.keys() if ours.get(k) != found.get(k))
    if differing:
        raise FileExistsError(
            f"{where} holds another {what} (it differs in {', '.join(differing)}); "
            "choose another folder, or delete it"
        )


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's global generators, as :meth:`ResumeFile.save` takes them."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
