"""The training loop: fit a wrapped model's trainable parameters, keep the best epoch.

A training runs in one process, or in several that ``accelerate launch`` or ``torchrun`` started.
Each process then computes its part of every batch, and one all-reduce per step sums the gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object, reduce
from timm.scheduler import CosineLRScheduler
from torch.utils.data import Dataset

import gist_kernels as gk
from gist.data.base import Augmented
from gist.data.text import Tokenised
from gist.model.containers import is_sharded
from gist.model.loss import GistLoss
from gist.model.wrapped import GistModel
from gist.training.batches import BatchSampler, Step
from gist.training.config import PRECISIONS, TrainConfig
from gist.training.cuda_graph import graphed
from gist.training.divergence import DivergedError, LossWatch
from gist.training.ema import Ema
from gist.training.evaluation import evaluate, processes
from gist.training.inputs import Inputs, call, to_device
from gist.training.loading import lengths_of, loaded, training_loader
from gist.training.log import Log
from gist.training.mixup import Mixup
from gist.training.optimizer import create_optimizer
from gist.training.result import Epoch, FitResult
from gist.training.sharding import check_whole
from gist.training.state import ResumeFile, rng_state, seed_all, set_rng_state
from gist_kernels.kernels.cpu import memory

# Steps between two reads of the loss. On a GPU, a read waits for the device.
READ_EVERY = {"cpu": 1, "cuda": 10}


def fit(
    model: GistModel,
    train: Dataset[Any],
    val: Dataset[Any] | None,
    config: TrainConfig,
    *,
    loss: GistLoss | None = None,
    sample_weights: Sequence[float] | None = None,
    workers: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_resume: Callable[[int, list[Epoch]], None] | None = None,
    resume_file: ResumeFile | None = None,
    log: Log | None = None,
) -> FitResult:
    """Train what :func:`gist.wrap` left trainable; keep the best epoch on ``val``, or the last.

    Seeds the global generators of Python, NumPy and PyTorch.

    Args:
        model: on the device to train on, also by :func:`gist.training.sharding.shard_frozen`.
        train, val: items are a float (3, H, W) image, normalised, and an int class; or a
            :class:`gist.data.Tokenised` each, whose batches are of similar lengths. Without
            ``val``, epochs are not evaluated. A :class:`gist.data.Augmented` ``train`` gets each
            image's draw.
        config: the schedule.
        loss: default :class:`gist.GistLoss` with the published weights and
            ``config.label_smoothing``. Any other loss must be a mean over images.
        sample_weights: of each training image, its share of the draws; an epoch then draws as many
            images as there are, with replacement. None: an epoch takes each image once.
        workers: loader processes; images in memory need none.
        on_step: called in order with each step's number, from 1, and its loss; on a GPU some steps
            late, because each read of a loss waits for the device.
        on_epoch: called with each finished epoch.
        on_resume: called first, with the number of finished steps and the finished epochs, if the
            training resumes from ``resume_file``.
        resume_file: saved at each epoch's end and every ``resume_file.every`` steps. If it holds a
            state, the training resumes from it. On a CPU the result then has the bits of a training
            that was never stopped, whatever ``workers`` are, unless items other than those of
            :class:`gist.data.Augmented` are drawn at random. The file stays after the last epoch:
            remove it once the result is safe.
        log: records each step.

    Returns:
        The history. Ctrl-C ends the training early with ``interrupted`` set and the best finished
        epoch kept.

    Raises:
        DivergedError: a FloatingPointError: the loss is not finite, or stays far above its start.
            It names the step and what to try. The best finished epoch and the resume file are kept.
        OSError: the resume file or the log could not be written; it names the file.
        ValueError: the resume file was written by another number of processes, the optimizer needs
            a library or a device that is not here, ``config.head_lr`` is for a classifier that the
            model does not train, or ``config.patience`` has no ``val``.
    """
    if next(model.parameters()).device.type == "cpu":
        memory.keep_freed()
    training = _Training(model, train, val, config, loss, sample_weights, workers, resume_file, log)
    training.on_step, training.on_epoch = on_step, on_epoch
    diverged = None
    try:
        training.resume(on_resume)
        training.run()
    except KeyboardInterrupt:
        training.result.interrupted = True
    except DivergedError as error:
        diverged = error
    finally:
        del training.loader  # ends its workers
        if log is not None:
            log.close()
    training.result.seconds = training.seconds()
    if training.best is not None:
        model.load_state_dict(training.best, strict=False)
    if diverged is not None:
        diverged.result = training.result
        raise diverged
    return training.result


@contextmanager
def _matmuls(precision: str) -> Iterator[None]:
    """float32 matmuls of CUDA devices in TF32, or as they were set."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class _Position:
    """How far a training is, and the sums of the unfinished epoch."""

    step: int = 0
    epoch: int = 1
    batch: int = 0
    loss: float = 0.0  # summed over the epoch's images
    images: int = 0
    epoch_seconds: float = 0.0
    all_images: int = 0  # of finished epochs
    train_seconds: float = 0.0
    seconds: float = 0.0  # of earlier starts


