"""A run that learns nothing gets advice once; one that learns gets none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gist import cli
from gist.data import ImageData
from gist.runs.advice import EPOCHS, Advisor, unmoved
from gist.training.config import TrainConfig
from gist.training.result import Epoch

CONFIG = TrainConfig(epochs=20, lr=0.004, warmup_epochs=1.5)
JUDGED = 2 + EPOCHS


class Labels(list):
    @property
    def labels(self):
        return list(self)


def data(val: list[int] | None) -> ImageData:
    split = Labels(val) if val else None
    return ImageData("d", ("a", "b"), Labels([0, 0, 0, 1]), split, None, "f")


def history(losses, accuracies) -> list[Epoch]:
    return [
        Epoch(i, loss, accuracy, 1.0, 0.0)
        for i, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1)
    ]


STUCK = [0.75] * JUDGED  # the share of class a among the validation images


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [(STUCK, True), ([0.1] * JUDGED, True), ([0.76, *STUCK[1:]], False), (STUCK[1:], False),
     ([*STUCK, 0.9], True)],
)  # fmt: skip
def test_with_validation_images_the_most_frequent_class_is_to_be_beaten(accuracies, said):
    falling = [1.0 / epoch for epoch in range(1, len(accuracies) + 1)]
    found = unmoved(history(falling, accuracies), data([0, 0, 0, 1]), CONFIG)
    assert (found is not None) == said
    if found is not None:
        assert "no validation accuracy was above 75.0%, the share of the most frequent" in found
        assert f"in {JUDGED} epochs" in found
        assert "10 times as high (0.04) and one a tenth as high (0.0004)" in found


ENTROPY = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [(1.0, 1.0, True), (1.0, 0.995, True), (1.0, 2.0, True), (1.0, 0.98, False),
     (0.9 * ENTROPY, 0.9 * ENTROPY, False)],
)  # fmt: skip
def test_without_them_the_training_loss_is_to_fall(first, last, said):
    losses = [first, *[(first + last) / 2] * (JUDGED - 2), last]
    found = unmoved(history(losses, [None] * JUDGED), data(None), CONFIG)
    assert (found is not None) == said
    if found is not None:
        assert f"training loss was {first:.4g} in epoch 1 and {last:.4g} in epoch 5" in found


@pytest.mark.parametrize("resumed", [0, JUDGED - 1, JUDGED, JUDGED + 1])
def test_advice_is_given_once_also_after_a_resume(resumed):
    epochs = history([1.0] * 9, [0.5] * 9)
    given = []
    advisor = Advisor(data([0, 1]), CONFIG, given.append)
    advisor.resumes(epochs[:resumed])
    for epoch in epochs[resumed:]:
        advisor.epoch(epoch)
    assert len(given) == (resumed < JUDGED)
    assert advisor.advice is not None


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """Two classes that no one can tell apart."""
    for split, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            place = tmp_path / "grey" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.full((9, 9, 3), 128, np.uint8)).save(place / f"{index}.png")
    return tmp_path / "grey"


def test_gist_train_warns_stops_and_records_both(grey, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--model", "test_vit", "--random-weights", "--augment", "none", "--device", "cpu"]
    schedule = ["--epochs", "9", "--warmup-epochs", "0", "--patience", "4", "--out", str(out)]
    assert cli.main(["train", "--data", str(grey), *options, *schedule]) == 0
    printed = capsys.readouterr()
    assert " ".join(printed.err.split()).count("nothing was learned. Try a learning rate") == 1
    said = " ".join(printed.out.split())
    assert "stopped at epoch 5 of 9; validation accuracy was not above that of epoch 1" in said
    results = json.loads((out / "results.json").read_text())
    assert results["advice"] in " ".join(printed.err.split())
    assert results["fit"]["stopped_early"]
    assert results["complete"]
    assert results["config"]["train"]["patience"] == 4


def test_a_run_that_diverges_keeps_its_best_epoch(grey, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    # The far-above check counts from the first step: the eighth of nine one-step epochs ends it.
    monkeypatch.setattr("gist.training.divergence.FAR", 0.0)
    monkeypatch.setattr("gist.training.divergence.IN_A_ROW", 8)
    options = ["--model", "test_vit", "--random-weights", "--augment", "none", "--device", "cpu"]
    command = ["train", "--data", str(grey), *options, "--epochs", "9", "--out", str(out)]
    assert cli.main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "at step 8 (epoch 8)" in said
    assert "Kept is epoch" in said
    results = json.loads((out / "results.json").read_text())
    assert not results["complete"]
    assert len(results["fit"]["history"]) == 7
    assert {"adapter.safetensors", "resume.pt"} <= {path.name for path in out.iterdir()}
    assert cli.main(["predict", str(out), str(grey / "val"), "--device", "cpu"]) == 0
