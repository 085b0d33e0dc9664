"""Training on texts: batches of similar length, evaluation, and resuming to the same bits."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text_folder import rows, tokenizer

import gist
from gist.data import Texts, Tokenised
from gist.training.batches import WINDOW, BatchSampler
from gist.training.config import TrainConfig
from gist.training.evaluation import evaluate
from gist.training.log import Log
from gist.training.loop import fit
from gist.training.state import ResumeFile

LENGTHS = torch.randint(3, 200, (1003,), generator=torch.Generator().manual_seed(1)).tolist()


def batches(sampler: BatchSampler, epoch: int, step: int = 0) -> list[list[int]]:
    sampler.start(epoch, step)
    return list(sampler)


def padding(of_epoch: list[list[int]]) -> float:
    """The share of an epoch's token places that is padding."""
    places = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in of_epoch)
    return 1 - sum(LENGTHS) / places


def test_an_epoch_takes_each_text_once_in_batches_of_similar_length():
    drawn = batches(BatchSampler(1003, 8, 5, lengths=LENGTHS), 1)
    assert sorted(i for batch in drawn for i in batch) == list(range(1003))
    assert [len(batch) for batch in drawn] == [8] * 125 + [3]
    plain = padding(batches(BatchSampler(1003, 8, 5), 1))
    assert padding(drawn) < 0.06 < 0.3 < plain


def test_batches_are_in_no_order_of_length_and_differ_from_epoch_to_epoch():
    sampler = BatchSampler(1003, 8, 5, lengths=LENGTHS)
    first, second = batches(sampler, 1), batches(sampler, 2)
    longest = torch.tensor([max(LENGTHS[i] for i in batch) for batch in first[:-1]]).float()
    place = torch.arange(len(longest)).float()
    assert abs(torch.corrcoef(torch.stack((longest, place)))[0, 1]) < 0.3
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}


def test_windows_bound_what_is_sorted_together():
    count = 2 * WINDOW * 2
    sampler = BatchSampler(count, 2, 5, lengths=list(range(count)))
    drawn = batches(BatchSampler(count, 2, 5), 1)
    members = [{i for batch in part for i in batch} for part in (drawn[:WINDOW], drawn[WINDOW:])]
    for batch in batches(sampler, 1):
        assert set(batch) <= members[0] or set(batch) <= members[1]


@pytest.mark.parametrize("weights", [None, [1.0 + i % 3 for i in range(1003)]])
def test_an_epoch_can_start_at_any_step(weights):
    def sampler(seed: int = 5) -> BatchSampler:
        return BatchSampler(1003, 8, seed, lengths=LENGTHS, weights=weights)

    expected = sampler()
    batches(expected, 1)
    second = batches(expected, 2)
    assert batches(sampler(), 2, step=40) == second[40:]
    assert batches(sampler(seed=6), 2) != second


def test_fewer_texts_than_a_batch():
    assert sorted(batches(BatchSampler(3, 8, 5, lengths=[4, 9, 2]), 1)[0]) == [0, 1, 2]
    with pytest.raises(ValueError, match="lengths must have one number per image, 3; they have 2"):
        BatchSampler(3, 8, 5, lengths=[4, 9])


# ---- models


def texts(count: int, seed: int) -> Tokenised:
    names = ["sea", "soil"]
    drawn = rows(count, seed)
    split = Texts([text for text, _ in drawn], [names.index(name) for _, name in drawn])
    return Tokenised(split, tokenizer(), 20)


def model(config: gist.GistConfig | None = None, dropout: float = 0.0) -> gist.GistModel:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    bert = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.3, pad_token_id=0,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return gist.wrap(transformers.BertForSequenceClassification(bert), config)


def test_evaluation_is_that_of_each_text_alone():
    data, trained = texts(37, 1), model().eval()
    with torch.no_grad():
        logits = torch.cat([trained(data[i][0][None]) for i in range(37)])
    labels = torch.tensor(data.labels)
    seen = []
    trained.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["attention_mask"]), with_kwargs=True
    )
    measured = evaluate(trained, data, batch_size=8)
    assert measured.images == 37
    assert measured.accuracy == int((logits.argmax(1) == labels).sum()) / 37
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert measured.loss == pytest.approx(expected, abs=1e-5)
    lengths = [int(n) for mask in seen for n in mask.sum(1)]
    assert lengths == sorted(data.lengths)
    assert all(mask.shape[1] == mask.sum(1).max() for mask in seen)


def test_it_learns():
    trained = model(gist.GistConfig(gist.Full()))
    config = TrainConfig(epochs=6, batch_size=8, lr=3e-3, head_lr=2e-2, warmup_epochs=0.5)
    result = fit(trained, texts(64, 1), texts(31, 2), config)
    assert result.history[0].train_loss > 2 * result.history[-1].train_loss
    assert evaluate(trained, texts(64, 1)).accuracy > 0.9


@pytest.mark.parametrize("name", ["mixup", "cutmix", "cuda_graph"])
def test_what_is_for_images_is_refused(name):
    config = TrainConfig(**{name: True if name == "cuda_graph" else 0.5})
    with pytest.raises(ValueError, match=f"{name} is for images"):
        fit(model(), texts(8, 1), None, config)


CONFIG = TrainConfig(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=0.5, seed=5, accumulate=2)


class KilledError(Exception):
    """Ends a training between two steps. What is on disk is what a kill leaves."""


def train(directory: Path, kill: int = 0) -> dict[str, Any]:
    """What a training gives that resumes where ``directory`` has one."""

    def on_step(step: int, loss: float) -> None:
        if step == kill:
            raise KilledError

    trained = model(dropout=0.2)
    went_on_after: list[int] = []
    result = fit(
        trained, texts(38, 1), texts(11, 2), CONFIG,
        resume_file=ResumeFile(directory / "resume.pt", asdict(CONFIG), every=2),
        log=Log(directory),
        on_step=on_step,
        on_resume=lambda step, history: went_on_after.append(step),
    )  # fmt: skip
    return {
        "trainables": trained.trainable_state_dict(),
        "history": [asdict(replace(epoch, train_seconds=0)) for epoch in result.history],
        "log": (directory / "log.csv").read_text(),
        "went_on_after": went_on_after,
    }


def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expected = train(whole)
    for step in (4, 7):  # in the first epoch, and in the second
        with pytest.raises(KilledError):
            train(killed, kill=step)
    found = train(killed)
    assert (expected.pop("went_on_after"), found.pop("went_on_after")) == ([], [6])
    ours, theirs = found.pop("trainables"), expected.pop("trainables")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found == expected
