"""The history of factors, on a small repository with made measurements."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from bench import history

FILE = "bench/results/machine/attention.json"


def measured(revision: str, *factors: float) -> str:
    cases = [
        {"sizes": {"B": size}, "results": {"SDPA": {"times_ours": factor}}}
        for size, factor in enumerate(factors, 1)
    ]
    return json.dumps({"benchmark": "attention", "machine": {"revision": revision}, "cases": cases})


def git(root, *arguments, **environment):
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments],
        cwd=root, check=True, capture_output=True, env=os.environ | environment,
    )  # fmt: skip


def commit(root, content: str, day: int) -> None:
    (root / FILE).write_text(content)
    git(root, "add", FILE)
    date = f"2026-01-{day:02}T12:00:00+0000"
    git(root, "commit", "-qm", "x", GIT_COMMITTER_DATE=date, GIT_AUTHOR_DATE=date)


@pytest.fixture
def root(tmp_path):
    (tmp_path / FILE).parent.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    commit(tmp_path, measured("aaa", 2.0), 1)
    commit(tmp_path, measured("bbb", 2.5, 3.0), 2)
    return tmp_path


def test_a_point_is_a_commit_with_other_figures(root):
    commit(root, json.dumps(json.loads(measured("bbb", 2.5, 3.0)), indent=2), 3)
    assert history.history(root, FILE) == [
        history.Point("2026-01-01", "aaa", {("B 1", "SDPA"): 2.0}),
        history.Point("2026-01-02", "bbb", {("B 1", "SDPA"): 2.5, ("B 2", "SDPA"): 3.0}),
    ]


def test_the_last_point_may_be_uncommitted(root):
    (root / FILE).write_text(measured("ccc", 2.6, 3.1))
    points = history.histories(root)["machine/attention"]
    assert [(point.date, point.revision) for point in points][1:] == [
        ("2026-01-02", "bbb"), ("not committed", "ccc"),
    ]  # fmt: skip


def test_it_draws_files_of_two_points_and_counts_all(root, capsys):
    (root / FILE).with_name("loss.json").write_text(
        '{"benchmark": "loss", "machine": {"revision": "ccc"}, "cases": []}'
    )
    drawn = []
    for _ in range(2):
        history.main(["--root", str(root)])
        drawn.append((root / history.FIGURE).read_bytes())
    assert drawn[0] == drawn[1]
    text = drawn[0].decode()
    # matplotlib draws text as paths and names it in a comment.
    assert "<!-- machine/attention -->" in text
    assert "<!-- B 2: SDPA -->" in text
    assert "machine/loss" not in text
    printed = capsys.readouterr().out
    assert "machine/attention: 2 points, 2026-01-01 to 2026-01-02" in printed
    assert "machine/loss: 1 point, not committed" in printed


def test_a_shallow_clone_is_refused(root, tmp_path_factory):
    clone = tmp_path_factory.mktemp("shallow")
    git(clone, "clone", "-q", "--depth", "1", root.as_uri(), ".")
    with pytest.raises(SystemExit, match="git fetch --unshallow"):
        history.main(["--root", str(clone)])


def test_no_clone_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit, match="git rev-parse"):
        history.main(["--root", str(tmp_path)])


def test_every_peer_is_in_its_file():
    """A renamed peer would silently leave the figure."""
    files = [f for f in history.ROOT.glob("bench/results/*/*.json") if f.stem in history.PEERS]
    assert {file.stem for file in files} == set(history.PEERS)
    for file in files:
        cases = json.loads(file.read_text())["cases"]
        for peer in history.PEERS[file.stem]:
            assert any("times_ours" in case["results"].get(peer, {}) for case in cases), (
                file,
                peer,
            )
