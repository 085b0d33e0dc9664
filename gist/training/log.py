"""The log of a training, step by step: a CSV file, and TensorBoard or Weights & Biases if asked."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gist.files import naming, write_atomically

LOG_FILE = "log.csv"
WANDB_FILE = "wandb-id.txt"
TERMS = ("cls_cross_entropy", "gist_cross_entropy", "kl_cls_gist", "kl_gist_cls")
COLUMNS = ("step", "epoch", "lr", "loss", *TERMS)


class Log:
    """``log.csv`` with :data:`COLUMNS`: the step from 1, the epoch from 1, the first parameter
    group's learning rate, the loss and its four unweighted terms (empty where there are none).

    Args:
        directory: gets log.csv, and TensorBoard's files in ``tensorboard/``.
        every: steps between rows.
        tensorboard, wandb: write there too, in W&B to the project "gist".

    Raises:
        ImportError: a package that was asked for is missing; the text names it.
    """

    def __init__(
        self, directory: Path, *, every: int = 1, tensorboard: bool = False, wandb: bool = False
    ) -> None:
        if every < 1:
            raise ValueError(f"steps between rows of the log must be at least 1; they are {every}")
        self.directory, self.every = directory, every
        self._writer_type: Any = None
        self._wandb: Any = None
        self._file: Any = None
        self._writer: Any = None
        self._run: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "logging to TensorBoard needs: pip install tensorboard"
                ) from error
            self._writer_type = SummaryWriter
        if wandb:
            try:
                import wandb as package
            except ImportError as error:
                raise ImportError("logging to W&B needs: pip install wandb") from error
            self._wandb = package

    def start(self, step: int = 0) -> None:
        """Open the log. Keep the rows up to ``step`` and drop later ones."""
        path = self.directory / LOG_FILE
        rows = [",".join(COLUMNS)]
        if step and path.is_file():
            *whole, _ = path.read_text(encoding="utf-8").split("\n")  # a kill may cut the last row
            rows += [row for row in whole[1:] if int(row.split(",")[0]) <= step]
        write_atomically(path, "".join(row + "\n" for row in rows).encode())
        # Unbuffered, so that rows from before a saved state survive a kill after it.
        self._file = path.open("ab", buffering=0)
        if self._writer_type is not None:
            self._writer = self._writer_type(
                str(self.directory / "tensorboard"), purge_step=step + 1
            )
        if self._wandb is not None:
            known = self.directory / WANDB_FILE
            if not (step and known.is_file()):
                write_atomically(known, uuid.uuid4().hex.encode())
            self._run = self._wandb.init(
                project="gist",
                name=self.directory.name,
                dir=str(self.directory),
                id=known.read_text(encoding="utf-8"),
                resume="allow",
            )

    def step(self, step: int, epoch: int, lr: float, values: list[float]) -> None:
        """Log one step: the loss, or the loss and its terms."""
        if step % self.every:
            return
        named = dict(zip(COLUMNS[2:], [lr, *values], strict=False))
        cells = [str(step), str(epoch)]
        cells += [f"{named[name]:.9g}" if name in named else "" for name in COLUMNS[2:]]
        line = (",".join(cells) + "\n").encode()
        with naming(self.directory / LOG_FILE):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._scalars({f"train/{name}": value for name, value in named.items()}, step)

    def epoch(self, step: int, values: Mapping[str, float]) -> None:
        """Log the measurements of an epoch's end, but not to the CSV: results.json has them."""
        self._scalars({f"val/{name}": value for name, value in values.items()}, step)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        for opened, end in ((self._file, "close"), (self._writer, "close"), (self._run, "finish")):
            if opened is not None:
                getattr(opened, end)()
        self._file = self._writer = self._run = None
