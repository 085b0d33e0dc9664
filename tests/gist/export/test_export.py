"""``gist export``: folders that give the run's predictions without gist, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

import gist
from gist import cli
from gist.data import Transforms
from gist.data.images import read_image
from gist.export import classify, formats
from gist.export.folder import preprocessing

CLASSES = ["blue", "green", "red ones"]
FILES = {
    "onnx": {"model.onnx"},
    "exported": {"model.pt2"},
    "timm": {"model.safetensors", "config.json"},
}
BESIDE = {"README.md", "classify.py", "preprocessing.json"}
# Packages that each must run without.
NEEDLESS = {
    "onnx": ["gist", "gist_kernels", "torch", "timm"],
    "exported": ["gist", "gist_kernels", "timm"],
}

# Runs the README's Python and the script where packages that it must not need are missing.
ALONE = """
import pathlib, re, runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(","), None))
sys.path.insert(0, "")
readme = pathlib.Path("README.md").read_text()
(snippet,) = re.findall(r"```python\\n(.*?)```", readme, flags=re.DOTALL)
exec(snippet)
runpy.run_path("classify.py", run_name="__main__")
"""


def photos(root: Path) -> Path:
    """Images of several kinds: large JPEGs, one turned by EXIF, grey ones and transparent PNGs."""
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1), ("test", 3)):
        for channel, name in enumerate(reversed(CLASSES)):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 90, (40 + 80 * channel, 150, 4), dtype=np.uint8)
                pixels[..., channel] += 120
                image = Image.fromarray(pixels)
                if index == 0:
                    image.save(place / "transparent.png")
                elif index == 1:
                    exif = Image.Exif()
                    exif[0x0112] = 6
                    image.convert("RGB").save(place / "turned.jpg", exif=exif)
                else:
                    image.convert("L").save(place / "grey.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("data") / "my photos")


def trained(folder: Path, out: Path, *more: str) -> Path:
    options = ["--model", "test_vit", "--random-weights", "--img-size", "32", "--device", "cpu"]
    schedule = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "4", "--lr", "0.03"]
    arguments = ["train", "--data", str(folder), "--out", str(out), *options, *schedule, *more]
    assert cli.main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    return trained(folder, tmp_path_factory.mktemp("run") / "lora", "--method", "lora")


@pytest.fixture(scope="module")
def adapter_run(folder, tmp_path_factory) -> Path:
    """A run whose images are squeezed, and whose method can't be merged."""
    return trained(folder, tmp_path_factory.mktemp("run") / "adapter", "--augment", "vtab")


def export(run: Path, *more: str) -> int:
    return cli.main(["export", str(run), *more])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


