"""``gist tune`` on image files: killed, resumed, and the command that it prints."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training import in_processes, kill_at

from gist import cli
from gist.cli.tune import train_command
from gist.tuning import Candidate, search

TUNE = ["tune", "--model", "test_vit", "--random-weights", "--img-size", "32", "--device", "cpu"]
SCHEDULE = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "4", "--augment", "none"]
RUN = [*TUNE, *SCHEDULE, "--method", "lora", "bitfit", "--trials", "3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, blanks in their path, with train, val and test."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4), ("test", 2)):
        for channel, name in enumerate(("red", "green")):
            place = tmp_path / "my images" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 150, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 60
                Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path / "my images"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


def trials_of(out: Path) -> list[dict[str, Any]]:
    trials = json.loads((out / "tune.json").read_text())["trials"]
    return [{**trial, "seconds": None} for trial in trials]


def tune(folder: Path, out: Path, kill: int | None = None) -> None:
    """Dies at the first trial's step ``kill``, if given."""
    course = search._Course

    class Killed(course):
        def step(self, step: int, loss: float) -> None:
            if kill and self._trial.number == 0:
                kill_at(kill)(step, loss)
            super().step(step, loss)

    search._Course = Killed  # type: ignore[misc]
    os._exit(cli.main([*RUN, "--data", str(folder), "--out", str(out)]))


@pytest.mark.slow
def test_killed_within_a_trial_it_resumes_and_its_command_trains_the_best(folder, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert in_processes(tune, folder, cut, 5) == [-signal.SIGKILL]  # in the second epoch
    assert (cut / "trials" / "000" / "resume.pt").is_file()
    assert in_processes(tune, folder, cut) == [0]
    command = [*RUN, "--data", str(folder), "--out", str(whole)]
    assert cli.main(command) == 0
    assert trials_of(cut) == trials_of(whole)
    assert not list(tmp_path.rglob("resume.pt"))
    printed = capsys.readouterr().out

    # Repeated, nothing is trained again but the best, by its command's own settings.
    assert cli.main([*command, "--train-best"]) == 0
    best = max(trials_of(whole), key=lambda t: (t["val_accuracy"], -t["val_loss"]))
    results = json.loads((whole / "best" / "results.json").read_text())
    assert results["val_accuracy"] == best["val_accuracy"]
    assert results["test"]["images"] == 4
    (line,) = [each for each in printed.splitlines() if each.startswith("    gist train")]
    words = shlex.split(line)
    assert words[words.index("--data") + 1] == str(folder)
    capsys.readouterr()
    assert cli.main(words[1:]) == 0
    assert "finished earlier" in said(capsys)
    assert results["config"]["train"]["lr"] == best["candidate"]["lr"]


def test_the_command_has_what_is_not_the_default():
    import argparse

    from gist.cli.train import add_options

    parser = argparse.ArgumentParser()
    add_options(parser)
    given = [
        "--data", "-odd name", "--model", "test_vit", "--pretrained", "--no-check", "--no-gist",
        "--loss", "kl_weights=[1,0]", "--loss", "distance=kl", "--ema", "0.9", "--patience", "3",
        "--drop-path", "-1",
    ]  # fmt: skip
    given[1:2] = []
    given[0] = "--data=-odd name"
    arguments = parser.parse_args(given)
    candidate = Candidate(1e-5, 0.25, "lora", {"rank": 2, "alpha": 1.5})
    words = train_command(arguments, candidate, Path("o"))
    assert words[:2] == ["gist", "train"]
    again = parser.parse_args(words[2:])
    chosen = {"lr": 1e-5, "weight_decay": 0.25, "method": "lora", "set": ["rank=2", "alpha=1.5"]}
    assert vars(again) == {**vars(arguments), **chosen, "out": Path("o")}
    assert not {"--epochs", "--batch-size", "--weights"} & set(words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "1", "2", "3"], "--lr takes one value, or the lowest and the highest"),
        (["--lr", "0.1", "0.01"], "lr must be a range"),
        (["--set", "rank=2"], "--set needs one --method"),
        (["--method", "lora", "--set", "size=2"], "--set 'size=2': not KEY=VALUE"),
        (["--method", "lora", "loar"], "method: 'loar' is not known"),
        (["--trials", "0"], "trials must be above 0"),
    ],
)
def test_options_that_can_not_be_used_are_said(options, message, folder, capsys):
    assert cli.main([*TUNE, "--data", str(folder), *options]) == 2
    assert message in said(capsys)


def test_methods_that_do_not_fit_are_left_out_unless_named(folder, tmp_path, monkeypatch, capsys):
    spaces = []

    def tuned(config, data, out, *, space, **options):
        spaces.append((space, config.train))
        raise KeyboardInterrupt

    monkeypatch.setattr("gist.cli.tune.tune", tuned)
    qkvb = [*TUNE, "--data", str(folder), "--model", "vit_small_patch16_dinov3_qkvb"]
    assert cli.main(qkvb) == 130
    assert spaces[-1][0].methods == ("adapter", "adaptformer", "lora")
    fixed = ["--lr", "0.02", "--weight-decay", "0.1", "0.2", "--method", "lora", "--set", "rank=3"]
    assert cli.main([*TUNE, "--data", str(folder), *fixed]) == 130
    space, schedule = spaces[-1]
    assert (space.lr, space.weight_decay, space.methods) == (None, (0.1, 0.2), ("lora",))
    assert (space.fixed, schedule.lr) == ({"rank": 3}, 0.02)
