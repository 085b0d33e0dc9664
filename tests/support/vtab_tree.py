"""A miniature VTAB-1K tree: every task's name and lists, generated images of 8 x 8 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from gist.suites.tasks import VTAB_1K, Task
from gist.suites.vtab_layout import LISTS

COUNTS = {"train800": 8, "val200": 4, "train800val200": 12}
TEST = 6


def write_task(root: Path, task: Task, counts: dict[str, int] = COUNTS, test: int = TEST) -> Path:
    """One task; the class shows in the image's brightness."""
    random = np.random.default_rng(sum(task.name.encode()))
    parts: dict[str, list[tuple[np.ndarray, int]]] = {}
    for split, count in {**counts, "test": test}.items():
        labels = np.arange(count) % min(task.classes, 4)
        parts[split] = [
            ((random.integers(0, 60, (8, 8, 3)) + 60 * label).astype(np.uint8), int(label))
            for label in labels
        ]
    parts["train800val200"] = parts["train800"] + parts["val200"]
    for split in LISTS:
        folder = root / task.name / "images" / split
        folder.mkdir(parents=True)
        lines = []
        for number, (pixels, label) in enumerate(parts[split]):
            Image.fromarray(pixels).save(folder / f"{number:06d}.png", compress_level=0)
            lines.append(f"images/{split}/{number:06d}.png {label}\n")
        (root / task.name / f"{split}.txt").write_text("".join(lines))
    return root / task.name


def write_tree(root: Path) -> Path:
    for task in VTAB_1K.tasks:
        write_task(root, task)
    return root
