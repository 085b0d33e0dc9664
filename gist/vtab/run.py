"""Running a suite: each task and seed of one variant is selected, retrained and tested once.

A variant's folder gets ``<task>/seed<k>/vtab.json`` and, beside it, the folders of the runs that
led to it (see :mod:`gist.run`). What is finished is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.data import resolve_model_data_config

from gist.checkpoint import save
from gist.config import GistConfig
from gist.data import ImageData, prepare
from gist.model import GistModel, count_parameters
from gist.provenance import describe_machine, git_revision, versions
from gist.run import RESULTS_FILE, RESUME_FILE, Listener, RunConfig, run, write_json
from gist.train import Epoch, TrainConfig, evaluate
from gist.vtab.layout import Stages
from gist.vtab.tasks import Suite, Task

RECORD_FILE = "vtab.json"
# What of a run's results is its course, not its circumstances.
COURSE = {"config", "complete", "reused", "fit", "val_accuracy", "test", "seconds"}
T = TypeVar("T")
Record = dict[str, Any]
RECIPES = ("clean", "released")
STOPS = ("best", "end")


@dataclass(frozen=True)
class Plan:
    """All that decides a suite's outcome, apart from data, seeds and machine.

    None stands for the suite's or the task's own setting.

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
        model, weights, pretrained, img_size: as :class:`gist.run.RunConfig`. The suite's
            size goes with its own model; another has its own.
        warmup_epochs: None: the suite's share of the epochs.
        loss: as :class:`gist.run.RunConfig`.
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
    loss: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("recipe", RECIPES), ("stop", STOPS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; it is {getattr(self, name)!r}"
                )
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

    def runs(self, task: Task, seed: int) -> list[RunConfig]:
        """What to train for one task and seed, a config for each candidate learning rate."""
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
                loss=self.loss,
            )
            for lr in _or(self.lr, (task.lr,))
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
        load: gives a task's images.
        out: the variant's folder.
        listener: called with the title of each training; gives a context with what hears of it.
        on_record: called with each record, and whether it was there already.

    Raises:
        FileExistsError: ``out`` has a finished task and seed of another plan or of other images.
        DataError: images that can't be used.
        KeyboardInterrupt: Ctrl-C. What is finished is kept; the same call goes on from there.
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
                training = _Training(folder, f"{task.name}, seed {seed}", device, workers, listener)
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
    """What a finished task and seed left in its folder, or None."""
    path = folder / RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _is_first_process() -> bool:
    """The one that writes, of those that a launcher started."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


def _describe(plan: Plan, task: Task, seed: int, stages: Stages) -> Record:
    """All that decides a record, as it is read back."""
    runs = plan.runs(task, seed)
    described = runs[0].to_dict()
    train = described.pop("train")
    own = {  # what each task may have of its own; all else is a column's
        "lr": [config.train.lr for config in runs],
        "weight_decay": train.pop("weight_decay"),
        "drop_path": described.pop("drop_path"),
        "data_fingerprint": stages.final.fingerprint,
    }
    del described["data"], train["lr"], train["seed"]
    identity = {"suite": plan.suite.name, "task": task.name, "group": task.group, "seed": seed}
    recipe = {"recipe": plan.recipe, "stop": plan.stop if plan.recipe == "clean" else None}
    return json.loads(
        json.dumps({**identity, **recipe, **described, "train": train, "task_settings": own})
    )


class _Stopped(Exception):  # noqa: N818
    """The epoch to stop after is done."""


class _Passed(Exception):  # noqa: N818
    """A run that was killed earlier goes on after the epoch to stop after."""


class _Watch(Listener):
    """Keeps the model and the epochs of a run, and stops it after the epoch ``last``.

    The inner listener is not told of epochs: val's images are among those trained on.
    """

    def __init__(self, inner: Listener, last: int) -> None:
        self.inner, self.last = inner, last
        self.model: GistModel | None = None
        self.history: list[Epoch] = []

    def starts(self, model: GistModel, steps: int) -> None:
        self.model = model
        self.inner.starts(model, steps)

    def step(self, step: int, loss: float) -> None:
        self.inner.step(step, loss)

    def epoch(self, epoch: Epoch) -> None:
        if epoch.epoch > self.last:
            raise _Passed
        self.history.append(epoch)
        if epoch.epoch == self.last:
            raise _Stopped


@dataclass(frozen=True)
class _Training:
    """Runs in sub-folders of one task and seed."""

    folder: Path
    title: str
    device: str
    workers: int
    listener: Callable[[str], AbstractContextManager[Listener]] | None

    def whole(self, config: RunConfig, data: ImageData, name: str) -> Record:
        """A run's results, with the best epoch on ``data.val``."""
        with self._heard(name) as listener:
            return self._run(config, data, name, listener)

    def up_to(self, epoch: int, config: RunConfig, data: ImageData, name: str) -> _Watch:
        """A run stopped after ``epoch`` of its schedule, whatever ``data.val`` says."""
        with self._heard(name) as listener:
            for fresh in (False, True):
                watch = _Watch(listener, epoch)
                try:
                    self._run(config, data, name, watch, fresh=fresh)
                except _Stopped:
                    return watch
                except _Passed:  # killed between its last epoch and its record
                    continue
        raise RuntimeError(f"{self.folder / name}: the run did not stop after epoch {epoch}")

    def _run(
        self, config: RunConfig, data: ImageData, name: str, listener: Listener, **options: bool
    ) -> Record:
        return run(
            config,
            data,
            self.folder / name,
            device=self.device,
            workers=self.workers,
            listener=listener,
            **options,
        )

    def _heard(self, name: str) -> AbstractContextManager[Listener]:
        if self.listener is None:
            return nullcontext(Listener())
        return self.listener(f"{self.title}, {name}")