class _Training:
    """The state of :func:`fit` from step to step."""

    on_step: Callable[[int, float], None] | None
    on_epoch: Callable[[Epoch], None] | None

    def __init__(
        self,
        model: GistModel,
        train: Dataset[Any],
        val: Dataset[Any] | None,
        config: TrainConfig,
        loss: GistLoss | None,
        sample_weights: Sequence[float] | None,
        workers: int,
        resume_file: ResumeFile | None,
        log: Log | None,
    ) -> None:
        self.started = time.perf_counter()
        if isinstance(train, Tokenised):
            config.check_text()
        self.device = next(model.parameters()).device
        self.processes = processes(self.device)
        self.model, self.val, self.config, self.workers = model, val, config, workers
        if loss is not None and config.label_smoothing:
            raise ValueError("label_smoothing is the default loss's; give it to your loss instead")
        self.loss = loss if loss is not None else GistLoss(label_smoothing=config.label_smoothing)
        self.log, self.resume_file = log, resume_file
        # A subclass may compute another loss, which has no terms to log.
        known = type(self.loss).forward is GistLoss.forward
        self.with_terms = log is not None and model.token is not None and known
        rank, world = self.processes.process_index, self.processes.num_processes
        seed_all(config.seed + rank)
        self.trainables = [p for p in model.parameters() if p.requires_grad]
        check_whole(self.trainables)
        if world > 1:
            broadcast([p.data for p in self.trainables])
        self.batches = BatchSampler(
            len(train),  # type: ignore[arg-type]
            config.batch_size,
            config.seed,
            accumulate=config.accumulate,
            process=rank,
            processes=world,
            draws=isinstance(train, Augmented),
            weights=sample_weights,
            lengths=lengths_of(train),
            fill=is_sharded(model),  # whose every call is one of all processes
        )
        self.loader = training_loader(
            train, self.batches, workers=workers, seed=config.seed + rank, device=self.device
        )
        self.optimizer = create_optimizer(model, config)
        steps = config.epochs * len(self.batches)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=steps,
            lr_min=config.min_lr,
            warmup_t=min(round(config.warmup_epochs * len(self.batches)), steps - 1),
            warmup_lr_init=config.warmup_lr,
            t_in_epochs=False,
        )
        self.ema = Ema(model, config.ema) if config.ema else None
        mixes = config.mixup > 0 or config.cutmix > 0
        if config.patience and val is None:
            raise ValueError("patience needs validation images, and there are none")
        if config.precision == "tf32" and self.device.type != "cuda":
            raise ValueError(
                f"precision tf32 needs a model on a CUDA device; it is on {self.device}"
            )
        if config.cuda_graph and self.device.type != "cuda":
            raise ValueError(f"cuda_graph needs a model on a CUDA device; it is on {self.device}")
        self.graphed = None
        if config.cuda_graph:
            self.graphed = graphed(self._compute, self._gradients, world)
        self.compute = self.graphed or self._compute
        self.mixup = Mixup(config.mixup, config.cutmix, model.num_classes) if mixes else None
        self.result, self.at = FitResult(), _Position()
        self.watch = LossWatch(config, max(2, model.num_classes))
        self.best: dict[str, torch.Tensor] | None = None
        # Steps whose loss has not been read yet: step, images, learning rate, loss and terms.
        self.unread: list[tuple[int, int, float, torch.Tensor]] = []

    def run(self) -> None:
        if self.log is not None and self.processes.is_main_process:
            self.log.start(self.at.step)
        last, patience = self.config.stop_after or self.config.epochs, self.config.patience
        while self.at.epoch <= last:
            if patience and self.result.stale_epochs() >= patience:
                self.result.stopped_early = True
                break
            with _matmuls(self.config.precision), gk.cached_casts():
                self._train_epoch()
            self._finish_epoch()

    def _train_epoch(self) -> None:
        self.model.train()
        steps = self.batches.start(self.at.epoch, self.at.batch)
        start, before = time.perf_counter(), self.at.epoch_seconds
        parts = loaded(self.loader)
        for step in steps:
            self._step(parts, step)
            due = self.resume_file is not None and self.resume_file.every
            if due and self.at.step % due == 0:
                self._read()
                self.at.epoch_seconds = before + time.perf_counter() - start
                self.save()
        self._read()
        self.at.epoch_seconds = before + time.perf_counter() - start

    def _step(self, parts: Iterator[Any], step: Step) -> None:
        self.schedule.step_update(self.at.step)
        if self.config.kl_warmup_epochs:
            grown = (self.at.step + 1) / (self.config.kl_warmup_epochs * len(self.batches))
            self.loss.kl_scale = min(1.0, grown)
        self._zero_gradients()
        numbers = torch.zeros(5 if self.with_terms else 1, device=self.device)
        for part in range(step.parts):
            inputs, target = next(parts)
            counts = part < step.parts - step.fillers
            share = len(target) / step.images if counts else 0.0
            inputs = to_device(inputs, self.device)
            target = target.to(self.device, non_blocking=True)
            if self.mixup is not None:
                assert isinstance(inputs, torch.Tensor)  # check_text refuses texts
                inputs, target = self.mixup(inputs, target)
            numbers += self.compute(
                inputs, target, share=share, kl_scale=getattr(self.loss, "kl_scale", 1.0)
            )
        if self.processes.num_processes > 1:
            numbers = self._sum_over_processes(numbers)
        if self.config.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trainables, self.config.clip_grad_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        self.at.step += 1
        self.at.batch += 1
        self.unread.append(
            (self.at.step, step.images, self.optimizer.param_groups[0]["lr"], numbers)
        )
        if len(self.unread) >= READ_EVERY.get(self.device.type, 1):
            self._read()

    def _zero_gradients(self) -> None:
        if self.graphed is None or self.graphed.failed:
            self.optimizer.zero_grad(set_to_none=True)
            return
        for p in self.trainables:  # a graph adds to the gradients that existed at its capture
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.zero_()

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.trainables if p.grad is not None]

    def _compute(
        self, inputs: Inputs, target: torch.Tensor, *, share: float, kl_scale: float
    ) -> torch.Tensor:
        """Add ``share`` times the gradients of a part of a batch; return its share of the loss and
        the terms.

        ``kl_scale`` is the loss's own. It is an argument, because a graph would freeze it.
        """
        half = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, half, enabled=half is not None):
            output = call(self.model, inputs)
            if self.with_terms:
                value, terms = self.loss.with_terms(output, target)
                now = torch.stack((value.detach(), *terms))
            else:
                value = self.loss(output, target)
                now = value.detach()
        (share * value).backward()
        return share * now

    def _sum_over_processes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum the gradients, in place, and these numbers by one all-reduce."""
        grads = []
        for p in self.trainables:
            if p.grad is None:  # this process has no image of the batch
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        flat = reduce(torch.cat([*(g.flatten() for g in grads), numbers]), "sum")
        *summed, numbers = flat.split([*(g.numel() for g in grads), len(numbers)])
        for grad, total in zip(grads, summed, strict=True):
            grad.copy_(total.view_as(grad))
        return numbers

    def _read(self) -> None:
        """Read the losses of the last steps: check them, sum them, report them."""
        if not self.unread:
            return
        unread, self.unread = self.unread, []
        values = torch.stack([numbers for *_, numbers in unread]).tolist()
        for (step, size, lr, _), row in zip(unread, values, strict=True):
            self.watch.check(row[0], step, self.at.epoch, lr)
            self.at.loss += row[0] * size
            self.at.images += size
            if self.log is not None and self.processes.is_main_process:
                self.log.step(step, self.at.epoch, lr, row)
            if self.on_step is not None:
                self.on_step(step, row[0])

    def _finish_epoch(self) -> None:
        at, result = self.at, self.result
        with self.ema.applied() if self.ema is not None else nullcontext():
            accuracy, loss = self._measure()
            finished = Epoch(at.epoch, at.loss / at.images, accuracy, loss, at.epoch_seconds)
            if all(_rank(finished) > _rank(earlier) for earlier in result.history):
                result.best_epoch = at.epoch
                self.best = {k: v.clone() for k, v in self.model.trainable_state_dict().items()}
        result.history.append(finished)
        at.all_images += at.images
        at.train_seconds += at.epoch_seconds
        result.images_per_second = at.all_images / at.train_seconds
        at.epoch, at.batch, at.loss, at.images, at.epoch_seconds = at.epoch + 1, 0, 0.0, 0, 0.0
        if self.log is not None and self.processes.is_main_process:
            measured = {"accuracy": accuracy, "loss": loss}
            self.log.epoch(at.step, {k: v for k, v in measured.items() if v is not None})
        if self.resume_file is not None:
            self.save()
        if self.on_epoch is not None:
            self.on_epoch(finished)

    def _measure(self) -> tuple[float | None, float | None]:
        """Accuracy and loss on the validation images."""
        if self.val is None:
            return None, None
        measured = evaluate(
            self.model, self.val, batch_size=self.config.batch_size, workers=self.workers
        )
        return measured.accuracy, measured.loss

    def seconds(self) -> float:
        return self.at.seconds + time.perf_counter() - self.started

    def save(self) -> None:
        assert self.resume_file is not None
        generators = gather_object([rng_state(self.device)])
        if not self.processes.is_main_process:
            return
        self.resume_file.save(
            {
                "at": {**asdict(self.at), "seconds": self.seconds()},
                "history": [asdict(epoch) for epoch in self.result.history],
                "images_per_second": self.result.images_per_second,
                "best_epoch": self.result.best_epoch,
                "best": self.best,
                "watch": self.watch.state(),
                "trainables": self.model.trainable_state_dict(),
                "ema": self.ema.average if self.ema is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "generators": generators,
            }
        )

    def resume(self, on_resume: Callable[[int, list[Epoch]], None] | None) -> None:
        """Continue from the resume file, if it exists. Only the main process reads it."""
        if self.resume_file is None:
            return
        state = self.resume_file.load() if self.processes.is_main_process else None
        (state,) = broadcast_object_list([state])
        if state is None:
            return
        if len(state["generators"]) != self.processes.num_processes:
            raise ValueError(
                f"{self.resume_file.path} was written by {len(state['generators'])} processes; "
                f"resume with as many (these are {self.processes.num_processes}), or delete it"
            )
        self.at = _Position(**state["at"])
        self.result.history = [Epoch(**epoch) for epoch in state["history"]]
        self.result.best_epoch = state["best_epoch"]
        self.result.images_per_second = state["images_per_second"]
        self.best = state["best"]
        if "watch" in state:  # an earlier version's state has none
            self.watch.restore(state["watch"])
        self.model.load_state_dict(state["trainables"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            for name, average in state["ema"].items():
                self.ema.average[name].copy_(average)
        set_rng_state(state["generators"][self.processes.process_index], self.device)
        if on_resume is not None:
            on_resume(self.at.step, self.result.history)


def _rank(epoch: Epoch) -> tuple[float, float]:
    """The larger the better: by accuracy, then loss; without validation, by the epoch's number."""
    if epoch.val_accuracy is None or epoch.val_loss is None:
        return epoch.epoch, 0.0
    return epoch.val_accuracy, -epoch.val_loss
