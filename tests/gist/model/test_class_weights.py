"""GistLoss with class weights, against the formula written out."""

from __future__ import annotations

import pytest
import torch

import gist
from gist.model.wrapped import GistOutput

WEIGHTS = [0.5, 2.0, 1.25]


def logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64) * 2
    return pair[0].requires_grad_(), pair[1].requires_grad_()


def written_out(cls, gist_logits, target) -> torch.Tensor:
    """The mean over images of weight times the published loss; only the cls side for None."""
    probabilities = target if target.is_floating_point() else torch.eye(3).double()[target]
    rows = -(probabilities * cls.log_softmax(1)).sum(1)
    if gist_logits is not None:
        rows = rows - 0.5 * (probabilities * gist_logits.log_softmax(1)).sum(1)
        p, q = (cls / 3).log_softmax(1), (gist_logits / 3).log_softmax(1)
        rows = rows + 0.75 * ((p.exp() - q.exp()) * (p - q)).sum(1)
    weights = probabilities @ torch.tensor(WEIGHTS, dtype=torch.float64)
    return (weights * rows).mean()


TARGETS = {
    "classes": torch.tensor([0, 1, 2, 1, 0, 0]),
    "probabilities": torch.randn(6, 3, generator=torch.Generator().manual_seed(4))
    .softmax(1)
    .double(),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("detach", [None, "cls"])
def test_all_terms_of_an_image_have_its_classs_weight(target, detach):
    ours, theirs = logits(), logits()
    value = gist.GistLoss(class_weights=WEIGHTS, detach=detach)(GistOutput(*ours), target)
    expected = written_out(*theirs, target)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    value.backward(), expected.backward()
    sides = (1,) if detach else (0, 1)  # the detached side has no KL gradient
    for side in sides:
        torch.testing.assert_close(ours[side].grad, theirs[side].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_plain_logits_have_it_too(target):
    cls, _ = logits()
    value = gist.GistLoss(class_weights=WEIGHTS)(cls, target)
    torch.testing.assert_close(value, written_out(cls, None, target), check_dtype=False)


def test_ignored_images_do_not_count():
    (cls, other), target = logits(), TARGETS["classes"]
    loss = gist.GistLoss(class_weights=WEIGHTS)
    ignored = torch.where(torch.arange(6) < 4, target, -100)
    for output, kept in ((cls, cls[:4]), (GistOutput(cls, other), GistOutput(cls[:4], other[:4]))):
        torch.testing.assert_close(loss(output, ignored), loss(kept, target[:4]))


def test_parts_of_a_batch_add_up_to_the_whole():
    (cls, other), target = logits(), TARGETS["classes"]
    loss = gist.GistLoss(class_weights=WEIGHTS)
    whole = loss(GistOutput(cls, other), target)
    parts = (
        len(part) / 6 * loss(GistOutput(cls[part], other[part]), target[part])
        for part in torch.arange(6).split([4, 2])
    )
    torch.testing.assert_close(sum(parts), whole)


def test_whole_numbers_are_weights():
    (cls, other), target = logits(), TARGETS["classes"]
    ours, theirs = (gist.GistLoss(class_weights=w) for w in ([1, 2, 3], [1.0, 2.0, 3.0]))
    output = GistOutput(cls, other)
    assert torch.equal(ours(output, target), theirs(output, target))


def test_bad_weights_are_named():
    with pytest.raises(ValueError, match="class_weights must be positive numbers"):
        gist.GistLoss(class_weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="one number per class, 3; they have 2"):
        gist.GistLoss(class_weights=[1.0, 2.0])(torch.zeros(1, 3), torch.tensor([0]))
