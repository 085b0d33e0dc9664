"""A folder of a small text classifier with a tokenizer of a few words, and texts for it."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

CLASSES = {"sea": ("ship", "port", "wave"), "soil": ("wheat", "corn", "field")}
OTHER = ("the", "a", "of", "and", "in", "was")
LIMIT = 24
Rows = list[tuple[str, str]]


def tokenizer() -> Any:
    """Words of :data:`CLASSES` and :data:`OTHER`, between [CLS] and [SEP]."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    words = [*special, *(word for of_class in CLASSES.values() for word in of_class), *OTHER]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=LIMIT,
    )  # fmt: skip


def model_folder(folder: Path) -> Path:
    """A BERT without a classifier, and its tokenizer, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> Rows:
    """Texts of 3 to 20 words, two of which tell the class, and their classes in turn."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        name = list(CLASSES)[index % len(CLASSES)]
        words = [*draw.choices(CLASSES[name], k=2), *draw.choices(OTHER, k=draw.randint(1, 18))]
        draw.shuffle(words)
        found.append((" ".join(words), name))
    return found


def table(file: Path, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> Path:
    """A table, its delimiter by the suffix."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writerow(columns)
        writer.writerows(lines)
    return file


def split_table(file: Path, counts: Mapping[str, int]) -> Path:
    """A table with so many texts in each split, all of them different."""
    drawn = rows(sum(counts.values()))
    splits = [split for split, count in counts.items() for _ in range(count)]
    lines = [(*row, split) for row, split in zip(drawn, splits, strict=True)]
    return table(file, ("text", "label", "split"), lines)
