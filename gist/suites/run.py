"""Run a suite: select, retrain and test once for each task and seed of one variant.

A variant's folder gets ``<task>/seed<k>/vtab.json`` and, beside it, the folders of the runs that
led to it (see :mod:`gist.runs.run`). Finished runs are not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from gist.data import LabelledData
from gist.files import write_json
from gist.model.config import GistConfig
from gist.runs.run import Listener, RunConfig, run
from gist.runs.text import TextRunConfig
from gist.suites.tasks import Suite, Task
from gist.suites.vtab_layout import Stages
from gist.training.config import TrainConfig
from gist.validate import check_choice

RECORD_FILE = "vtab.json"
# The keys of a run's results that are its course, not its circumstances.
COURSE = {"config", "complete", "reused", "fit", "splits", "val_accuracy", "test", "seconds"}
T = TypeVar("T")
Record = dict[str, Any]
Runs = Sequence[RunConfig | TextRunConfig]
RECIPES = ("clean", "released")
STOPS = ("best", "end")


@dataclass(frozen=True)
class Plan:
    """Everything that decides a suite's outcome, except data, seeds and machine.

    None is the suite's or the task's own setting.

    Args:
        suite: tasks and shared settings.
        gist: what to train.
        recipe: "clean": 800 images train, the 200 of val choose learning rate and epoch, then all
            1,000 train and the test images are used once. "released": all 1,000 train, and the best
            epoch *on the test images* is reported, as the released code does.
        select_on_test: must be True for "released", whose results are optimistic by design.
        stop: of clean's second training, which follows the schedule of the first. "best": after the
            epoch that was best on val. "end": never; with one learning rate nothing is selected
            then, and val takes no part.
        lr: candidates; the best on val is used, by accuracy, then by loss.
        model, weights, pretrained, img_size: as :class:`gist.runs.run.RunConfig`. The suite's
            size goes with its own model; another has its own.
        warmup_epochs: None: the suite's share of the epochs.
        augment: as :class:`gist.runs.run.RunConfig`; None for "vtab". Of images only.
        loss: as :class:`gist.runs.run.RunConfig`.
    """

    suite: Suite
    gist: GistConfig = field(default_factory=GistConfig)
    recipe: str = "clean"
    select_on_test: bool = False
    stop: str = "best"
    model: str | None = None
    weights: str | None = None
    pretrained: bool = False
    img_size: int | None = None
    epochs: int | None = None
    warmup_epochs: float | None = None
    batch_size: int | None = None
    lr: tuple[float, ...] | None = None
    weight_decay: float | None = None
    drop_path: float | None = None
    precision: str = "fp32"
    augment: str | None = None
    loss: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("recipe", RECIPES), ("stop", STOPS)):
            check_choice(name, getattr(self, name), known)
        if self.lr is not None and not self.lr:
            raise ValueError("lr must have at least one value")
        if self.recipe == "released":
            if not self.select_on_test:
                raise ValueError(
                    "recipe 'released' reports the epoch that is best on the test images, which "
                    "makes results optimistic; say so with --select-on-test, or use 'clean'"
                )
            if self.lr is not None and len(self.lr) > 1:
                raise ValueError("recipe 'released' takes one lr: it would be chosen on test too")
        elif self.select_on_test:
            raise ValueError("select_on_test has a meaning with recipe 'released' only")
        for name in ("weights", "img_size", "drop_path", "augment") if self.suite.text else ():
            if getattr(self, name):
                raise ValueError(f"{name} is for images; suite {self.suite.name} has texts")

    def runs(self, task: Task, seed: int) -> Runs:
        """The runs of one task and seed, one for each candidate learning rate."""
        suite = self.suite
        own = self.model in (None, suite.model)
        epochs = suite.epochs if self.epochs is None else self.epochs
        share = suite.warmup_epochs / suite.epochs
        train = TrainConfig(
            epochs=epochs,
            batch_size=_or(self.batch_size, suite.batch_size),
            weight_decay=_or(self.weight_decay, task.weight_decay),
            warmup_epochs=_or(self.warmup_epochs, share * epochs),
            warmup_lr=suite.warmup_lr,
            min_lr=suite.min_lr,
            precision=self.precision,
            seed=seed,
        )
        rates = _or(self.lr, (task.lr,))
        if suite.text is not None:
            return [
                TextRunConfig(
                    data=f"{suite.name}/{task.name}",
                    model=_or(self.model, suite.model),
                    gist=self.gist,
                    train=replace(train, lr=lr, head_lr=suite.text.head_lr),
                    pretrained=self.pretrained,
                    max_length=suite.text.max_length,
                    loss=self.loss,
                )
                for lr in rates
            ]
        return [
            RunConfig(
                data=f"{suite.name}/{task.name}",
                model=_or(self.model, suite.model),
                gist=self.gist,
                train=replace(train, lr=lr),
                weights=self.weights,
                pretrained=self.pretrained,
                img_size=self.img_size or (suite.img_size if own else None),
                drop_path=_or(self.drop_path, task.drop_path),
                augment=_or(self.augment, "vtab"),
                loss=self.loss,
            )
            for lr in rates
        ]


def _or(given: T | None, default: T) -> T:
    return default if given is None else given


def run_suite(
    plan: Plan,
    tasks: Sequence[Task],
    load: Callable[[Task], Stages],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    workers: int = 0,
    listener: Callable[[str], AbstractContextManager[Listener]] | None = None,
    on_record: Callable[[Record, bool], None] | None = None,
) -> list[Record]:
    """Run every task with every seed; returns their records, those of earlier calls included.

    Args:
        plan: what to do.
        tasks: of ``plan.suite``.
        load: returns a task's images or texts.
        out: the variant's folder.
        listener: called with the title of each training; returns a context whose value is the
            training's :class:`gist.runs.run.Listener`.
        on_record: called with each record, and whether it was there already.

    Raises:
        FileExistsError: ``out`` has a finished task and seed of another plan or of other images.
        DataError: images that can't be used.
        KeyboardInterrupt: Ctrl-C. What is finished is kept; the same call resumes.
    """
    records = []
    for task in tasks:
        stages = load(task)
        for seed in seeds:
            folder = out / task.name / f"seed{seed}"
            config = _describe(plan, task, seed, stages)
            record = read_record(folder)
            there = record is not None
            if record is None:
                training = _TaskRuns(folder, f"{task.name}, seed {seed}", device, workers, listener)
                recipe = _released if plan.recipe == "released" else _clean
                record = {"config": config, **recipe(plan, plan.runs(task, seed), stages, training)}
                if _is_first_process():
                    write_json(folder / RECORD_FILE, record)
            elif record["config"] != config:
                keys = sorted(k for k in config if record["config"].get(k) != config[k])
                raise FileExistsError(
                    f"{folder} holds another result (it differs in {', '.join(keys)}); choose "
                    "another --out, or delete it"
                )
            records.append(record)
            if on_record is not None:
                on_record(record, there)
    return records


def read_record(folder: Path) -> Record | None:
    """The record in the folder of a task and seed; None before it is finished."""
    path = folder / RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _is_first_process() -> bool:
    """Whether this is the process that writes, among those of a launcher."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


