"""``gist tune``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from gist.cli.common import (
    RunProgress,
    add_command,
    console,
    method_of,
    model_label,
)
from gist.cli.results import show
from gist.cli.train import add_options, config_of, read_data
from gist.methods import METHODS as ALL_METHODS
from gist.runs.run import AnyConfig, Listener, run
from gist.training.config import TrainConfig
from gist.tuning import Candidate, Space, Trial, Tuned, tune
from gist.tuning.search import TUNED_FILE
from gist.tuning.space import METHODS

MINUTES = 30.0
BEST = "best"


def register(commands: Any) -> None:
    """Add the command to the parser of ``gist``."""
    parser = add_command(
        commands, "tune", _tune,
        "search learning rate, weight decay and method for the best validation accuracy",
    )  # fmt: skip
    add_options(parser)
    parser.conflict_handler = "resolve"  # these replace the training's options
    group = parser.add_argument_group("what to search; one value each is not searched")
    group.add_argument("--lr", type=float, nargs="+", metavar="RATE",
                       help="lowest and highest peak learning rate, or one. "
                       "Default: 1e-4 1e-1")  # fmt: skip
    group.add_argument("--weight-decay", type=float, nargs="+", metavar="DECAY",
                       help="lowest and highest weight decay, or one. "
                       "Default: 1e-6 1e-1")  # fmt: skip
    group.add_argument("--method", nargs="+", metavar="METHOD",
                       help=f"candidates: {', '.join(ALL_METHODS)}, several joined by +, or none "
                       f"(head only). Default: {' '.join(METHODS)}, where they fit the model. "
                       "Rank, scale, alpha and number of tokens are searched too")  # fmt: skip
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                       help="a setting of the only method, which is then not searched")  # fmt: skip
    group = parser.add_argument_group("how long to search")
    group.add_argument("--minutes", type=float,
                       help="of all starts together. "
                       f"Default: {MINUTES:g}, or no limit with --trials")  # fmt: skip
    group.add_argument("--trials", type=int, metavar="N", help="end after N trials")
    group.add_argument("--train-best", action="store_true",
                       help="train the best settings at the end, and test them: "
                       f"OUT/{BEST}")  # fmt: skip


def _tune(arguments: argparse.Namespace) -> None:
    if arguments.minutes is None and arguments.trials is None:
        arguments.minutes = MINUTES
    config, space = _searched(arguments)
    data = read_data(config, check=not arguments.no_check)
    model = model_label(config.model)
    out = arguments.out or Path("runs", f"tune-{data.name}-{model}")
    options = {
        "device": arguments.device,
        "workers": arguments.workers,
        "save_every": arguments.save_every,
    }
    tuned = tune(
        config,
        data,
        out,
        space=space,
        minutes=arguments.minutes,
        trials=arguments.trials,
        listener=_heard,
        on_trial=_say_trial,
        **options,
    )
    console.print(_table(tuned, f"{data.name}, {model}"))
    best = tuned.best
    console.print(f"Trials: {out / 'trials'}, and in {out / TUNED_FILE}", soft_wrap=True)
    if best is None:
        console.print(
            "No trial finished an epoch in this time. Repeat the command with more --minutes, or "
            "tune into another --out with fewer --epochs.",
            style="yellow",
        )
        return
    assert best.candidate is not None
    if best.state != "complete":
        console.print(
            f"No trial is complete. Trial {best.number} is {best.state} after epoch {best.epochs}; "
            "more --minutes continue the search.",
            style="yellow",
        )
    console.print(f"Best: trial {best.number}, {_accuracy(best)} on validation images. Train it:")
    command = train_command(arguments, best.candidate, out / BEST)
    console.print(f"    {shlex.join(command)}", highlight=False, soft_wrap=True)
    if arguments.train_best:
        with RunProgress(BEST) as progress:
            results = run(
                best.candidate.apply(config), data, out / BEST, listener=progress, **options
            )
        show({BEST: results}, out / BEST, f"{data.name}, {model}")


def _searched(arguments: argparse.Namespace) -> tuple[AnyConfig, Space]:
    """The config of what is not searched, and the space. Leaves the options of ``gist train``."""
    limits: dict[str, Any] = {}
    for name in ("lr", "weight_decay"):
        given, option = getattr(arguments, name), "--" + name.replace("_", "-")
        if given is not None and len(given) > 2:
            raise ValueError(f"{option} takes one value, or the lowest and the highest")
        if given is None or len(given) == 2:
            setattr(arguments, name, getattr(TrainConfig, name))
            if given is not None:
                limits[name] = tuple(given)
        else:
            setattr(arguments, name, given[0])
            limits[name] = None
    given = arguments.method
    names = tuple(given or METHODS)
    arguments.method = names[0]
    if arguments.set and len(names) > 1:
        raise ValueError("--set needs one --method, whose setting it fixes")
    fixed: dict[str, Any] = {}
    if arguments.set:
        (method,) = method_of(names[0], arguments.set)
        keys = [setting.partition("=")[0] for setting in arguments.set]
        fixed = {key: getattr(method, key) for key in keys}
    config = config_of(arguments)
    if given is None:
        names = _fitting(config, names)
    return config, Space(methods=names, fixed=fixed, **limits)


def _fitting(config: AnyConfig, names: Sequence[str]) -> tuple[str, ...]:
    """The methods that the config's backbone takes. Where it takes none, a refusal is raised."""
    refusal: ValueError | None = None
    fitting = []
    for name in names:
        try:
            Space(methods=(name,)).check(config)
        except ValueError as error:
            refusal = error
        else:
            fitting.append(name)
    if not fitting and refusal is not None:
        raise refusal
    return tuple(fitting)