def _clean(plan: Plan, runs: list[RunConfig], stages: Stages, training: _Training) -> Record:
    candidates, circumstances = [], {}
    for config in runs if plan.stop == "best" or len(runs) > 1 else ():
        lr = config.train.lr
        results = training.whole(config, stages.select, f"select-lr{lr:g}")
        history = results["fit"]["history"]
        kept = history[results["fit"]["best_epoch"] - 1] if plan.stop == "best" else history[-1]
        measured = {key: kept[key] for key in ("epoch", "val_accuracy", "val_loss")}
        candidates.append({"lr": lr, **measured, "seconds": results["seconds"]})
        circumstances = _circumstances(results)
    selected: Record = {"lr": runs[0].train.lr, "epoch": runs[0].train.epochs}
    if candidates:
        best = max(candidates, key=lambda c: (c["val_accuracy"], -c["val_loss"]))
        selected = {key: best[key] for key in selected}
    config = next(c for c in runs if c.train.lr == selected["lr"])
    final = _retrain(config, stages.final, selected["epoch"], training)
    return {
        "selection": {"on": "val" if candidates else None, **selected, "candidates": candidates},
        **final,
        **circumstances,
        "seconds": final["seconds"] + sum(c["seconds"] for c in candidates),
    }


def _retrain(config: RunConfig, data: ImageData, epoch: int, training: _Training) -> Record:
    """Train on all images up to ``epoch`` of the whole schedule, test once, save."""
    assert data.test is not None
    started = time.perf_counter()
    watch = training.up_to(epoch, config, replace(data, test=None), "final")
    model = watch.model
    assert model is not None
    normalisation = resolve_model_data_config(model.backbone)
    img_size = model.backbone.patch_embed.img_size[0]
    tested = evaluate(model, prepare(data.test, img_size, normalisation), workers=training.workers)
    if _is_first_process():
        directory = training.folder / "final"
        save(model, directory, classes=list(data.classes))
        for leftover in (RESULTS_FILE, RESUME_FILE):  # of a run that does not know it is done
            (directory / leftover).unlink(missing_ok=True)
    return {
        "test": asdict(tested),
        "parameters": count_parameters(model)._asdict(),
        "images_per_second": len(data.train)
        * len(watch.history)
        / sum(e.train_seconds for e in watch.history),
        "seconds": time.perf_counter() - started,
        "normalisation": {key: normalisation[key] for key in ("mean", "std")},
        "img_size": img_size,
        "machine": describe_machine(training.device),
        "versions": versions(),
        "git": git_revision(),
    }


def _circumstances(results: Record) -> Record:
    return {key: value for key, value in results.items() if key not in COURSE}


def _released(plan: Plan, runs: list[RunConfig], stages: Stages, training: _Training) -> Record:
    test = stages.final.test
    assert test is not None
    on_test = replace(stages.final, val=test, test=None)
    results = training.whole(runs[0], on_test, "epoch-chosen-on-test")
    best = results["fit"]["history"][results["fit"]["best_epoch"] - 1]
    measured = {"accuracy": best["val_accuracy"], "loss": best["val_loss"], "images": len(test)}
    return {
        "selection": {"on": "test", "lr": runs[0].train.lr, "epoch": best["epoch"]},
        "test": measured,
        "images_per_second": results["fit"]["images_per_second"],
        "seconds": results["seconds"],
        **_circumstances(results),
    }
