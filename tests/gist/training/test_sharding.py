"""Trainings whose frozen weights are sharded: the result of one process, and its files."""

from __future__ import annotations

import json
import os
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor
from training import in_processes, model, stripes, train_in, trained_in

import gist
from gist import cli
from gist.runs.run import load_run
from gist.training.batches import BatchSampler
from gist.training.config import TrainConfig
from gist.training.evaluation import processes
from gist.training.loop import fit
from gist.training.sharding import check_shards, shard_frozen

# 49 images: the last of an epoch's four batches has one, and the second process none of it.
CONFIG = TrainConfig(epochs=2, batch_size=16, lr=1e-2, warmup_epochs=0.5, seed=4)
IMAGES = 49
# Norms that are trained stand within sharded blocks.
METHODS = (gist.Adapter(rank=4, scale=0.7), gist.LayerNormTuning())


def train(directory: Path, config: TrainConfig, shard: bool, stop: int | None = None) -> None:
    def on_step(step: int, loss: float) -> None:
        if step == stop:
            os._exit(3)

    train_in(
        directory, config, images=IMAGES, on_step=on_step, shard=shard,
        gist_config=gist.GistConfig(METHODS, token_dropout=0.0),
    )  # fmt: skip


def test_shards_give_the_result_of_one_process(tmp_path):
    alone, shards = tmp_path / "alone", tmp_path / "shards"
    config = replace(CONFIG, ema=0.5, clip_grad_norm=1.0)
    train(alone, config, shard=False)
    # One of the three parts of the last batch is left for the second process to fill.
    assert in_processes(train, shards, config, True, count=2) == [0, 0]
    expected, found = trained_in(alone), trained_in(shards)
    assert found["best_epoch"] == expected["best_epoch"]
    for name, value in expected["trainables"].items():
        torch.testing.assert_close(found["trainables"][name], value, rtol=0, atol=1e-5)
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert ours["val_accuracy"] == theirs["val_accuracy"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)


@pytest.mark.slow
def test_a_killed_training_on_shards_resumes(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert in_processes(train, whole, CONFIG, True, count=2) == [0, 0]
    assert in_processes(train, resumed, CONFIG, True, 5, count=2) == [3, 3]
    assert in_processes(train, resumed, CONFIG, True, count=2) == [0, 0]
    ours, expected = trained_in(resumed), trained_in(whole)
    assert ours.pop("went_on_after") == [4]
    assert all(torch.equal(v, expected["trainables"][k]) for k, v in ours["trainables"].items())
    assert (ours["log"], ours["history"]) == (expected["log"], expected["history"])


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (3, 2)])
def test_every_process_has_as_many_parts(count, accumulate):
    def parts(process, fill):
        order = BatchSampler(
            IMAGES, 16, 1, accumulate=accumulate, process=process, processes=count, fill=fill
        )
        return order.start(1), list(order)

    for process in range(count):
        steps, own = parts(process, True)
        plain, images = parts(process, False)
        assert [step.parts for step in steps] == [step.parts for step in parts(0, True)[0]]
        assert [step.parts - step.fillers for step in steps] == [step.parts for step in plain]
        fillers = sum(step.fillers for step in steps)
        assert fillers == (process > 0)  # of the last image, which the first process counts
        assert own == images + [parts(0, False)[1][-1]] * fillers


def state_of_shards() -> None:
    processes("cpu")
    trained = model(config=gist.GistConfig(METHODS))
    shard_frozen(trained, "cpu")
    parts = [p for p in trained.parameters() if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in parts)
    assert not any(isinstance(p, DTensor) for p in trained.parameters() if p.requires_grad)
    blocks = trained.backbone.blocks
    local = sum(p.to_local().numel() for p in blocks.parameters() if isinstance(p, DTensor))
    assert local == sum(p.numel() for p in blocks.parameters() if not p.requires_grad) // 2
    assert gist.explain(trained) == "blocks 0 to 1: fused sublayers, served by 'cpu'"
    full = model(config=gist.GistConfig(gist.Full(), gist=False))
    with pytest.raises(ValueError, match="the method trains all of the blocks'"):
        shard_frozen(full, "cpu")
    from torch.distributed.fsdp import fully_shard

    whole = model()
    fully_shard(whole, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="trained parameters in shards; let gist.training"):
        fit(whole, stripes(8, 1), None, CONFIG)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_frozen_weights_are_shards_and_trained_ones_whole():
    assert in_processes(state_of_shards, count=2) == [0, 0]


def test_what_can_not_be_sharded_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="this is the only one; start several, such as torchrun"):
        shard_frozen(model(), "cpu")
    with pytest.raises(ValueError, match="needs the device cpu or cuda; it is mps"):
        check_shards("mps", 2)
    # Before any data are read.
    code = cli.main(["train", "--fsdp", "--data", str(tmp_path / "nowhere"), "--device", "cpu"])
    assert code == 2
    assert "torchrun --nproc_per_node 2 -m gist.cli train" in capsys.readouterr().err


def command(folder: Path, out: Path, said: Path) -> None:
    with (said / os.environ.get("RANK", "0")).open("w") as file, redirect_stdout(file):
        code = cli.main([
            "train", "--fsdp", "--data", str(folder), "--out", str(out), "--device", "cpu",
            "--model", "vit_tiny_patch16_224", "--random-weights", "--img-size", "32",
            "--epochs", "2", "--batch-size", "4", "--warmup-epochs", "0",
        ])  # fmt: skip
    os._exit(code)


@pytest.mark.slow
def test_the_command_line_on_shards(tmp_path):
    random = np.random.default_rng(0)
    for index in range(18):
        place = tmp_path / "images" / "abc"[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 90, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")
    images, out, said = (tmp_path / name for name in ("images", "out", "said"))
    said.mkdir()
    assert in_processes(command, images, out, said, count=2) == [0, 0]
    assert "Results, weights and curves" in (said / "0").read_text()
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter.safetensors", "config.json", "curves.png", "log.csv",
        "predictions.csv", "report.html", "results.json",
    }  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert (results["machine"]["processes"], results["machine"]["fsdp"]) == (2, True)
    trained = load_run(out)  # in one process, and only onto the weights of the training
    assert gist.explain(trained).startswith("blocks 0 to 11: fused sublayers")
