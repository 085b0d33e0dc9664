"""What commands print: names in any encoding, warnings of what was not used, closed pipes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from marks import slow_where
from PIL import Image

from gist import cli

NAME = os.fsdecode(b"caf\xe9")  # not UTF-8
TRICKY = "b[red]:cat: $x_{$"  # markup and emoji to rich, a formula to matplotlib
TRAIN = ["--model", "test_vit", "--random-weights", "--img-size", "32", "--device", "cpu",
         "--epochs", "1", "--method", "none"]  # fmt: skip


def images(root: Path, *classes: str, prefix: str = "") -> Path:
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(3):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{prefix}{index}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return images(tmp_path / "photos", "a", "b")


@pytest.fixture
def tricky(tmp_path: Path) -> Path:
    """Folders and files with names that are not UTF-8, or that libraries interpret."""
    return images(tmp_path / f"{TRICKY} {NAME}", NAME, TRICKY, prefix=NAME)


def printed_as(encoding: str, monkeypatch, *arguments: str) -> tuple[int, bytes, bytes]:
    """A command's status and what it writes, in this encoding, to standard output and error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    status = cli.main(arguments)
    for stream in streams:
        stream.flush()
    out, error = (stream.buffer.getvalue() for stream in streams)  # type: ignore[attr-defined]
    return status, out, error


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_in_any_encoding_are_trained_on_and_printed_as_they_are(
    encoding, tricky, tmp_path, monkeypatch
):
    (tricky / NAME / f"{NAME}.txt").touch()
    monkeypatch.chdir(tmp_path)  # the folder of the results takes the data's name
    status, out, error = printed_as(encoding, monkeypatch, "train", "--data", str(tricky), *TRAIN)
    assert (status, b"error" in error) == (0, False)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == f"{tricky.name}-test_vit-none-gist-seed0"
    assert os.fsencode(f"Results, weights and curves: runs/{run.name}\n") in out
    assert b"warning: 1 passed over" in error
    assert os.fsencode(str(tricky / NAME / f"{NAME}.txt")) in error
    assert json.loads((run / "results.json").read_text())["config"]["data"] == str(tricky)
    assert json.loads((run / "config.json").read_text())["classes"] == sorted((NAME, TRICKY))
    with Image.open(run / "curves.png") as picture:
        picture.load()

    files = sorted(tricky.glob("*/*.png"))
    status, out, error = printed_as(
        encoding, monkeypatch, "predict", str(run), str(tricky), "--device", "cpu"
    )
    assert status == 0
    rows = out.splitlines()[1:]
    assert [row.partition(b".png,")[0] + b".png" for row in rows] == list(map(os.fsencode, files))
    assert {row.split(b",")[-2] for row in rows} <= {os.fsencode(NAME), TRICKY.encode()}


def test_what_an_encoding_lacks_is_escaped(tricky, tmp_path, monkeypatch):
    (tricky / NAME).rename(tricky / "猫")
    (tricky / "猫" / "x.png").write_bytes(b"")
    status, _, error = printed_as("latin-1", monkeypatch, "train", "--data", str(tricky), *TRAIN)
    assert status == 2
    assert rb"\u732b/x.png can't be read: the file is empty" in error


def test_what_is_passed_over_is_counted_and_the_first_named(folder, tmp_path, capsys):
    for index in range(5):
        (folder / "b" / f"{index}.dng").touch()
    assert cli.main(["train", "--data", str(folder), "--out", str(tmp_path / "out"), *TRAIN]) == 0
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "warning" in x)
    names = ", ".join(str(folder / "b" / f"{index}.dng") for index in range(3))
    assert line == f"warning: 5 passed over, not taken as images of a class: {names}, ..."
    found = cli.main(["predict", str(tmp_path / "out"), str(folder), "--device", "cpu"])
    captured = capsys.readouterr()
    assert (found, len(captured.out.splitlines())) == (0, 7)
    assert "warning: 5 passed over" in captured.err


def closed_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Images, and a run on them."""
    folder = images(tmp_path_factory.mktemp("data") / "photos", "a", "b")
    out = folder.parent / "out"
    assert cli.main(["train", "--data", str(folder), "--out", str(out), *TRAIN, "--no-gist"]) == 0
    return folder, out


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "RUN", "FOLDER", "--device", "cpu"],
        ["merge", "RUN", "--device", "cpu"],
        ["train", "--data", "FOLDER", "--out", "RUN", *TRAIN, "--no-gist"],
        ["backends"],
        ["data", "list"],
        ["--version"],
        ["vtab", "run", "--help"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("error_too", [False, True])
def test_a_reader_that_has_gone_ends_a_command_quietly(
    command, error_too, trained, tmp_path, monkeypatch, capsys
):
    folder, out = trained
    run = shutil.copytree(out, tmp_path / "out")
    capsys.readouterr()
    command = [{"RUN": str(run), "FOLDER": str(folder)}.get(word, word) for word in command]
    with monkeypatch.context() as patch, closed_pipe() as gone, closed_pipe() as gone_too:
        patch.setattr(sys, "stdout", gone)
        if error_too:
            patch.setattr(sys, "stderr", gone_too)
        assert cli.main(command) == 141
    assert capsys.readouterr().err == ""


def test_an_error_for_a_reader_that_has_gone_ends_quietly(monkeypatch):
    with monkeypatch.context() as patch, closed_pipe() as gone:
        patch.setattr(sys, "stderr", gone)
        assert cli.main(["predict", "nowhere", "nothing"]) == 141


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
    def breaks(name):
        raise BrokenPipeError(32, "Broken pipe", "a socket")

    monkeypatch.setattr("gist.cli.suites.SOURCES", {"x": type("", (), {"find": breaks})()})
    assert cli.main(["data", "list"]) == 2
    assert "Broken pipe: 'a socket'" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", slow_where(bool, ["", "1"]))
def test_the_interpreter_ends_quietly_too(unbuffered):
    with closed_pipe() as gone:
        found = subprocess.run(
            [sys.executable, "-m", "gist.cli", "data", "list"],
            stdout=gone,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (found.returncode, found.stderr) == (141, b"")
