"""Runs on augmented images: the same bits with any workers and after a kill; what they record."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training import in_processes, kill_at

from gist import cli
from gist.data import DataError, Transforms, load_data, prepare
from gist.runs.inputs import BALANCES, balanced_class_weights, balanced_weights
from gist.runs.predict import predict
from gist.runs.run import Listener, RunConfig, load_run, run, transforms_of
from gist.training.batches import BatchSampler
from gist.training.config import TrainConfig
from gist.training.loading import default_workers, workers_for

SIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of different size; 14 images to train, of which the last batch has two."""
    root, random = tmp_path_factory.mktemp("images") / "data", np.random.default_rng(0)
    for split, counts in (("train", (10, 4)), ("val", (3, 3))):
        for channel, name in enumerate(("red", "green")):
            (root / split / name).mkdir(parents=True)
            for index in range(counts[channel]):
                pixels = random.integers(0, 120, (30, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(root / split / name / f"{index}.jpg", quality=95)
    return root


def train(
    folder: Path,
    out: Path,
    workers: int | None,
    augment: str = "strong",
    sampling: str = "uniform",
    class_weights: str = "uniform",
    kill: int | None = None,
) -> dict[str, Any]:
    listener = Listener()
    if kill:
        listener.step = kill_at(kill)  # type: ignore[method-assign]
    config = RunConfig(
        str(folder), "test_vit", img_size=SIDE, augment=augment, sampling=sampling,
        class_weights=class_weights,
        train=TrainConfig(epochs=3, batch_size=4, lr=1e-2, warmup_epochs=0, seed=3),
    )  # fmt: skip
    data = load_data(str(folder))
    return run(config, data, out, workers=workers, save_every=3, listener=listener)


def test_no_worker_outlives_a_training(folder, tmp_path):
    train(folder, tmp_path / "run", 2)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_turns_out_unreadable_is_named(folder, tmp_path, workers):
    copy = shutil.copytree(folder, tmp_path / "data")
    broken = copy / "train" / "red" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    config = RunConfig(str(copy), "test_vit", img_size=SIDE, augment="light")
    data = load_data(str(copy), check=False)
    with pytest.raises(DataError) as error:
        run(config, data, tmp_path / "run", workers=workers)
    assert str(error.value).startswith(f"{broken} can't be read: ")
    assert len(str(error.value).splitlines()) == 1


def written(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("adapter.safetensors", "log.csv")]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each sampling, without workers."""
    out = tmp_path_factory.mktemp("whole")
    for sampling in BALANCES:
        assert in_processes(train, folder, out / sampling, 0, "strong", sampling) == [0]
    assert written(out / "uniform") != written(out / "balanced")
    return {sampling: out / sampling for sampling in BALANCES}


@pytest.mark.parametrize(("workers", "sampling"), [(1, "uniform"), (2, "balanced")])
def test_any_number_of_workers_gives_the_same_bits(folder, whole, tmp_path, workers, sampling):
    # In this process: those of in_processes are daemons, which have no children.
    train(folder, tmp_path / "run", workers, sampling=sampling)
    assert written(tmp_path / "run") == written(whole[sampling])


@pytest.mark.parametrize(
    ("kill", "sampling"), [(2, "uniform"), (6, "balanced"), (11, "uniform"), (11, "balanced")]
)
def test_a_killed_run_resumes_to_the_same_bits(folder, whole, tmp_path, kill, sampling):
    out = tmp_path / "run"
    assert in_processes(train, folder, out, 0, "strong", sampling, "uniform", kill) == [
        -signal.SIGKILL
    ]
    assert not (out / "results.json").exists()
    train(folder, out, 2, sampling=sampling)
    assert written(out) == written(whole[sampling])


def test_balanced_class_weights():
    assert balanced_class_weights([0] * 6 + [1] * 2, 2) == pytest.approx([8 / 12, 8 / 4])
    assert balanced_class_weights([0, 0, 2, 2], 3) == pytest.approx([1, 2, 1])


def test_class_weights_change_the_loss_and_not_the_data(folder, tmp_path):
    for name in BALANCES:
        train(folder, tmp_path / name, 0, "none", class_weights=name)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in BALANCES]
    first = [float(log[1].split(",")[3]) for log in logs]
    # Before the first update: 10 red images of weight 0.7 and 4 green ones of 1.75.
    assert first[0] != pytest.approx(first[1], rel=1e-3)
    with pytest.raises(ValueError, match="both balance the classes; choose one"):
        RunConfig("x", "test_vit", sampling="balanced", class_weights="balanced")


def test_balanced_sampling_draws_each_class_equally_often():
    labels = [0] * 90 + [1] * 9 + [3]
    weights = balanced_weights(labels)
    batches = BatchSampler(100, 7, seed=2, draws=True, weights=weights)
    seen: Counter[int] = Counter()
    for epoch in range(1, 31):
        batches.start(epoch)
        draws = [draw for part in batches for draw in part]
        assert len(draws) == 100
        assert {draw.epoch for draw in draws} == {epoch}
        # Each use of an image has a draw of its own.
        assert len(set(draws)) == 100
        assert max(draw.repeat for draw in draws if draw.image == 99) > 10
        seen.update(labels[draw.image] for draw in draws)
    assert all(900 < seen[label] < 1100 for label in (0, 1, 3))
    with pytest.raises(ValueError, match="one number per image, 4; they have 3"):
        BatchSampler(4, 2, seed=0, weights=[1, 1, 1])


def test_augmentation_changes_a_training(folder, tmp_path):
    train(folder, tmp_path / "none", 0, "none")
    train(folder, tmp_path / "light", 0, "light")
    assert written(tmp_path / "none")[1] != written(tmp_path / "light")[1]


def test_results_record_the_transforms(whole):
    out = whole["uniform"]
    recorded = json.loads((out / "results.json").read_text())["transforms"]
    assert recorded["preset"] == "strong"
    assert recorded["evaluation"]["input_size"] == [3, SIDE, SIDE]
    assert recorded["evaluation"]["crop_pct"] == 0.95  # test_vit's own
    assert recorded["training"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert transforms_of(out).to_dict() == recorded


def probabilities(out: Path, folder: Path) -> list[float]:
    return [found.probability for found in predict(out, [folder / "val"])]


def expected(out: Path, folder: Path, transforms: Transforms) -> Any:
    images = prepare(load_data(str(folder)).val, transforms)
    by_name = torch.stack([images[i][0] for i in (3, 4, 5, 0, 1, 2)])  # green before red
    with torch.no_grad():
        found = load_run(out)(torch.cat([by_name[3:], by_name[:3]])).softmax(1).max(1).values
    return pytest.approx(found.tolist(), abs=1e-6)


def test_prediction_prepares_images_as_recorded(folder, tmp_path):
    out = tmp_path / "run"
    train(folder, out, 0, "light")
    results = json.loads((out / "results.json").read_text())
    recorded = results.pop("transforms")
    ours = probabilities(out, folder)
    assert ours == expected(out, folder, Transforms.from_dict(recorded))

    recorded["evaluation"]["crop_pct"] = 0.5
    (out / "results.json").write_text(json.dumps({**results, "transforms": recorded}))
    assert probabilities(out, folder) == expected(out, folder, Transforms.from_dict(recorded))
    assert probabilities(out, folder) != pytest.approx(ours, abs=1e-6)


def test_an_earlier_versions_run_is_vtabs(folder, tmp_path):
    out = tmp_path / "run"
    train(folder, out, 0, "vtab")
    results = json.loads((out / "results.json").read_text())
    del results["transforms"]
    assert "augment" not in results["config"]  # as an earlier version wrote it
    (out / "results.json").write_text(json.dumps(results))
    assert transforms_of(out) == Transforms.of("vtab", results["normalisation"], SIDE)
    assert probabilities(out, folder) == expected(out, folder, transforms_of(out))
    assert train(folder, out, 0, "vtab")["reused"]
    with pytest.raises(FileExistsError, match="it differs in augment"):
        train(folder, out, 0, "light")


def test_the_command_line_trains_with_light_and_merges_with_what_was_recorded(
    folder, tmp_path, capsys
):
    out = tmp_path / "out"
    options = ["--method", "lora", "--model", "test_vit", "--random-weights",
               "--img-size", str(SIDE), "--epochs", "1",
               "--warmup-epochs", "0", "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert cli.main(["train", "--data", str(folder), *options]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["augment"] == results["transforms"]["preset"] == "light"
    capsys.readouterr()
    assert cli.main(["merge", str(out), "--drop-token", "--device", "cpu"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"6 validation images: {results['val_accuracy']:.2%} as trained" in said
    assert "images as timm.data.create_transform(input_size=[3, 16, 16]," in said


def test_workers_by_default_and_none_for_images_in_memory(folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert [default_workers(n) for n in (1, 2, 6, 12)] == [6, 3, 1, 1]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert default_workers() == 8
    transforms = transforms_for(SIDE)
    data = load_data(str(folder))
    assert workers_for(prepare(data.val, transforms), 5) == 0
    monkeypatch.setattr("gist.data.base.PRELOAD_BYTES", 0)
    assert workers_for(prepare(data.val, transforms), 5) == 5


def transforms_for(side: int) -> Transforms:
    return Transforms.of("vtab", {"mean": (0.5,) * 3, "std": (0.5,) * 3}, side)
