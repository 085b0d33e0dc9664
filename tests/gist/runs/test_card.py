"""The model card of a run: valid front matter, its run's figures, and never over a user's text."""

from __future__ import annotations

import copy
import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from gist import cli
from gist.runs.card import card_file, code, model_card

NAME = '"quoted": [yes] `ticks` ``two`` # {no}'


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("a", NAME):
            (root / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "photos" / split / name / f"{index}.png")
    assert train(root / "photos", root / "my run") == 0
    return root / "my run"


def train(data: Path, out: Path, *more: str) -> int:
    return cli.main(
        ["train", "--data", str(data), "--out", str(out), "--model", "test_vit", "--device", "cpu",
         "--random-weights", "--img-size", "32", "--epochs", "1", "--method", "lora", *more]
    )  # fmt: skip


@pytest.fixture
def results(run) -> dict:
    return copy.deepcopy(json.loads((run / "results.json").read_text()))


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)[1])


def test_a_run_gets_a_card_with_its_figures(run, results):
    text = (run / "README.md").read_text()
    about = front_matter(text)
    assert about["library_name"] == "gist-kernels"
    assert about["tags"] == ["image-classification", "peft", "gist", "lora"]
    assert "base_model" not in about  # its weights were drawn
    (entry,) = about["model-index"]
    assert entry["name"] == "my run"
    (measured,) = entry["results"]
    assert measured["dataset"] == {"name": "photos", "type": "photos", "split": "test"}
    accuracy = results["test"]["accuracy"]
    assert measured["metrics"] == [{"type": "accuracy", "value": accuracy}]

    assert "| train | 6 |\n| val | 4 |\n| test | 2 |" in text
    assert f"| test | {accuracy:.2%} | {round(2 * accuracy)} of 2 | used once" in text
    assert f"| val | {results['val_accuracy']:.2%} |" in text
    parameters = results["parameters"]
    assert f"method {parameters['method']:,}, token 64, head {parameters['head']:,}" in text
    assert "| `epochs` | `1` |" in text
    assert f"torch {results['versions']['torch']}" in text
    assert f"``` {NAME} ```" in text
    assert str(run.parent) not in text.partition("## How to use")[0]  # a private path


@pytest.mark.parametrize(
    "name", [NAME, "it's: a\\b", "- x", "yes", "caf\udce9", "\u732b \U0001f431"]
)
def test_any_name_stands_in_the_front_matter(name, results, tmp_path):
    results["config"]["data"] = f"/private/{name}"
    text = model_card(tmp_path / name, results, ["a", "b"])
    text.encode()
    (entry,) = front_matter(text)["model-index"]
    shown = name.encode(errors="backslashreplace").decode()
    assert entry["name"] == entry["results"][0]["dataset"]["name"] == shown
    assert "private" not in text


def test_hugging_faces_hub_reads_the_card(run):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard((run / "README.md").read_text())
    assert card.data.metrics == ["accuracy"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_split) == ("accuracy", "test")


def test_the_cards_python_predicts_as_the_command_does(run, monkeypatch, capsys):
    image = run.parent / "photos" / "test" / "a" / "0.png"
    assert cli.main(["predict", str(run), str(image), "--device", "cpu"]) == 0
    (expected,) = csv.DictReader(capsys.readouterr().out.splitlines())
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (run / "README.md").read_text(), flags=re.DOTALL
    )
    monkeypatch.chdir(run.parent)
    Path("photo.jpg").write_bytes(image.read_bytes())
    exec(snippet, {})
    name, rest = capsys.readouterr().out.split(" ", 1)
    label, _, probability = rest.rpartition(" ")
    assert (name, label) == ("photo.jpg", expected["class"])
    assert float(probability) == pytest.approx(float(expected["probability"]), abs=1e-4)


def test_a_card_is_replaced_only_as_it_was_written(run, tmp_path, results):
    results["config"]["data"] = "other"
    (new,) = card_file(run, results, ["a", "b"]).values()
    assert b"`other`" in new
    path = tmp_path / "README.md"
    path.write_bytes(new)
    assert card_file(tmp_path, results, ["a", "b"])

    path.write_bytes(new.replace(b"**to be filled in**", b"MIT", 1))
    with pytest.warns(UserWarning, match="was edited and stays as it is"):
        assert card_file(tmp_path, results, ["a", "b"]) == {}
    path.write_bytes(b"my own text, not UTF-8: \xe9\n")
    assert card_file(tmp_path, results, ["a", "b"]) == {}


def test_a_user_keeps_a_readme_of_their_own(run, tmp_path):
    (tmp_path / "README.md").write_text("my own\n")
    assert train(run.parent / "photos", tmp_path) == 0
    assert (tmp_path / "README.md").read_text() == "my own\n"


def test_an_interrupted_run_gets_no_card(run, results, tmp_path):
    assert card_file(tmp_path, {**results, "complete": False}, ["a", "b"]) == {}


def test_a_licence_is_stated_only_where_timm_states_it(results, tmp_path):
    results["config"] |= {"model": "vit_base_patch16_224.augreg_in21k", "pretrained": True}
    text = model_card(tmp_path, results, ["a", "b"])
    assert front_matter(text)["base_model"] == "timm/vit_base_patch16_224.augreg_in21k"
    assert "Licence of the base model: `apache-2.0`, as timm states it" in text
    results["config"] |= {"pretrained": False, "weights": "/home/me/private/weights.pth"}
    text = model_card(tmp_path, results, ["a", "b"])
    assert "base_model" not in front_matter(text)
    assert "Licence of the base model: **to be filled in**" in text
    assert "weights: `weights.pth`" in text
    assert "license" not in front_matter(text)


def test_a_run_without_held_out_images_says_so(results, tmp_path):
    del results["test"]
    results |= {"val_accuracy": None, "splits": {"train": 6}}
    text = model_card(tmp_path, results, ["a", "b"])
    assert "No image was held out: **the accuracy is not known.**" in text
    assert "model-index" not in front_matter(text)


def test_a_run_on_texts_gets_a_card_about_texts(results, tmp_path):
    del results["transforms"]
    results["config"]["kind"] = "text"
    text = model_card(tmp_path, results, ["a", "b"])
    assert front_matter(text)["pipeline_tag"] == "text-classification"
    assert "| split | texts |" in text
    assert "image" not in text


def test_any_name_is_shown_as_it_is():
    assert code("a|b") == "`a|b`"
    assert code("`a``") == "``` `a`` ```"
    assert code("two\nlines \udce9") == "`two\\nlines \\udce9`"
