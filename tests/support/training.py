"""Small trainings for tests, also in processes of their own: killed, resumed, several at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import TensorDataset

import gist
from gist.training.config import TrainConfig
from gist.training.evaluation import processes
from gist.training.log import Log
from gist.training.loop import FitResult, fit
from gist.training.sharding import shard_frozen
from gist.training.state import ResumeFile

# Its children are forks of a process that has imported what is slow to import, and nothing else.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["gist.runs.run", "gist.cli"])


def model(
    seed: int = 0, config: gist.GistConfig | None = None, drop_path: float = 0.0
) -> gist.GistModel:
    torch.manual_seed(seed)
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3,
        drop_path_rate=drop_path,
    )  # fmt: skip
    return gist.wrap(vit, config)


def stripes(images: int, seed: int) -> TensorDataset:
    """Three classes that differ in which colour channel is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    pixels = 0.5 * torch.randn(images, 3, 16, 16, generator=generator)
    pixels[torch.arange(images), labels] += 1.5
    return TensorDataset(pixels, labels)


def in_processes(
    function: Callable[..., None], *arguments: Any, count: int = 1
) -> Sequence[int | None]:
    """Exit codes of ``count`` processes, as a launcher would start them, that run a function."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        process = _CONTEXT.Process(
            target=_launched, args=(rank, count, port, function, arguments), daemon=True
        )
        process.start()
        started.append(process)
    for process in started:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def _launched(
    rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
    function(*arguments)


def train_in(
    directory: Path,
    config: TrainConfig,
    *,
    every: int = 3,
    images: int = 50,
    gist_config: gist.GistConfig | None = None,
    drop_path: float = 0.0,
    shard: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[Any], None] | None = None,
) -> FitResult:
    """A training that keeps its state in ``directory``; ``trained.pt`` is what came out."""
    resume_file = ResumeFile(directory / "resume.pt", asdict(config), every=every)
    rank = int(os.environ.get("RANK", 0))
    trained = model(config=gist_config, drop_path=drop_path)
    for parameter in trained.trainable_state_dict().values():
        parameter += rank  # all are to start from those of the first process
    if shard:
        processes("cpu")
        shard_frozen(trained, "cpu")
    went_on_after = []
    result = fit(
        trained, stripes(images, 1), stripes(31, 2), config,
        resume_file=resume_file, log=Log(directory), on_step=on_step, on_epoch=on_epoch,
        on_resume=lambda step, history: went_on_after.append(step),
    )  # fmt: skip
    (directory / f"seed-{rank}").write_text(str(torch.initial_seed()))
    if rank == 0:
        history = [{**asdict(epoch), "train_seconds": None} for epoch in result.history]
        torch.save(
            {
                "trainables": trained.trainable_state_dict(),
                "history": history,
                "best_epoch": result.best_epoch,
                "went_on_after": went_on_after,
            },
            directory / "trained.pt",
        )
    return result


def trained_in(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(directory / "trained.pt", weights_only=True)
    return {**found, "log": (directory / "log.csv").read_text()}


def kill_at(step: int) -> Callable[[int, float], None]:
    def on_step(now: int, loss: float) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step
