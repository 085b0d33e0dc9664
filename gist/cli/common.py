"""What several commands share: the console, options, and the progress bar of a run."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gist.backbones import hf_folder
from gist.methods import Method, method_type
from gist.model.config import GistConfig
from gist.model.describe import count_parameters
from gist.model.loss import GistLoss
from gist.model.wrapped import GistModel
from gist.runs.run import Listener
from gist.training.loop import Epoch


class _Console(Console):
    """A console that prints names as they are, and leaves a closed pipe to :func:`main`."""

    def __init__(self, *, stderr: bool = False) -> None:
        # A name may hold brackets or colons, which are markup and emoji to rich.
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = _Console()
to_stderr = _Console(stderr=True)


def add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    """Add a command to a parser's sub-parsers; ``function`` runs it."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=function)
    return parser


def add_gist_options(group: Any) -> None:
    """Add the settings of the method, the Gist token and the loss."""
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                       help="a setting of the method, such as rank=8")  # fmt: skip
    group.add_argument("--gist", action=argparse.BooleanOptionalAction, default=True,
                       help="add the Gist token and its interaction")  # fmt: skip
    group.add_argument("--token-dropout", type=float, default=0.1)
    group.add_argument("--num-tokens", type=int, default=1, help="Gist tokens")
    group.add_argument("--loss", action="append", default=[], metavar="KEY=VALUE",
                       help="a setting of the loss, such as kl_weights=[0.75,0]")  # fmt: skip


def add_device_options(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default here: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")


def model_label(name: str) -> str:
    """A model's name as part of a folder's name; of a folder's path, the last part."""
    folder = name.removeprefix(hf_folder.PREFIX)
    is_folder = folder != name or Path(folder).is_absolute()
    return Path(folder).resolve().name if is_folder else name


def warn_passed_over(paths: Sequence[Path], shown: int = 3) -> None:
    """One line that counts the files that were found but not used, and names the first."""
    if paths and not console.quiet:
        names = ", ".join(map(str, paths[:shown])) + (", ..." if len(paths) > shown else "")
        to_stderr.print(
            f"warning: {len(paths):,} passed over, not taken as images of a class: {names}",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def gist_config_of(arguments: argparse.Namespace, token_init: str = "uniform") -> GistConfig:
    """The config that ``--method`` and the options of :func:`add_gist_options` describe."""
    return GistConfig(
        method=method_of(arguments.method, arguments.set),
        gist=arguments.gist,
        token_dropout=arguments.token_dropout,
        num_tokens=arguments.num_tokens,
        token_init=token_init,  # named, as in earlier records
    )


def method_of(names: str, settings: Sequence[str]) -> Sequence[Method]:
    """Methods' configs from names joined by +; KEY=VALUE settings are for a single method."""
    if names == "none":
        if settings:
            raise ValueError("--set has no meaning with --method none")
        return ()
    kinds = [method_type(name) for name in names.split("+")]
    if settings and len(kinds) > 1:
        raise ValueError("--set has no meaning with several methods")
    values = settings_of("--set", settings, [f.name for f in fields(kinds[0])])
    return [kind(**values) for kind in kinds]


def loss_of(settings: Sequence[str]) -> dict[str, Any]:
    """Checked arguments of GistLoss from KEY=VALUE settings."""
    values = settings_of("--loss", settings, list(inspect.signature(GistLoss).parameters))
    GistLoss(**values)
    return values


def settings_of(option: str, settings: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value that is not JSON is a string."""
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{option} {setting!r}: not KEY=VALUE with KEY of {', '.join(known)}")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


class RunProgress(Listener):
    """A progress bar over a run's steps, with the loss and the last validation accuracy."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  val {task.fields[val]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def notes(self, text: str) -> None:
        console.print(f"{self._name}: {text}", highlight=False)

    def starts(self, model: GistModel, steps: int) -> None:
        console.print(f"{self._name}: {count_parameters(model)}", highlight=False)
        self._task = self._progress.add_task(self._name, total=steps, loss=float("nan"), val="-")

    def resumes(self, step: int, history: Sequence[Epoch]) -> None:
        console.print(f"{self._name}: resumes after step {step}", highlight=False)
        # Not an update, which would count the earlier steps into the speed.
        self._progress.reset(self._task, completed=step)
        for epoch in history[-1:]:
            self.epoch(epoch)

    def step(self, step: int, loss: float) -> None:
        self._progress.update(self._task, completed=step, loss=loss)

    def advises(self, advice: str) -> None:
        if not console.quiet:
            text = f"warning: {self._name}: {advice}"
            to_stderr.print(text, style="yellow", highlight=False, soft_wrap=True)

    def epoch(self, epoch: Epoch) -> None:
        if epoch.val_accuracy is not None:
            self._progress.update(self._task, val=f"{epoch.val_accuracy:.1%}")
