"""A run: data, backbone, training and test, with its results in a folder of its own.

The folder gets ``adapter.safetensors`` and ``config.json`` (see :mod:`gist.checkpoint`) and
``results.json`` with all that is needed to repeat it. A finished run is not done again.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config

from gist.backbones import create_backbone
from gist.checkpoint import save
from gist.config import GistConfig
from gist.data import ImageData, prepare
from gist.files import write_atomically
from gist.model import GistModel, count_parameters, wrap
from gist.train import Epoch, TrainConfig, evaluate, fit

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class RunConfig:
    """All that decides a run's outcome, apart from the machine.

    Args:
        data: a name or a folder, as :func:`gist.data.load_data` takes.
        model: a timm ViT's name.
        gist: what to train.
        train: how to train it.
        weights: a checkpoint file or a named set of weights; None for ``pretrained``.
        pretrained: fetch timm's own weights from its hub.
        img_size: side of the square images; None for the backbone's own.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.
    """

    data: str
    model: str
    gist: GistConfig = field(default_factory=GistConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    weights: str | None = None
    pretrained: bool = False
    img_size: int | None = None
    drop_path: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gist": self.gist.to_dict()}


class Listener:
    """What a caller may hear of a run; the methods do nothing unless overridden."""

    def starts(self, model: GistModel, steps: int) -> None: ...
    def step(self, step: int, loss: float) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...


def run(
    config: RunConfig,
    data: ImageData,
    directory: Path,
    *,
    device: str = "cpu",
    workers: int = 0,
    fresh: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train as ``config`` says on ``data``, test once, write ``directory`` and return the results.

    The epoch is chosen on ``data.val`` alone; ``data.test``, where there is one, is used once, at
    the end. A directory that holds this very run, finished, is read instead.

    Args:
        config: see :class:`RunConfig`.
        data: ``config.data``, loaded.
        directory: made if missing.
        fresh: train again even if the run is there.

    Raises:
        FileExistsError: the directory holds another run, which is not overwritten.
        KeyboardInterrupt: Ctrl-C, after the best finished epoch was written.
    """
    listener = listener or Listener()
    # As JSON reads it back, so that it compares equal to an earlier run's.
    described = json.loads(json.dumps({**config.to_dict(), "data_fingerprint": data.fingerprint}))
    earlier = read_results(directory)
    if earlier is not None:
        if earlier["config"] != described:
            differing = sorted(k for k in described if earlier["config"].get(k) != described[k])
            raise FileExistsError(
                f"{directory} holds another run (it differs in {', '.join(differing)}); "
                "choose another --out, or delete it"
            )
        if earlier["complete"] and not fresh:
            return {**earlier, "reused": True}

    torch.manual_seed(config.train.seed)  # before the head is drawn
    backbone = create_backbone(
        config.model,
        num_classes=len(data.classes),
        img_size=config.img_size,
        weights=config.weights,
        pretrained=config.pretrained,
        drop_path_rate=config.drop_path,
    )
    model = wrap(backbone, config.gist).to(device)
    normalisation = resolve_model_data_config(backbone)
    img_size = backbone.patch_embed.img_size[0]
    as_input = partial(prepare, img_size=img_size, data_config=normalisation)
    train, val = as_input(data.train), as_input(data.val)
    batches = -(-len(train) // config.train.batch_size)  # rounded up
    listener.starts(model, config.train.epochs * batches)

    started = time.perf_counter()
    fitted = fit(
        model,
        train,
        val,
        config.train,
        workers=workers,
        on_step=listener.step,
        on_epoch=listener.epoch,
    )
    if fitted.best_epoch is None:
        raise KeyboardInterrupt
    save(model, directory, classes=list(data.classes))
    results = {
        "config": described,
        "complete": not fitted.interrupted,
        "parameters": count_parameters(model)._asdict(),
        "val_accuracy": fitted.history[fitted.best_epoch - 1].val_accuracy,
        "fit": fitted.to_dict(),
        "seconds": time.perf_counter() - started,
        "normalisation": {key: normalisation[key] for key in ("mean", "std")},
        "img_size": img_size,
        "machine": describe_machine(device),
        "versions": {name: version(name) for name in ("gist-kernels", "torch", "timm")},
    }
    if data.test is not None and not fitted.interrupted:
        results["test"] = asdict(evaluate(model, as_input(data.test), workers=workers))
        results["seconds"] = time.perf_counter() - started
    write_json(directory / RESULTS_FILE, results)
    if fitted.interrupted:
        raise KeyboardInterrupt
    return {**results, "reused": False}


def read_results(directory: Path) -> dict[str, Any] | None:
    """A run's results, or None where there are none."""
    path = directory / RESULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def describe_machine(device: str) -> dict[str, Any]:
    """What the timings were taken on."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor_name(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
