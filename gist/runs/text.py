"""The settings of a run on texts, and its texts as the model's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from gist.backbones.text_folder import (
    create_text_backbone,
    load_tokenizer,
    max_tokens,
    text_folder,
    text_skeleton,
)
from gist.data.base import LabelledData
from gist.data.text import TextData, Tokenised
from gist.model.config import GistConfig
from gist.runs.inputs import Prepared, check_balances
from gist.training.config import TrainConfig
from gist.validate import check_count, check_rate

KIND = "text"
"""A text run's ``config["kind"]`` in results.json. An image run has none."""
LEAST_TOKENS = 4  # two of them special


@dataclass(frozen=True)
class TextRunConfig:
    """Everything that decides the outcome of a run on texts, except the machine.

    Args:
        data: a name, a table or a folder, as :func:`gist.data.load_texts` takes.
        model: a folder of transformers, or a name, as
            :func:`gist.backbones.text_folder.create_text_backbone` takes it.
        gist: what to train.
        train: how to train it, without mixup, cutmix and cuda_graph.
        pretrained: the folder's weights. False draws them at random.
        max_length: tokens of a text at most, special ones included; longer texts are cut at their
            end. None for the model's limit.
        dropout: the rate of every dropout layer of the backbone. The fused sublayers need 0.
        loss, sampling, class_weights: as :class:`gist.runs.run.RunConfig`, of texts.
    """

    data: str
    model: str
    gist: GistConfig = field(default_factory=GistConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrained: bool = True
    max_length: int | None = None
    dropout: float = 0.0
    loss: Mapping[str, Any] = field(default_factory=dict)
    sampling: str = "uniform"
    class_weights: str = "uniform"

    def __post_init__(self) -> None:
        check_balances(self.sampling, self.class_weights)
        check_rate("dropout", self.dropout)
        if self.max_length is not None:
            check_count("max_length", self.max_length, at_least=LEAST_TOKENS)
        self.train.check_text()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "gist": self.gist.to_dict(), "kind": KIND}

    def skeleton(self) -> nn.Module:
        """The backbone for two classes on the meta device."""
        return text_skeleton(self.model, num_classes=2)

    def backbone(self, num_classes: int) -> nn.Module:
        """The backbone with its weights."""
        return create_text_backbone(
            self.model, num_classes=num_classes, pretrained=self.pretrained, dropout=self.dropout
        )

    def prepared(self, data: LabelledData, backbone: Any) -> Prepared:
        """The texts as token ids of the model's own tokenizer.

        Raises:
            TypeError: ``data`` is no :class:`gist.data.TextData`.
            ValueError: ``max_length`` is above the model's limit.
        """
        if not isinstance(data, TextData):
            raise TypeError(f"a run on texts takes a TextData; it is a {type(data).__name__}")
        folder = text_folder(self.model)
        tokenizer = load_tokenizer(folder)
        limit = max_tokens(backbone, tokenizer)
        length = limit if self.max_length is None else self.max_length
        if length > limit:
            raise ValueError(
                f"max_length must be at most the model's limit, {limit}; it is {length}"
            )
        splits, notes = {}, []
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
            if split is None:
                continue
            splits[name] = tokenised = Tokenised(
                split, tokenizer, length, backbone.config.pad_token_id
            )
            if tokenised.cut:
                notes.append(
                    f"{tokenised.cut:,} of {len(tokenised):,} texts of {name} are longer than "
                    f"{length} tokens and were cut"
                )
        test = splits.get("test")
        return Prepared(
            splits["train"],
            splits.get("val"),
            None if test is None else lambda: test,
            {
                "tokenizer": {"folder": str(folder.resolve()), "max_length": length},
                "texts_cut": {name: split.cut for name, split in splits.items()},
            },
            notes,
        )


def is_text(described: Mapping[str, Any]) -> bool:
    """Whether a run's config, as its results hold it, is one on texts."""
    return described.get("kind") == KIND


def text_config(described: Mapping[str, Any]) -> TextRunConfig:
    """The config that :meth:`TextRunConfig.to_dict` described, as a run's results hold it."""
    known = {name: described[name] for name in TextRunConfig.__dataclass_fields__}
    return TextRunConfig(
        **{
            **known,
            "gist": GistConfig.from_dict(described["gist"]),
            "train": TrainConfig(**described["train"]),
        }
    )
