"""Small text classifiers of transformers with random weights, and texts for them."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import pytest
import torch

NUM_CLASSES = 5
_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "initializer_range": 0.2,
}  # fmt: skip
_DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {**_SIZES, **_DRY},
    "Roberta": {**_SIZES, **_DRY},
    "XLMRoberta": {**_SIZES, **_DRY},
    "Electra": {**_SIZES, **_DRY, "embedding_size": 16},
    "MPNet": {**_SIZES, **_DRY, "pad_token_id": 1},
    "DistilBert": {
        "vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
        "initializer_range": 0.2, "dropout": 0.0, "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "ModernBert": {
        **_SIZES, **_SPECIAL, "local_attention": 8, "global_attn_every_n_layers": 2,
        "classifier_pooling": "cls",
    },
    "ModernBert, mean": {
        **_SIZES, **_SPECIAL, "local_attention": 8, "global_attn_every_n_layers": 2,
        "classifier_pooling": "mean",
    },
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {**_SIZES, **_GROUPED},
    "Mistral": {**_SIZES, **_GROUPED, "sliding_window": 6},
    "Qwen2": {**_SIZES, "num_key_value_heads": 4},
    "Qwen3": {**_SIZES, **_GROUPED},
    "Gemma2": {**_SIZES, **_GROUPED, "sliding_window": 6},
    "Gemma3Text": {**_SIZES, **_GROUPED, "sliding_window": 6},
}
KINDS = {**ENCODERS, **DECODERS}
EAGER_ONLY = ("MPNet", "Gemma2")
IMPLEMENTATIONS = [
    (kind, attention)
    for kind in KINDS
    for attention in ("eager", "sdpa")
    if attention == "eager" or kind not in EAGER_ONLY
]


def made(kind: str, attention: str = "eager", **options: Any) -> Any:
    """A seeded model in evaluation mode, without dropout."""
    model, generator = _template(kind, attention, tuple(options.items()))
    torch.set_rng_state(generator)
    return copy.deepcopy(model)


@functools.cache
def _template(
    kind: str, attention: str, options: tuple[tuple[str, Any], ...]
) -> tuple[Any, torch.Tensor]:
    """A model to copy, for its initial values take long, and the generator's state after it."""
    transformers = pytest.importorskip("transformers")
    name = kind.partition(",")[0]
    config = getattr(transformers, f"{name}Config")(
        **{"pad_token_id": 0, "num_labels": NUM_CLASSES, **KINDS[kind], **dict(options)}
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForSequenceClassification")._from_config(
        config, attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), torch.get_rng_state()


class Texts(NamedTuple):
    """(B, N) words, and which of them are no padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def alone(self, row: int) -> dict[str, torch.Tensor]:
        """One text without padding."""
        real = self.attention_mask[row].bool()
        return {"input_ids": self.input_ids[row, real][None]}


@functools.cache
def _words() -> torch.Tensor:
    return torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2))


def texts(kind: str, side: str = "right") -> Texts:
    """Three texts of 9, 7 and 4 words, padded on a side; "none" has three of 9."""
    ids = _words().clone()
    mask = torch.ones_like(ids)
    for row, missing in enumerate(() if side == "none" else (0, 2, 5)):
        padded = slice(9 - missing, None) if side == "right" else slice(0, missing)
        mask[row, padded] = 0
    ids[mask == 0] = KINDS[kind].get("pad_token_id", 0)
    return Texts(ids, mask)
