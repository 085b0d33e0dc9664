"""gist bench --compare: what is slower than before fails, and noise does not."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch

from bench import __main__ as command
from bench import compare, measure

CPU = torch.device("cpu")
MACHINE = {"device": "a processor", "threads": 2, "torch": "2.14"}


def run_of(monkeypatch, *, ours=1.0, peer=3.0, noise=0.05, other=2.0, seed=0):
    """A run whose calls take what is said, times noise that all calls of a round share in part."""
    draw, now = random.Random(seed), [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: None)

    def taking(seconds):
        def call():
            now[0] += 0.01 * seconds * draw.lognormvariate(0, noise)

        return call

    calls = {"ours": taking(ours), "ours, eager": taking(2 * ours), "peer": taking(peer),
             "other": taking(other)}  # fmt: skip
    case = measure.Case({"B": 4}, torch.float32, calls, parity=lambda: None)
    found = measure.run(case, CPU, seconds=4.0)
    return {"benchmark": "loss", "machine": MACHINE, "limits": {}, "absent": {}, "cases": [found]}


def change(old, new):
    (found,), without = compare.changes(old, new)
    assert without == []
    return found


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({}, "alike"),
        ({"ours": 1.2}, "slower"),
        ({"ours": 1.03}, "alike"),  # within the noise and what is tolerated
        ({"ours": 0.8}, "faster"),
        ({"peer": 2.4}, "alike"),  # the peer became faster, or the machine slower as a whole
        ({"ours": 2.0, "peer": 6.0, "other": 4.0}, "alike"),
    ],
)
def test_slower_against_every_peer_is_slower(monkeypatch, options, verdict):
    old = run_of(monkeypatch)
    for seed in range(1, 6):
        new = run_of(monkeypatch, seed=seed, **options)
        assert change(old, new).verdict(0.02) == verdict


def test_own_variants_do_not_hide_a_change(monkeypatch):
    new = run_of(monkeypatch, ours=1.5, seed=1)
    assert new["cases"][0]["peers"] == ["peer", "other"]
    found = change(run_of(monkeypatch), new)
    assert 1.4 < found.factor < 1.6
    assert found.low < found.factor < found.high


def test_a_case_without_its_like_is_told(monkeypatch):
    old = run_of(monkeypatch)
    for alter in (
        lambda case: case["sizes"].update(B=8),
        lambda case: case.update(parity="off by 3"),
        lambda case: case.update(peers=[]),
    ):
        new = copy.deepcopy(old)
        alter(new["cases"][0])
        changes, without = compare.changes(old, new)
        assert changes == []
        assert len(without) == 1


def test_the_interval_covers_the_median_as_often_as_it_says():
    draw = random.Random(0)
    for rounds, least in ((5, 0.93), (6, 0.95), (9, 0.95), (40, 0.95)):
        covered = 0
        for _ in range(2000):
            of = [draw.lognormvariate(0, 0.3) for _ in range(rounds)]
            low, high = measure.interval(of, [1.0] * rounds)
            covered += low <= 1 <= high
        assert least - 0.015 <= covered / 2000 <= 0.985


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda old: old.update(benchmark="step"), "is of the benchmark step, not of loss"),
        (lambda old: old["machine"].update(device="a GPU"), "measured with device a GPU"),
        (lambda old: old["machine"].update(threads=1), "measured with threads 1, not 2"),
        (lambda old: old["cases"][0].pop("peers"), "before ratios had intervals"),
        (lambda old: old.pop("cases"), "holds no results"),
    ],
)
def test_a_file_that_can_not_be_compared_is_refused(monkeypatch, tmp_path, alter, said):
    new = run_of(monkeypatch)
    old = copy.deepcopy(new) | {"machine": dict(MACHINE)}
    alter(old)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=said):
        compare.load(path, new)


def test_the_command_fails_where_ours_is_slower(monkeypatch, tmp_path, capsys):
    old = run_of(monkeypatch)
    (tmp_path / "loss.json").write_text(json.dumps(old))
    assert command._compare(run_of(monkeypatch, ours=1.3, seed=1), tmp_path, 0.02)
    assert "slower: loss, B 4, float32: 1.2" in capsys.readouterr().out
    assert not command._compare(run_of(monkeypatch, seed=1), tmp_path, 0.02)
    assert not command._compare(old | {"benchmark": "step"}, tmp_path, 0.02)
    assert "step is not compared" in capsys.readouterr().out
    assert not command._compare(run_of(monkeypatch, ours=1.3, seed=1), tmp_path, 0.5)
