"""A run's folder: one training at a time, and nothing in it of another training's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import in_processes

from gist.data import load_data
from gist.files import LOCK_FILE
from gist.report import write_report
from gist.report.compare import compare
from gist.runs.run import Listener, RunConfig, read_results, run
from gist.training.config import TrainConfig


@pytest.fixture
def photos(tmp_path) -> Path:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(5):
            pixels = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


class InStep(Listener):
    """Calls a function in a step."""

    def __init__(self, at: int, function: Callable[[], None]) -> None:
        self._at, self._function = at, function

    def step(self, step: int, loss: float) -> None:
        if step == self._at:
            self._function()


def train(photos: Path, out: Path, *, seed: int = 0, **options) -> None:
    schedule = TrainConfig(epochs=2, batch_size=4, warmup_epochs=0, seed=seed)
    config = RunConfig(str(photos), "test_vit", train=schedule, img_size=32)
    run(config, load_data(config.data), out, **options)


def interrupt() -> None:
    raise KeyboardInterrupt


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def test_what_a_fresh_training_does_not_replace_goes(photos, tmp_path):
    first, out = tmp_path / "first", tmp_path / "out"
    train(photos, first)
    train(photos, out)
    write_report(out)
    with pytest.raises(KeyboardInterrupt):
        train(photos, out, fresh=True, listener=InStep(3, interrupt))  # in the second epoch
    assert not read_results(out)["complete"]
    assert names(out) == {
        "adapter.safetensors", "config.json", "log.csv", "results.json", "resume.pt",
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"has no predictions\.csv"):
        compare([first, out])


def test_an_edited_card_stays(photos, tmp_path):
    out = tmp_path / "out"
    train(photos, out)
    with (out / "README.md").open("a") as card:
        card.write("Taken in Oslo.\n")
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="was edited"):
        train(photos, out, fresh=True, listener=InStep(3, interrupt))
    assert "Taken in Oslo." in (out / "README.md").read_text()


def test_one_process_trains_in_a_folder(photos, tmp_path):
    out, codes = tmp_path / "out", []

    def other() -> None:
        codes.extend(in_processes(refused, photos, out))

    train(photos, out, listener=InStep(1, other))
    assert codes == [0]
    assert LOCK_FILE not in names(out)
    train(photos, out)  # a finished run is read


def refused(photos: Path, out: Path) -> None:
    with pytest.raises(BlockingIOError, match="another process is training in this folder"):
        train(photos, out, seed=1)


def test_the_folder_is_tried_before_anything_is_computed(photos, tmp_path):
    (tmp_path / "file").touch()
    listener = InStep(1, interrupt)
    with pytest.raises(OSError, match="file"):
        train(photos, tmp_path / "file", listener=listener)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_folder_that_was_made_for_nothing_goes(photos, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(photos, tmp_path / "out", listener=StartsNot())
    assert not (tmp_path / "out").exists()


class StartsNot(Listener):
    def starts(self, model, steps) -> None:
        raise KeyboardInterrupt