@pytest.fixture(scope="module")
def exports(run, adapter_run, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """A run and its export, by format. The folders were moved after the export."""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for format, which in (("onnx", run), ("exported", adapter_run), ("timm", run)):
        assert export(which, "--format", format, "--out", str(root / "new" / format)) == 0
        made[format] = which, shutil.move(root / "new" / format, root / format)
    assert not list((root / "new").iterdir())
    return made


@pytest.mark.parametrize("format", list(FILES))
def test_an_export_predicts_as_the_run_does(format, exports, folder, tmp_path, capsys):
    run, out = exports[format]
    assert {file.name for file in out.iterdir()} == FILES[format] | BESIDE
    images = [str(path) for path in sorted(folder.glob("test/*/*"))]
    assert cli.main(["predict", str(run), *images, "--device", "cpu"]) == 0
    expected = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    if format in NEEDLESS:
        shutil.copy(images[0], out / "photo.jpg")
        first, *rows = subprocess.check_output(
            [sys.executable, "-c", ALONE, ",".join(NEEDLESS[format]), *images], cwd=out, text=True
        ).splitlines()
        assert first.rpartition(" ")[0] == expected[0]["class"]
        found = [
            (row["image"], row["class"], float(row["probability"])) for row in csv.DictReader(rows)
        ]
    else:
        found = [
            (path, *one) for path, one in zip(images, classify.classify(images, out), strict=True)
        ]
    assert [row[:2] for row in found] == [(row["image"], row["class"]) for row in expected]
    probabilities = [float(row["probability"]) for row in expected]
    assert [row[2] for row in found] == pytest.approx(probabilities, abs=2e-4)
    assert len({row[1] for row in found}) > 1  # else any model would agree


def test_the_settings_are_those_that_the_run_recorded(exports):
    for format, keep_aspect, resize_to, least in (
        ("onnx", True, 33, 68),
        ("exported", False, 32, None),
    ):
        run, out = exports[format]
        recorded = json.loads((run / "results.json").read_text())["transforms"]["evaluation"]
        assert json.loads((out / "preprocessing.json").read_text()) == {
            "size": 32, "resize_to": resize_to, "keep_aspect": keep_aspect,
            "interpolation": "bicubic", "mean": recorded["mean"], "std": recorded["std"],
            "jpeg_least_side": least, "classes": CLASSES,
        }  # fmt: skip


@pytest.mark.parametrize("preset", ["light", "vtab"])
def test_images_become_the_same_input_without_torch(preset, folder):
    config = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear",
              "crop_pct": 0.9, "crop_mode": "center"}  # fmt: skip
    transforms = Transforms.of(preset, config, 32)
    settings = preprocessing(transforms, CLASSES)
    for path in folder.glob("t*/*/*"):
        expected = transforms.normalise(
            transforms.for_evaluation()(read_image(path, transforms.least_side()))
        )
        image = classify.read_image(path, settings["jpeg_least_side"])
        found = torch.from_numpy(classify.to_input(image, settings))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_transform_that_the_script_lacks_is_refused():
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}
    transforms = Transforms.of("none", {**config, "crop_mode": "border"}, 32)
    with pytest.raises(ValueError, match="crop_mode must be"):
        preprocessing(transforms, CLASSES)


def test_the_script_names_what_it_can_not_read(tmp_path):
    deep, damaged = tmp_path / "deep.png", tmp_path / "damaged.png"
    Image.fromarray(np.full((9, 9), 60_000, np.uint16)).save(deep)
    damaged.write_bytes(b"no image")
    for path, reason in ((deep, "8 bits"), (damaged, "identify"), (tmp_path / "no.png", "No such")):
        with pytest.raises(ValueError, match=f"{path.name} can't be read: .*{reason}"):
            classify.read_image(path)


def test_onnx_states_its_opset_and_names(exports):
    onnx = pytest.importorskip("onnx")
    _, out = exports["onnx"]
    model = onnx.load(out / "model.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", formats.OPSET)]
    assert f"opset {formats.OPSET}" in (out / "README.md").read_text()
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    sizes = [d.dim_value for d in images.type.tensor_type.shape.dim]
    assert sizes == [0, 3, 32, 32]  # 0: any batch


