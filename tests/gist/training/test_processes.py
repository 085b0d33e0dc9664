"""Several processes: the result of one, every image counted once, and files written once."""

from __future__ import annotations

import csv
import json
import os
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from training import in_processes, model, stripes, train_in, trained_in

import gist
from gist import cli
from gist.runs.predictions import Predictions
from gist.training.batches import BatchSampler
from gist.training.config import TrainConfig
from gist.training.evaluation import evaluate

# 49 images: the last of an epoch's four batches has one, and the second process none of it.
CONFIG = TrainConfig(epochs=3, batch_size=16, lr=1e-2, warmup_epochs=0.5, seed=4)
IMAGES = 49


def train(directory: Path, config: TrainConfig, dropout: float, stop: int | None = None) -> None:
    def on_step(step: int, loss: float) -> None:
        if step == stop:
            os._exit(3)

    train_in(
        directory, config, images=IMAGES, on_step=on_step,
        gist_config=gist.GistConfig(token_dropout=dropout),
    )  # fmt: skip


def numbers(log: str) -> np.ndarray:
    rows = list(csv.reader(log.splitlines()))[1:]
    return np.array(rows, dtype=float)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("alone")
    assert in_processes(train, directory, CONFIG, 0.0) == [0]
    return trained_in(directory)


@pytest.mark.parametrize(
    ("count", "accumulate"), [(1, 5), (2, 1), (3, 2)], ids=lambda value: str(value)
)
def test_parts_give_the_whole_batchs_result(tmp_path, alone, count, accumulate):
    config = replace(CONFIG, accumulate=accumulate)
    assert in_processes(train, tmp_path, config, 0.0, count=count) == [0] * count
    found = trained_in(tmp_path)
    for name, expected in alone["trainables"].items():
        torch.testing.assert_close(found["trainables"][name], expected, rtol=0, atol=1e-5)
    assert found["best_epoch"] == alone["best_epoch"]
    for ours, theirs in zip(found["history"], alone["history"], strict=True):
        assert ours["val_accuracy"] == theirs["val_accuracy"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)
    np.testing.assert_allclose(numbers(found["log"]), numbers(alone["log"]), atol=1e-5)


def test_two_processes_go_on_with_their_own_draws(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert in_processes(train, whole, CONFIG, 0.3, count=2) == [0, 0]
    assert in_processes(train, resumed, CONFIG, 0.3, 8, count=2) == [3, 3]
    assert in_processes(train, resumed, CONFIG, 0.3, count=2) == [0, 0]
    # Each draws its own dropout.
    assert [(whole / f"seed-{rank}").read_text() for rank in (0, 1)] == ["4", "5"]
    ours, expected = trained_in(resumed), trained_in(whole)
    assert ours.pop("went_on_after") == [6]
    assert all(torch.equal(v, expected["trainables"][k]) for k, v in ours["trainables"].items())
    assert (ours["log"], ours["history"]) == (expected["log"], expected["history"])


def write_evaluations(directory: Path) -> None:
    measured = [evaluate(model(), Subset(stripes(31, 2), range(n)), batch_size=4) for n in (31, 2)]
    path = directory / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps([asdict(m) for m in measured]))


def test_three_processes_count_every_image_once(tmp_path):
    assert in_processes(write_evaluations, tmp_path, count=3) == [0, 0, 0]
    for count, place in ((31, 0), (2, 1)):  # of two images the third process has none
        expected = evaluate(model(), Subset(stripes(31, 2), range(count)))
        for rank in range(3):
            found = json.loads((tmp_path / f"{rank}.json").read_text())[place]
            assert found["images"] == count
            assert found["accuracy"] == expected.accuracy
            assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("count", [1, 5, 48, 49])
@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 4), (3, 1), (4, 2)])
def test_parts_of_an_order(count, processes, accumulate):
    def parts(process, epoch, step=0, seed=1):
        order = BatchSampler(
            count, 16, seed, accumulate=accumulate, process=process, processes=processes
        )
        assert len(order) == -(-count // 16)
        return order.start(epoch, step), list(order)

    for epoch in (1, 3):
        every = [parts(process, epoch) for process in range(processes)]
        assert sorted(i for _, own in every for part in own for i in part) == list(range(count))
        sizes = [size for size, *_ in every[0][0]]
        assert sizes == [16] * (count // 16) + [count % 16] * (count % 16 > 0)
        assert all([size for size, *_ in steps] == sizes for steps, _ in every)
        for process, (steps, own) in enumerate(every):
            assert sum(step.parts for step in steps) == len(own)
            assert all(own)
            later, rest = parts(process, epoch, step=2)
            assert (later, rest) == (steps[2:], own[sum(step.parts for step in steps[:2]) :])
    if count > 40:
        assert parts(0, 1) != parts(0, 2)
        assert parts(0, 1)[1] != parts(0, 1, seed=2)[1]


def test_the_order_is_that_of_a_shuffling_loader():
    data = torch.utils.data.DataLoader(
        range(49), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(7)
    )
    order = BatchSampler(49, 16, 7)
    for epoch in (1, 2, 3):
        order.start(epoch)
        assert list(order) == [batch.tolist() for batch in data]


def command(folder: Path, out: Path, said: Path) -> None:
    with (said / os.environ.get("RANK", "0")).open("w") as file, redirect_stdout(file):
        code = cli.main([
            "train", "--data", str(folder), "--out", str(out), "--model", "vit_tiny_patch16_224",
            "--random-weights", "--img-size", "32", "--device", "cpu", "--epochs", "2",
            "--batch-size", "4", "--warmup-epochs", "0", "--token-dropout", "0",
        ])  # fmt: skip
    os._exit(code)


@pytest.mark.slow
def test_the_command_line_in_two_processes(tmp_path):
    random = np.random.default_rng(0)
    for index in range(18):
        place = tmp_path / "images" / "abc"[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 90, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")
    images, out, one, said = (tmp_path / name for name in ("images", "out", "one", "said"))
    said.mkdir()
    assert in_processes(command, images, one, said) == [0]
    assert in_processes(command, images, out, said, count=2) == [0, 0]
    assert "Results, weights and curves" in (said / "0").read_text()
    assert (said / "1").read_text() == ""
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter.safetensors", "config.json", "curves.png", "log.csv",
        "predictions.csv", "report.html", "results.json",
    }  # fmt: skip
    ours, alone = (json.loads((place / "results.json").read_text()) for place in (out, one))
    assert (ours["machine"]["processes"], alone["machine"]["processes"]) == (2, 1)
    assert ours["val_accuracy"] == alone["val_accuracy"]
    for mine, theirs in zip(ours["fit"]["history"], alone["fit"]["history"], strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
    both, ours_alone = (Predictions.read(place, "abc") for place in (out, one))
    assert (both.split, both.paths) == ("val", ours_alone.paths)
    assert both.predicted.tolist() == ours_alone.predicted.tolist()
    assert both.probability == pytest.approx(ours_alone.probability, abs=1e-5)
    # Now it is read, and not done again.
    assert in_processes(command, images, out, said, count=2) == [0, 0]
    assert "finished earlier" in (said / "0").read_text()
