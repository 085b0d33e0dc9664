"""A killed training resumes and ends with the bits of one that was not killed."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import in_processes, kill_at, model, stripes, train_in, trained_in

import gist
from gist.training.config import TrainConfig
from gist.training.loop import fit
from gist.training.state import ResumeFile

# Four steps an epoch, the last of two images; the state is saved at 3, 4, 6, 8, 9, 12, 15, 16.
PLAIN = TrainConfig(epochs=4, batch_size=16, lr=1e-2, warmup_epochs=0.5, seed=5)
# All that draws at random or keeps a state of its own.
ALL = replace(
    PLAIN, accumulate=3, mixup=0.4, cutmix=1.0, ema=0.7, clip_grad_norm=1.0, label_smoothing=0.1,
    optimizer="nadamw", head_lr=3e-2,
)  # fmt: skip
CONFIGS = {"plain": PLAIN, "all": ALL}
DROPOUT = {"gist_config": gist.GistConfig(token_dropout=0.2), "drop_path": 0.3}


def train(directory: Path, config: TrainConfig, kill: int | None = None) -> None:
    train_in(directory, config, on_step=kill_at(kill) if kill else None, **DROPOUT)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    found = {}
    for name, config in CONFIGS.items():
        directory = tmp_path_factory.mktemp(name)
        assert in_processes(train, directory, config) == [0]
        found[name] = trained_in(directory)
        assert found[name].pop("went_on_after") == []
    return found


def assert_same(directory: Path, expected: dict, after: int | None) -> None:
    found = trained_in(directory)
    assert found.pop("went_on_after") == ([] if after is None else [after])
    assert found.keys() == expected.keys()
    ours, theirs = found.pop("trainables"), dict(expected)
    theirs = theirs.pop("trainables")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found == {key: expected[key] for key in found}
    steps = [int(row.split(",")[0]) for row in found["log"].splitlines()[1:]]
    assert steps == list(range(1, 17))


@pytest.mark.parametrize(
    ("kill", "after"),
    [
        (2, None),  # before anything was saved
        (5, 4),  # right after an epoch's end
        (8, 6),  # at an epoch's last step, before it is measured
        (11, 9),  # in a middle epoch
        (16, 15),  # at the very last step
    ],
)
def test_killed_once(tmp_path, uninterrupted, kill, after):
    assert in_processes(train, tmp_path, ALL, kill) == [-signal.SIGKILL]
    assert in_processes(train, tmp_path, ALL) == [0]
    assert_same(tmp_path, uninterrupted["all"], after)


@pytest.mark.parametrize("name", CONFIGS)
def test_killed_again_and_again(tmp_path, uninterrupted, name):
    for kill in (2, 4, 5, 7, 13):
        assert in_processes(train, tmp_path, CONFIGS[name], kill) == [-signal.SIGKILL]
    assert in_processes(train, tmp_path, CONFIGS[name]) == [0]
    assert_same(tmp_path, uninterrupted[name], 12)


def test_killed_after_the_last_epoch(tmp_path, uninterrupted):
    assert in_processes(train, tmp_path, ALL) == [0]
    assert in_processes(train, tmp_path, ALL) == [0]  # its state is still there, all done
    assert_same(tmp_path, uninterrupted["all"], 16)


def kill_while_saving(directory: Path, config: TrainConfig, save: int) -> None:
    """Dies at its n-th save, the new file written and not yet in its place."""
    rename, saves = Path.replace, []

    def replace_(self: Path, target: Path) -> Path:
        saves.append(target.name == "resume.pt")
        if sum(saves) == save:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.replace = replace_  # type: ignore[method-assign]
    train(directory, config)


def test_killed_while_saving(tmp_path, uninterrupted):
    assert in_processes(kill_while_saving, tmp_path, ALL, 5) == [-signal.SIGKILL]  # at step 9
    assert in_processes(train, tmp_path, ALL) == [0]
    assert_same(tmp_path, uninterrupted["all"], 8)


def fill_the_disk(directory: Path, config: TrainConfig) -> None:
    """From step 7 on no file may grow beyond 4 KiB; checks what the save at step 8 raises."""

    def on_step(step: int, loss: float) -> None:
        if step == 7:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    with pytest.raises(OSError, match=r"File too large.*resume\.pt"):
        train_in(directory, config, on_step=on_step, **DROPOUT)


def test_a_full_disk_loses_no_earlier_state(tmp_path, uninterrupted):
    assert in_processes(fill_the_disk, tmp_path, ALL) == [0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "resume.pt"]
    assert in_processes(train, tmp_path, ALL) == [0]
    assert_same(tmp_path, uninterrupted["all"], 6)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    resume_file = ResumeFile(tmp_path / "file" / "resume.pt", {})
    with pytest.raises(OSError, match=r"file"):
        resume_file.save({})


def test_interrupted_and_gone_on_with(tmp_path):
    def interrupt(step, loss):
        if step == 11:
            raise KeyboardInterrupt

    first = train_in(tmp_path / "a", PLAIN, on_step=interrupt)
    assert (first.interrupted, len(first.history)) == (True, 2)
    second = train_in(tmp_path / "a", PLAIN)
    assert not second.interrupted
    train_in(tmp_path / "b", PLAIN)
    found, whole = trained_in(tmp_path / "a"), trained_in(tmp_path / "b")
    assert found.pop("went_on_after") == [9]
    assert all(torch.equal(whole["trainables"][k], v) for k, v in found["trainables"].items())
    assert (found["log"], found["history"]) == (whole["log"], whole["history"])


def test_without_saves_between_epochs(tmp_path):
    assert in_processes(_kill_at_epoch, tmp_path, 2) == [-signal.SIGKILL]
    train_in(tmp_path, PLAIN, every=0)
    assert trained_in(tmp_path)["went_on_after"] == [8]


def _kill_at_epoch(directory: Path, epoch: int) -> None:
    def on_epoch(finished) -> None:
        if finished.epoch == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    train_in(directory, PLAIN, every=0, on_epoch=on_epoch)


def test_anothers_state_is_not_gone_on_with(tmp_path):
    train_in(tmp_path, PLAIN)
    before = (tmp_path / "resume.pt").read_bytes()
    with pytest.raises(FileExistsError, match=r"resume\.pt holds another run \(it differs in lr\)"):
        train_in(tmp_path, replace(PLAIN, lr=1e-3))
    assert (tmp_path / "resume.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no archive", "cut"])
def test_a_damaged_state_is_named(tmp_path, content):
    train_in(tmp_path, replace(PLAIN, epochs=1))
    path = tmp_path / "resume.pt"
    path.write_bytes(path.read_bytes()[:500] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"resume\.pt is not a training's state"):
        train_in(tmp_path, replace(PLAIN, epochs=1))


def test_a_state_of_more_processes_is_refused(tmp_path):
    resume_file = ResumeFile(tmp_path / "resume.pt", {})
    fit(model(), stripes(20, 1), stripes(9, 2), replace(PLAIN, epochs=1), resume_file=resume_file)
    state = resume_file.load()
    resume_file.save({**state, "generators": state["generators"] * 2})
    with pytest.raises(ValueError, match="was written by 2 processes"):
        fit(
            model(),
            stripes(20, 1),
            stripes(9, 2),
            replace(PLAIN, epochs=1),
            resume_file=resume_file,
        )
