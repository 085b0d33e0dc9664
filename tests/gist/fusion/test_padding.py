"""The lengths of a padded text's rows, as a compiled graph gets them."""

from __future__ import annotations

import pytest
import torch

from gist.fusion.padding import padded_lengths, pads_on_the_right

PADDED = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
OTHERS = ([0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_lengths_are_counts_of_words(dtype):
    mask = torch.tensor(PADDED, dtype=dtype)
    assert pads_on_the_right(mask)
    lengths = padded_lengths(mask)
    assert lengths.dtype is torch.int64
    assert lengths.tolist() == [4, 2, 1]


@pytest.mark.parametrize("row", OTHERS)
def test_another_mask_is_named_by_its_row(row):
    mask = torch.tensor([*PADDED, row])
    assert not pads_on_the_right(mask)
    with pytest.raises(ValueError, match="row 3 differs"):
        padded_lengths(mask)


def test_the_operator_is_one_that_pytorch_compiles():
    torch.library.opcheck(padded_lengths, (torch.tensor(PADDED),))
