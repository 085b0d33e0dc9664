"""The one command for a machine with a GPU, with parts that need none."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from bench import visit


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch, capsys):
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        visit,
        "parts",
        lambda out: [
            ("broken", python("raise SystemExit('it broke')"), 20),
            ("endless", python("import time; time.sleep(60)"), 0.5),
            ("good", python("print('it went well')"), 20),
        ],
    )
    run = {
        "benchmark": "loss",
        "machine": {"device": "a device"},
        "limits": {"copy": 1.0},
        "absent": {},
        "cases": [
            {
                "sizes": {"B": 1},
                "parity": "ok",
                "results": {"ours": {"median": 1.0, "q20": 1.0, "q80": 1.0, "times_ours": 1.0}},
            }
        ],
    }
    (tmp_path / "loss.json").write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["visit", str(tmp_path)])
    visit.main()
    printed = capsys.readouterr().out
    assert "broken: FAILED in" in printed
    assert "endless: stopped after 0 s" in printed
    assert re.search("good: done in .*; it went well", printed)
    assert "B 1" in printed
    log = (tmp_path / "log.txt").read_text()
    assert "it broke" in log
    assert "it went well" in log


def test_without_a_device_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["visit", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="needs a CUDA or ROCm device"):
        visit.main()
    assert not (tmp_path / "out").exists()


def test_no_more_than_eight_minutes_and_eight_files(tmp_path):
    parts = visit.parts(tmp_path)
    assert [name for name, _, _ in parts][:3] == ["native module", "tests", "loss"]
    # log, summary, sweep, and a JSON file for each benchmark
    benchmarks = [command for _, command, _ in parts if "bench" in command]
    assert len(benchmarks) + 3 <= 8
    assert all("--no-plots" in command for command in benchmarks)
