"""Every backbone that gist.wrap takes, from the command line; and what it refuses, at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from gist import cli
from gist.runs.run import load_run

EVA = "vit_small_patch16_dinov3"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            pixels = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / name / "x.png")
    return tmp_path / "data"


@pytest.fixture
def saved_vit(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=8,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "my vit")
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "my vit")
    return tmp_path / "my vit"


def train(folder: Path, *more: str) -> int:
    return cli.main(
        ["train", "--data", str(folder), "--device", "cpu", "--epochs", "1", "--method", "lora",
         "--warmup-epochs", "0", "--lr", "0.01", *more]
    )  # fmt: skip


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


@pytest.mark.slow
def test_an_eva_trains_predicts_and_merges(folder, tmp_path, capsys):
    weights, out = tmp_path / "w.pth", tmp_path / "out"
    torch.save({"state_dict": timm.create_model(EVA).state_dict()}, weights)
    options = ["--model", EVA, "--weights", str(weights), "--img-size", "32", "--out", str(out)]
    assert train(folder, *options) == 0
    assert json.loads((out / "results.json").read_text())["img_size"] == 32
    capsys.readouterr()
    assert cli.main(["predict", str(out), str(folder / "test"), "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main(["merge", str(out), "--drop-token", "--device", "cpu"]) == 0
    assert f"weights of timm.create_model('{EVA}', num_classes=2, img_size=32)" in said(capsys)
    plain = timm.create_model(EVA, num_classes=2, img_size=32)
    plain.load_state_dict(load_file(out / "merged.safetensors"))


def test_a_folder_of_transformers_trains_predicts_and_merges(
    saved_vit, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert train(folder, "--model", f"hf:{saved_vit}", "--pretrained", "--no-gist") == 0
    out = tmp_path / "runs" / "data-my vit-lora-plain-seed0"
    results = json.loads((out / "results.json").read_text())
    assert (results["img_size"], results["normalisation"]["mean"]) == (32, [0.1, 0.2, 0.3])
    capsys.readouterr()
    assert cli.main(["predict", str(out), str(folder / "test"), "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main(["merge", str(out), "--device", "cpu"]) == 0
    assert "AutoModelForImageClassification.from_pretrained('" in said(capsys)

    import transformers

    plain = transformers.AutoModelForImageClassification.from_pretrained(out / "merged").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = load_run(out)(images)
        torch.testing.assert_close(plain(images).logits, expected, rtol=1e-4, atol=1e-4)
    assert cli.main(["merge", str(out), "--device", "cpu"]) == 2
    assert "merged exists already" in said(capsys)
    # What was merged is a backbone again.
    again = ["--model", f"hf:{out / 'merged'}", "--pretrained", "--out", str(tmp_path / "again")]
    assert train(folder, *again) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet18"], "it is a ResNet, which has no sequence of tokens"),
        (["--model", "eva02_tiny_patch14_224", "--img-size", "32"], "patch size, 14; take 28"),
        (
            ["--model", "vit_small_patch16_dinov3_qkvb", "--method", "ssf"],
            "which this backbone adds apart from the layer",
        ),
        (["--model", "hf:nowhere"], "nowhere has no config.json"),
        (["--model", "test_vit", "--weights", "missing.pth"], "there is no file missing.pth"),
    ],
)
@pytest.mark.parametrize("command", ["train", "vtab run"])
def test_a_model_is_refused_before_images_are_read(
    command, options, message, tmp_path, capsys, monkeypatch
):
    def read(*arguments, **options):
        raise AssertionError("images were read")

    for place in ("cli.train.load_data", "cli.suites.load_data", "cli.suites.read_lists"):
        monkeypatch.setattr(f"gist.{place}", read)
    if "--weights" not in options:
        options = [*options, "--random-weights"]
    if command == "train":
        assert train(tmp_path, *options) == 2
    else:
        method = [] if "--method" in options else ["--method", "lora"]
        assert cli.main(["vtab", "run", str(tmp_path), "--device", "cpu", *method, *options]) == 2
    assert message in said(capsys)


def test_a_suite_needs_every_tasks_drop_path(saved_vit, tmp_path, capsys):
    run = ["vtab", "run", str(tmp_path), "--model", f"hf:{saved_vit}", "--pretrained"]
    assert cli.main([*run, "--device", "cpu"]) == 2
    assert "has no stochastic depth; drop_path must be 0" in said(capsys)
    assert cli.main([*run, "--drop-path", "0", "--tasks", "cifar", "--device", "cpu"]) == 2
    assert "cifar: no such folder" in said(capsys)