def _describe(plan: Plan, task: Task, seed: int, stages: Stages) -> Record:
    """Everything that decides a record, as JSON reads it back."""
    runs = plan.runs(task, seed)
    described = runs[0].to_dict()
    train = described.pop("train")
    own = {  # each task's own settings; all others belong to a column
        "lr": [config.train.lr for config in runs],
        "weight_decay": train.pop("weight_decay"),
        "data_fingerprint": stages.final.fingerprint,
    }
    if "drop_path" in described:
        own["drop_path"] = described.pop("drop_path")
    for key in ("lr", "seed", "stop_after", "cuda_graph"):
        del train[key]
    del described["data"]
    identity = {"suite": plan.suite.name, "task": task.name, "group": task.group, "seed": seed}
    recipe = {"recipe": plan.recipe, "stop": plan.stop if plan.recipe == "clean" else None}
    return json.loads(
        json.dumps({**identity, **recipe, **described, "train": train, "task_settings": own})
    )


@dataclass(frozen=True)
class _TaskRuns:
    """The runs of one task and seed, each in a sub-folder."""

    folder: Path
    title: str
    device: str
    workers: int
    listener: Callable[[str], AbstractContextManager[Listener]] | None

    def run(self, config: RunConfig | TextRunConfig, data: LabelledData, name: str) -> Record:
        """A run's results."""
        heard = self.listener(f"{self.title}, {name}") if self.listener else nullcontext()
        with heard as listener:
            return run(
                config,
                data,
                self.folder / name,
                device=self.device,
                workers=self.workers,
                listener=listener,
            )


def _clean(plan: Plan, runs: Runs, stages: Stages, training: _TaskRuns) -> Record:
    candidates = []
    for config in runs if plan.stop == "best" or len(runs) > 1 else ():
        lr = config.train.lr
        results = training.run(config, stages.select, f"select-lr{lr:g}")
        history = results["fit"]["history"]
        kept = history[results["fit"]["best_epoch"] - 1] if plan.stop == "best" else history[-1]
        measured = {key: kept[key] for key in ("epoch", "val_accuracy", "val_loss")}
        candidates.append({"lr": lr, **measured, "seconds": results["seconds"]})
    selected: Record = {"lr": runs[0].train.lr, "epoch": runs[0].train.epochs}
    if candidates:
        best = max(candidates, key=lambda c: (c["val_accuracy"], -c["val_loss"]))
        selected = {key: best[key] for key in selected}
    config = next(c for c in runs if c.train.lr == selected["lr"])
    config = replace(config, train=replace(config.train, stop_after=selected["epoch"]))
    results = training.run(config, stages.final, "final")
    return {
        "selection": {"on": "val" if candidates else None, **selected, "candidates": candidates},
        "test": results["test"],
        "images_per_second": results["fit"]["images_per_second"],
        "seconds": results["seconds"] + sum(c["seconds"] for c in candidates),
        **_circumstances(results),
    }


def _circumstances(results: Record) -> Record:
    return {key: value for key, value in results.items() if key not in COURSE}


def _released(plan: Plan, runs: Runs, stages: Stages, training: _TaskRuns) -> Record:
    test = stages.final.test
    assert test is not None
    on_test = replace(stages.final, val=test, test=None)
    results = training.run(runs[0], on_test, "epoch-chosen-on-test")
    best = results["fit"]["history"][results["fit"]["best_epoch"] - 1]
    measured = {"accuracy": best["val_accuracy"], "loss": best["val_loss"], "images": len(test)}
    return {
        "selection": {"on": "test", "lr": runs[0].train.lr, "epoch": best["epoch"]},
        "test": measured,
        "images_per_second": results["fit"]["images_per_second"],
        "seconds": results["seconds"],
        **_circumstances(results),
    }