def train_command(arguments: argparse.Namespace, candidate: Candidate, out: Path) -> list[str]:
    """The words of the ``gist train`` that trains a candidate as its trial was.

    Options at their defaults are left out.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    settings = [f"{key}={value}" for key, value in candidate.settings.items()]
    searched = {"lr": candidate.lr, "weight_decay": candidate.weight_decay}
    chosen = {**searched, "method": candidate.method, "set": settings, "out": str(out)}
    values = {**vars(arguments), **chosen}
    words = ["gist", "train"]
    for action in parser._actions:
        value, name = values[action.dest], action.option_strings[0]
        if value == action.default and action.dest not in chosen:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            words.append(name if value else action.option_strings[1])
        elif action.nargs == 0:
            words.append(name)
        else:
            for each in value if isinstance(value, list) else [value]:
                dashed = str(each).startswith("-")
                words += [f"{name}={each}"] if dashed else [name, str(each)]
    return words


@contextmanager
def _heard(number: int, candidate: Candidate) -> Iterator[Listener]:
    method, lr, decay = _columns(candidate)
    console.print(
        f"trial {number}: {method}, lr {lr}, weight decay {decay}", highlight=False, soft_wrap=True
    )
    with RunProgress(f"trial {number}") as progress:
        yield progress


def _columns(candidate: Candidate) -> tuple[str, str, str]:
    """Method with its settings, learning rate and weight decay."""
    settings = (f"{key}={value}" for key, value in candidate.settings.items())
    method = " ".join((candidate.method, *settings))
    return method, f"{candidate.lr:g}", f"{candidate.weight_decay:g}"


def _say_trial(trial: Trial) -> None:
    console.print(
        f"trial {trial.number}: {_accuracy(trial)}, {trial.state} after epoch {trial.epochs}, "
        f"{trial.seconds:.0f} s",
        highlight=False,
    )


def _accuracy(trial: Trial) -> str:
    return "-" if trial.val_accuracy is None else f"{trial.val_accuracy:.1%}"


def _table(tuned: Tuned, title: str) -> Table:
    """One row a trial, those that were trained to the end first, the best on top."""
    table = Table(title=title)
    for heading in ("trial", "val", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    table.add_column("method", overflow="fold")
    for heading in ("lr", "decay", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in sorted(
        tuned.trials, key=lambda t: (t.state == "complete", t.rank()), reverse=True
    ):
        candidate = trial.candidate
        table.add_row(
            str(trial.number),
            _accuracy(trial),
            str(trial.epochs),
            trial.state,
            *(_columns(candidate) if candidate is not None else ("-", "-", "-")),
            f"{trial.seconds:.0f} s",
        )
    return table
