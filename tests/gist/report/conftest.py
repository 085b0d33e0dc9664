"""Two tiny runs on images whose classes have names that must be escaped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gist import cli

CLASSES = ("<script>alert(1)<", 'b & "c"', "plain")
OPTIONS = [
    "--model", "test_vit", "--random-weights", "--img-size", "32", "--device", "cpu", "--epochs",
    "2", "--batch-size", "8", "--warmup-epochs", "0", "--workers", "0", "--augment", "none",
]  # fmt: skip


def make_images(root: Path, splits: dict[str, int], seed: int = 0) -> Path:
    """Noisy images of three colours."""
    random = np.random.default_rng(seed)
    for split, count in splits.items():
        for channel, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 190, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 60
                Image.fromarray(pixels).save(root / split / name / f"<i>{index}.png")
    return root


def train(folder: Path, out: Path, *more: str) -> Path:
    assert cli.main(["train", "--data", str(folder), "--out", str(out), *OPTIONS, *more]) == 0
    return out


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "photos"
    return make_images(root, {"train": 6, "val": 3, "test": 8})


@pytest.fixture(scope="session")
def a_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a Gist token, and its report."""
    return train(folder, tmp_path_factory.mktemp("runs") / "gist")


@pytest.fixture(scope="session")
def plain_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a Gist token, and without its report."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    return train(folder, out, "--no-gist", "--lr", "0.02", "--no-report")
