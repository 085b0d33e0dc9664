"""The example for segmentation: patches' classes, both sides' logits, a training, and mean IoU."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from training import model

import gist

pytest.importorskip("sklearn")

from examples.segmentation import PATCH, Segmenter, compose, mean_iou, train

NEUTRAL = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def segmenter_of(token: bool = True) -> Segmenter:
    config = gist.GistConfig(gist=token, token_dropout=0.0)
    wrapped = gist.wrap(gist.unwrap(model()), config, num_classes=0)
    return Segmenter(wrapped, width=32, num_classes=3)


def test_a_patch_has_the_class_of_the_stamp_that_covers_it():
    side = 8 * PATCH
    photograph = Image.new("RGB", (side + 9, side + 5), "blue")
    stamp = Image.new("RGBA", (40, 30), (255, 0, 0, 255))
    ghost = Image.new("RGBA", (30, 40), (255, 0, 0, 0))
    images, targets = compose([(stamp, 4), (ghost, 4)], [photograph], side, NEUTRAL, 0).tensors
    assert images.shape == (2, 3, side, side)
    red = F.avg_pool2d(images[:, :1], PATCH).flatten(1)  # a patch's share of the stamp
    torch.testing.assert_close(targets[0], 5 * (red[0] >= 0.5))
    assert 4 < (targets[0] == 5).sum() < 64
    assert not targets[1].any()
    assert not red[1].any()


def test_the_token_takes_the_class_tokens_place_and_evaluation_does_without():
    segmenter = segmenter_of().train()
    images = torch.randn(2, 3, 16, 16)
    tokens = segmenter.model.forward_features(images)
    assert tokens.shape == (2, 6, 32)  # class, Gist, 4 patches
    output = segmenter(images)
    for side, logits in enumerate(output):
        both = torch.cat((tokens[:, 2:], tokens[:, side, None].expand(-1, 4, -1)), -1)
        weight = torch.cat((segmenter.of_patch.weight, segmenter.of_image.weight), 1)
        expected = F.linear(both, weight, segmenter.of_patch.bias).flatten(0, 1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits = segmenter.eval()(images)
    torch.testing.assert_close(logits, output.cls_logits, rtol=1e-4, atol=1e-5)
    assert isinstance(segmenter_of(token=False).train()(images), torch.Tensor)


@pytest.mark.parametrize("token", [False, True])
def test_it_learns_which_patches_are_bright(token):
    torch.manual_seed(0)
    target = torch.randint(3, (48, 4))
    shade = (target - 1).view(48, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    data = TensorDataset(shade + 0.1 * torch.randn(48, 3, 16, 16), target)
    segmenter = segmenter_of(token)
    before = mean_iou(segmenter, data, 3)
    train(segmenter, data, epochs=20, lr=1e-2)
    assert mean_iou(segmenter, data, 3) > max(0.8, before)


class Answers(torch.nn.Module):
    """Predicts each image's first row as classes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.one_hot(images.flatten().long(), 4).float()


def test_mean_iou_counts_the_classes_that_occur():
    predicted, target = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])
    # Background 1 of 2, class 1 two of 3; classes 2 and 3 occur nowhere.
    assert mean_iou(Answers(), TensorDataset(predicted, target), 4) == pytest.approx(7 / 12)