def test_a_timm_checkpoint_brings_its_own_transform(exports):
    run, out = exports["timm"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    recorded = json.loads((run / "results.json").read_text())["transforms"]["evaluation"]
    config = resolve_model_data_config(model)
    assert json.loads(json.dumps({key: config[key] for key in recorded})) == recorded
    assert model.pretrained_cfg["num_classes"] == 3
    assert model.num_reg_tokens == 1  # the Gist token


class Linear(torch.nn.Module):
    """What is exported in an instant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


def writer(format: str) -> Callable[[Path], None]:
    """What writes a :class:`Linear` in this format."""
    config = {"mean": [0.5] * 3, "std": [0.5] * 3}
    transforms = Transforms.of("vtab", config, 32)
    exported = formats.Exported(Linear().eval(), "linear", transforms, CLASSES)  # type: ignore
    return formats.FORMATS[format].prepare(exported)


def test_large_weights_lie_beside_an_onnx_file(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "EMBEDDED_BYTES", 0)
    writer("onnx")(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    logits = classify.load_model(tmp_path.with_name("moved"))
    assert logits(np.zeros((5, 3, 32, 32), np.float32)).shape == (5, 3)


# ---- what is refused ---------------------------------------------------------------------------


def test_what_can_not_be_exported_is_said_and_nothing_is_written(
    run, adapter_run, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"

    def refused(*arguments: str) -> str:
        assert export(*arguments, "--out", str(out)) == 2
        assert not list(tmp_path.glob("**/*.new"))
        return said(capsys)

    text = refused(adapter_run, "--format", "timm")
    assert "--format timm needs a model that merges into a plain backbone" in text
    assert "Formats onnx and exported take every method" in text
    assert "holds no finished run" in refused(tmp_path, "--format", "timm")
    assert "images must be an integer of at least 1" in refused(
        run, "--format", "timm", "--images", "0"
    )
    assert not out.exists()

    of_texts = tmp_path / "texts"
    of_texts.mkdir()
    (of_texts / "results.json").write_text('{"config": {}, "complete": true}')
    assert "no run on images" in refused(of_texts, "--format", "onnx")

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert "needs onnxscript: pip install 'gist-kernels[export]'" in refused(
            run, "--format", "onnx"
        )

    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert "exists already; choose another --out" in refused(run, "--format", "timm")
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("wrong", [lambda x: x + 0.1, lambda x: x * float("nan")])
def test_an_export_with_other_logits_is_refused(wrong, run, tmp_path, capsys, monkeypatch):
    load = classify.load_model
    monkeypatch.setattr(classify, "load_model", lambda folder: lambda x: wrong(load(folder)(x)))
    assert export(run, "--format", "timm", "--out", str(tmp_path / "out")) == 2
    assert "nothing was written: the exported model is not the run's" in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_test_image_that_can_not_be_read_is_named(run, tmp_path, capsys):
    data = photos(tmp_path / "data")
    damaged = data / "test" / "green" / "transparent.png"
    damaged.write_bytes(b"no image")
    arguments = ["--format", "exported", "--data", str(data), "--out", str(tmp_path / "out")]
    assert export(run, *arguments) == 2
    assert f"nothing was written: {damaged} can't be read" in said(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file grows beyond 10,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(run, tmp_path, capsys, small_disk):
    assert export(run, "--format", "timm", "--out", str(tmp_path / "out")) == 2
    assert re.search(r"error: .*File too large: '.*model\.safetensors'", said(capsys))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["onnx", "exported"])
def test_a_full_disk_is_an_error_with_the_files_name(format, tmp_path, small_disk):
    write = writer(format)
    with pytest.raises(OSError, match=r"File too large: '.*model\.\w+'"):
        write(tmp_path)


def test_an_export_that_was_killed_is_done_again(run, tmp_path, capsys):
    left = tmp_path / ".out.new"
    left.mkdir()
    (left / "model.onnx").write_bytes(b"half a file")
    assert export(run, "--format", "timm", "--out", str(tmp_path / "out")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES["timm"] | BESIDE


def test_a_merged_model_that_no_config_of_timm_makes_is_refused():
    name = "vit_small_patch16_dinov3"  # without biases of q, k and v, which SSF's merging adds
    backbone = timm.create_model(name, img_size=32, num_classes=3)
    model = gist.wrap(backbone, gist.GistConfig(gist.SSF(), gist=False)).eval()
    transforms = Transforms.of("none", backbone.pretrained_cfg, 32)
    with pytest.raises(ValueError, match=r"timm's vit_small_patch16_dinov3 lacks, such as"):
        formats.FORMATS["timm"].prepare(formats.Exported(model, name, transforms, CLASSES))


def test_a_transformers_model_is_no_checkpoint_of_timm():
    transforms = Transforms.of("vtab", {"mean": [0.5] * 3, "std": [0.5] * 3}, 32)
    exported = formats.Exported(Linear(), "hf:my-vit", transforms, CLASSES)  # type: ignore
    with pytest.raises(ValueError, match="gist merge writes a folder of transformers"):
        formats.FORMATS["timm"].prepare(exported)
