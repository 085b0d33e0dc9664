"""The log of a training: every step in a CSV file, and TensorBoard or W&B if asked."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path

import pytest
from training import model, stripes

import gist
from gist.training.config import TrainConfig
from gist.training.log import COLUMNS, Log
from gist.training.loop import fit

CONFIG = TrainConfig(epochs=2, batch_size=16, lr=1e-2, warmup_epochs=0, min_lr=0.0)


def trained(directory: Path, log: Log, use_gist: bool = True) -> tuple[list[dict], list[float]]:
    losses: list[float] = []
    fit(
        model(config=gist.GistConfig(gist=use_gist)), stripes(50, 1), stripes(9, 2), CONFIG,
        log=log, on_step=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    with (directory / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file)), losses


def test_every_step_with_its_terms(tmp_path):
    rows, losses = trained(tmp_path, Log(tmp_path))
    assert list(rows[0]) == list(COLUMNS)
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [int(row["epoch"]) for row in rows] == [1] * 4 + [2] * 4
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, rel=1e-8)
    assert float(rows[0]["lr"]) == 1e-2
    assert float(rows[4]["lr"]) == pytest.approx(0.5e-2)  # half of the cosine
    for row in rows:
        ce, gist_ce, kl, kl_back = (float(row[name]) for name in COLUMNS[4:])
        assert float(row["loss"]) == pytest.approx(ce + 0.5 * gist_ce + 0.75 * (kl + kl_back))


def test_the_log_changes_nothing(tmp_path):
    def token(log):
        m = model()
        fit(m, stripes(50, 1), stripes(9, 2), CONFIG, log=log)
        return m.trainable_state_dict()["token.weight"]

    assert token(None).equal(token(Log(tmp_path)))


def test_without_a_token_there_are_no_terms(tmp_path):
    rows, losses = trained(tmp_path, Log(tmp_path, every=3), use_gist=False)
    assert [row["step"] for row in rows] == ["3", "6"]
    assert [float(row["loss"]) for row in rows] == pytest.approx([losses[2], losses[5]])
    assert {row[name] for row in rows for name in COLUMNS[4:]} == {""}


class Halved(gist.GistLoss):
    def forward(self, output, target):
        return 0.5 * super().forward(output, target)


def test_a_loss_of_ones_own_is_what_is_trained_on_and_logged(tmp_path):
    losses: list[float] = []
    for loss in (gist.GistLoss(), Halved()):
        fit(
            model(), stripes(16, 1), stripes(9, 2), CONFIG, loss=loss, log=Log(tmp_path),
            on_step=lambda step, loss: losses.append(loss),
        )  # fmt: skip
    assert losses[2] == losses[0] / 2
    assert (tmp_path / "log.csv").read_text().splitlines()[1].endswith(f"{losses[2]:.9g},,,,")


def test_going_on_forgets_what_came_after_and_what_was_cut(tmp_path):
    log = Log(tmp_path)
    log.start()
    for step in range(1, 31):
        log.step(step, 1, 0.1, [float(step)])
    log.close()
    path = tmp_path / "log.csv"
    path.write_bytes(path.read_bytes()[:-21])  # in the middle of a row
    log.start(12)
    log.step(13, 2, 0.1, [-1.0])
    log.close()
    rows = path.read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(step) for step in range(1, 14)]
    assert rows[-1] == "13,2,0.1,-1,,,,"


class Recorder:
    """Stands for both packages: writes down what it is called with."""

    def __init__(self, *arguments: object, **named: object) -> None:
        self.calls: list[tuple] = [("init", arguments, named)]

    def __getattr__(self, name: str):
        return lambda *arguments, **named: self.calls.append((name, arguments, named))


def test_tensorboard_gets_the_same(tmp_path, monkeypatch):
    writers = []
    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = lambda *a, **named: writers.append(Recorder(*a, **named)) or writers[-1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    rows, _ = trained(tmp_path, Log(tmp_path, tensorboard=True))
    (writer,) = writers
    assert writer.calls[0] == ("init", (str(tmp_path / "tensorboard"),), {"purge_step": 1})
    scalars = [arguments for name, arguments, _ in writer.calls if name == "add_scalar"]
    losses = [(step, value) for name, value, step in scalars if name == "train/loss"]
    assert [step for step, _ in losses] == list(range(1, 9))
    assert [v for _, v in losses] == pytest.approx([float(row["loss"]) for row in rows], rel=1e-8)
    assert [step for name, _, step in scalars if name == "val/accuracy"] == [4, 8]
    assert writer.calls[-1][0] == "close"


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    runs = []
    package = types.ModuleType("wandb")
    package.init = lambda **named: runs.append(Recorder(**named)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", package)
    for step in (0, 5, 0):
        log = Log(tmp_path, wandb=True)
        log.start(step)
        log.step(step + 1, 1, 0.1, [2.0])
        log.close()
    first, resumed, anew = (run.calls[0][2]["id"] for run in runs)
    assert first == resumed != anew
    assert runs[1].calls[1:] == [
        ("log", ({"train/lr": 0.1, "train/loss": 2.0},), {"step": 6}), ("finish", (), {}),
    ]  # fmt: skip


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    module = "torch.utils.tensorboard" if package == "tensorboard" else package
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs: pip install {package}"):
        Log(tmp_path, **{package: True})
