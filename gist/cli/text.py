"""What ``gist train --text`` and ``gist predict`` have of their own for texts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from itertools import chain
from pathlib import Path

from gist.backbones.text_folder import PACKAGED
from gist.cli.common import console, gist_config_of, loss_of, to_stderr
from gist.data import TextData, load_texts
from gist.files import CsvTable
from gist.runs.predict_text import predict_texts, raise_faults, read_new_texts
from gist.runs.run import check_model
from gist.runs.text import TextRunConfig
from gist.training.config import TrainConfig

_FOR_IMAGES = {
    "weights": "texts take a folder's own weights: give the folder as --model",
    "img_size": "texts have --max-length",
    "augment": "it changes pixels",
    "no_check": "texts are always read whole",
    "drop_path": "texts have --dropout",
    "workers": "texts lie in memory",
}
_FOR_TEXTS = ("max_length", "dropout")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only texts have."""
    group = parser.add_argument_group("texts")
    group.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="cut longer texts at their end; default: the model's limit",
    )
    group.add_argument(
        "--dropout",
        type=float,
        metavar="RATE",
        help="of every dropout layer; default: 0, for the fused sublayers",
    )


def refuse_options(arguments: argparse.Namespace) -> None:
    """Raise a ValueError for an option that has no meaning for this kind of data."""
    if arguments.text is None:
        given = [name for name in _FOR_TEXTS if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"{_option(given[0])} is for texts; leave it out with --data")
        return
    for name, reason in _FOR_IMAGES.items():
        if getattr(arguments, name):
            raise ValueError(f"{_option(name)} is for images, not for --text: {reason}")
    if arguments.model is None:
        raise ValueError(
            "--text needs --model: a folder that transformers' save_pretrained wrote, or one of "
            f"{', '.join(PACKAGED)}"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def text_config_of(arguments: argparse.Namespace) -> TextRunConfig:
    """The config of ``gist train --text``."""
    model = arguments.model
    if model not in PACKAGED:  # predict may run elsewhere
        model = str(Path(model.removeprefix("hf:")).resolve())
    return TextRunConfig(
        data=arguments.text,
        model=model,
        gist=gist_config_of(arguments, token_init="words"),
        train=TrainConfig(**{f.name: getattr(arguments, f.name) for f in fields(TrainConfig)}),
        pretrained=not arguments.random_weights,
        max_length=arguments.max_length,
        dropout=arguments.dropout or 0.0,
        sampling=arguments.sampling,
        class_weights=arguments.class_weights,
        loss=loss_of(arguments.loss),
    )


def read_text_data(config: TextRunConfig) -> TextData:
    """The texts of a config, whose model is checked first. Says how many are in two splits."""
    check_model(config)
    data = load_texts(config.data)
    if not console.quiet:
        for split, count in data.repeated().items():
            to_stderr.print(
                f"warning: {count:,} texts of {split} are in train too: accuracy on {split} "
                "is too high",
                style="yellow",
                highlight=False,
            )
    return data


def predict_and_print(arguments: argparse.Namespace) -> None:
    """Print a finished run's predictions of texts as CSV."""
    faults: list[str] = []
    texts = read_new_texts(arguments.inputs, sys.stdin, faults)
    predictions = predict_texts(arguments.run, texts, device=arguments.device)
    first = next(predictions, None)  # raises before the table starts
    if first is not None:
        table = CsvTable(sys.stdout)
        table.row("text", "class", "probability")
        for text, label, probability in chain((first,), predictions):
            table.row(text, label, f"{probability:.4f}")
    raise_faults(faults)
