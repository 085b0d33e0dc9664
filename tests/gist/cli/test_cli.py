"""The command line: a training on a person's own folder, and what it says when something is off."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from marks import slow_where
from PIL import Image
from timm.data import resolve_model_data_config

import gist
import gist_kernels
from gist import cli
from gist.cli import common
from gist.cli import train as train_command
from gist.data import Transforms, load_data, prepare
from gist.runs.run import load_run

MODEL = "vit_tiny_patch16_224"
COLOURS = {"red ones": 0, "green": 1, "blue": 2}


def images(root: Path) -> Path:
    """A small image folder with train, val and test."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        for name, channel in COLOURS.items():
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 90, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(place / f"picture {index}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a name with blanks."""
    return images(tmp_path / "my images")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Images, and a run on them."""
    folder = images(tmp_path_factory.mktemp("data") / "my images")
    out = folder.parent / "out"
    assert train(folder, out, "--method", "none", "--lr", "0.01") == 0
    return folder, out


def train(folder: Path, out: Path, *more: str) -> int:
    options = ["--model", MODEL, "--random-weights", "--img-size", "32", "--device", "cpu"]
    schedule = ["--epochs", "2", "--batch-size", "4", "--warmup-epochs", "0"]
    return cli.main(["train", "--data", str(folder), "--out", str(out), *options, *schedule, *more])


@pytest.mark.parametrize(
    "more", [[], ["--no-gist", "--head-lr", "0.02"], ["--method", "none", "--no-gist"]]
)
def test_trains_on_a_folder_and_writes_everything(folder, tmp_path, more):
    out = tmp_path / "out"
    assert train(folder, out, *more) == 0
    assert {p.name for p in out.iterdir()} == {
        "README.md", "adapter.safetensors", "config.json", "curves.png", "log.csv",
        "predictions.csv", "report.html", "results.json",
    }  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert len(results["fit"]["history"]) == 2
    assert results["test"]["images"] == 6
    assert results["parameters"]["token"] == (0 if more else 192)
    assert results["parameters"]["method"] == (0 if "none" in more else 12 * (2 * 192 * 4 + 196))
    assert results["config"]["train"]["batch_size"] == 4
    assert results["config"]["train"]["head_lr"] == (0.02 if "--head-lr" in more else None)
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((out / "config.json").read_text())["classes"] == sorted(COLOURS)
    with Image.open(out / "curves.png") as picture:
        assert picture.size[0] > 500

    torch.manual_seed(0)  # the run's seed: the same random backbone again
    backbone = timm.create_model(MODEL, num_classes=3, img_size=32)
    model = gist.load(backbone, out)
    assert gist.count_parameters(model)._asdict() == results["parameters"]


@pytest.mark.parametrize("drop", [False, True])
def test_a_merged_run_is_a_plain_model(drop, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(folder, out, "--method", "lora", "--lr", "0.05") == 0
    trained = json.loads((out / "results.json").read_text())["test"]["accuracy"]
    capsys.readouterr()
    options = ["--device", "cpu", *(["--drop-token"] if drop else [])]
    assert cli.main(["merge", str(out), *options]) == 0
    printed = said(capsys)
    assert f"6 test images: {trained:.2%} as trained, " in printed
    assert ("without the Gist token" in printed) == drop
    assert f"timm.create_model('{MODEL}', num_classes=3, img_size=32" in printed

    torch.manual_seed(0)
    model = gist.load(timm.create_model(MODEL, num_classes=3, img_size=32), out).eval()
    plain = timm.create_model(MODEL, num_classes=3, img_size=32, reg_tokens=0 if drop else 1).eval()
    plain.load_state_dict(safetensors.torch.load_file(out / "merged.safetensors"))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(plain(images), model(images), rtol=1e-4, atol=1e-4) != drop

    assert cli.main(["merge", str(tmp_path), *options]) == 2
    assert "holds no finished run" in said(capsys)


def test_a_run_predicts_images(trained, tmp_path, capsys):
    folder, out = trained
    results = json.loads((out / "results.json").read_text())
    damaged, single = tmp_path / "damaged.png", folder / "train" / "blue" / "picture 0.png"
    damaged.write_bytes(b"no image")
    capsys.readouterr()

    images = [str(path) for path in (folder / "test", damaged, single)]
    assert cli.main(["predict", str(out), *images, "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("can't be read") == 1
    assert f"{damaged} can't be read" in printed.err
    rows = list(csv.DictReader(printed.out.splitlines()))
    assert [Path(row["image"]) for row in rows] == [*sorted(folder.glob("test/*/*")), single]
    right = [row["class"] == Path(row["image"]).parent.name for row in rows[:6]]
    assert sum(right) / 6 == pytest.approx(results["test"]["accuracy"])  # as the run measured

    model = load_run(out)
    transforms = Transforms.of("light", resolve_model_data_config(model.backbone), 32)
    pixels = prepare(load_data(str(folder)).test, transforms)
    with torch.no_grad():
        expected = model(torch.stack([image for image, _ in pixels])).softmax(1)
    said = [float(row["probability"]) for row in rows[:6]]
    assert said == pytest.approx(expected.max(1).values.tolist(), abs=1e-4)
    classes = sorted(COLOURS)
    assert [classes.index(row["class"]) for row in rows[:6]] == expected.argmax(1).tolist()


@pytest.mark.parametrize(
    ("run", "image", "message"),
    [("absent", "test", "no finished run"), ("out", "absent", "no such image"),
     ("out", "empty", "no image in"), ("out", "damaged.png", "can't be read")],
)  # fmt: skip
def test_what_can_not_be_predicted_is_said(run, image, message, trained, folder, capsys):
    runs = trained[1].parent
    (folder / "empty").mkdir()
    (folder / "damaged.png").write_bytes(b"no image")
    capsys.readouterr()
    assert cli.main(["predict", str(runs / run), str(folder / image), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split())
    assert printed.out == ""


def test_a_finished_run_is_reused_and_another_never_overwritten(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(folder, out, "--epochs", "1") == 0
    written = (out / "adapter.safetensors").stat().st_mtime_ns
    (out / "resume.pt").write_text("left by a kill after the results were written")
    assert train(folder, out, "--epochs", "1") == 0
    assert "finished earlier" in capsys.readouterr().out
    assert not (out / "resume.pt").exists()
    assert (out / "adapter.safetensors").stat().st_mtime_ns == written
    assert train(folder, out, "--epochs", "1", "--lr", "0.5") == 2
    assert "holds another run (it differs in train)" in said(capsys)
    assert (out / "adapter.safetensors").stat().st_mtime_ns == written
    assert train(folder, out, "--epochs", "1", "--fresh") == 0
    assert (out / "adapter.safetensors").stat().st_mtime_ns > written


def test_interruption_ends_with_130_and_the_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    def interrupt(self, step, loss):
        if step > 5:  # in the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(common.RunProgress, "step", interrupt)
    out = tmp_path / "out"
    assert train(folder, out) == 130
    results = json.loads((out / "results.json").read_text())
    assert (results["complete"], len(results["fit"]["history"])) == (False, 1)
    assert (out / "adapter.safetensors").is_file()
    monkeypatch.undo()
    assert train(folder, out) == 0  # not complete, so it is gone on with
    assert "resumes after step 5" in capsys.readouterr().out
    whole = tmp_path / "whole"
    assert train(folder, whole) == 0
    ours, uninterrupted = (json.loads((o / "results.json").read_text()) for o in (out, whole))
    assert ours["complete"]
    assert ours["test"]["loss"] == uninterrupted["test"]["loss"]
    for name in ("adapter.safetensors", "log.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / "resume.pt").exists()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without the line breaks of a narrow terminal."""
    return " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vit_tiny_patch16_225"], "did you mean 'vit_tiny_patch16_224'"),
        (["--method", "adaptor"], "did you mean 'adapter'"),
        (["--data", "mnist-2k"], "did you mean 'mnist-1k'"),
        (["--set", "rang=8"], "--set 'rang=8': not KEY=VALUE with KEY of rank, scale, activation"),
        (["--set", "rank=0"], "rank must be an integer of at least 1"),
        (["--method", "lora+bitfit", "--set", "rank=2"], "--set has no meaning with several"),
        (["--method", "lora+lora"], "method must not name a method twice"),
        (
            ["--loss", "temprature=2"],
            "--loss 'temprature=2': not KEY=VALUE with KEY of temperature",
        ),
        (["--loss", "detach=both"], "detach must be 'cls', 'gist' or None"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--img-size", "33"], "33"),
        (["--optimizer", "adamv"], "optimizer: 'adamv' is not known"),
        (["--save-every", "-1"], "steps between saves must be at least 0; they are -1"),
        (["--log-every", "0"], "steps between rows of the log must be at least 1; they are 0"),
        (["--wandb"], "logging to W&B needs: pip install wandb"),
    ],
)
def test_bad_options_end_with_2_and_a_sentence(
    folder, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert train(folder, tmp_path / "out", *options) == 2
    assert message in said(capsys)
    assert not (tmp_path / "out").exists()


def test_bad_images_are_named_before_training_starts(folder, tmp_path, capsys):
    broken = folder / "train" / "blue" / "picture 3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (folder / "val" / "empty class").mkdir()
    assert train(folder, tmp_path / "out") == 2
    text = said(capsys)
    assert "picture 3.png" in text.replace("picture3", "picture 3")
    assert "empty class" in text
    assert not (tmp_path / "out").exists()


def test_weights_must_be_chosen(capsys):
    assert cli.main(["train", "--data", "mnist-1k", "--model", MODEL]) == 2
    assert "say where weights are: --pretrained, --weights or --random-weights" in said(capsys)


def test_backends_are_listed(capsys):
    assert cli.main(["backends"]) == 0
    assert "reference: available" in capsys.readouterr().out


def test_the_version_is_that_of_the_kernels(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"gist-kernels {gist_kernels.__version__}\n"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_python_runs_the_command_as_a_module():
    found = python("-m", "gist.cli", "--version")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"gist-kernels {gist_kernels.__version__}\n"


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    slow_where(
        lambda package, *_: package not in ("timm", "rich"),
        [
            ("timm", "gist", "models"),
            ("safetensors", "gist", "models"),
            ("rich", "gist.cli", "train"),
            ("accelerate", "gist.cli", "train"),
            ("PIL", "gist.cli", "train"),
        ],
    ),
)
def test_a_missing_package_names_the_extra(package, module, extra):
    # timm imports some of these itself, so all but the missing one come first.
    first = "import timm, safetensors; " if module == "gist.cli" else ""
    found = python("-c", f"import sys; {first}sys.modules[{package!r}] = None; import {module}")
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert package in last
    assert f"pip install 'gist-kernels[{extra}]'" in last


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_trains_in_bf16_unless_told_otherwise(monkeypatch, has_bf16):
    assert train_command._precision("cuda") == "fp32"  # there is none here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert train_command._precision("cuda:1") == ("bf16" if has_bf16 else "fp32")
    assert train_command._precision("cpu") == "fp32"


def test_a_cuda_device_replays_steps_unless_told_otherwise(monkeypatch):
    def chosen(device, text=None):
        return train_command._cuda_graph(argparse.Namespace(device=device, text=text))

    assert chosen("cuda:1")
    assert not chosen("cpu")
    assert not chosen("cuda", "news.csv")  # its batches have many lengths
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not chosen("cuda")


@pytest.mark.parametrize(
    ("options", "expected"), [([], False), (["--no-cuda-graph"], False), (["--cuda-graph"], True)]
)
def test_cuda_graphs_are_an_option(monkeypatch, options, expected):
    monkeypatch.setattr(train_command, "check_model", lambda config: sys.exit(repr(config.train)))
    with pytest.raises(SystemExit, match=f"cuda_graph={expected}"):
        cli.main(["train", "--data", "d", "--random-weights", "--device", "cpu", *options])
