"""Padded texts: how many words each row of an attention mask has."""

from __future__ import annotations

import torch

_RULE = "a compiled text model takes an attention_mask of 1 for a row's first words, 0 for others"


def pads_on_the_right(mask: torch.Tensor) -> bool:
    """Whether each row of a (B, N) mask has words and then padding. Waits for the device."""
    return bool(_right_padded(mask).all().item())


def lengths_of(mask: torch.Tensor) -> torch.Tensor | None:
    """Each row's number of words, (B,), of a mask that :func:`pads_on_the_right`; None where all
    are whole. Waits for the device."""
    return None if bool(mask.all()) else mask.bool().sum(1)


@torch.library.custom_op("gist::padded_lengths", mutates_args=())
def padded_lengths(mask: torch.Tensor) -> torch.Tensor:
    """Each row's number of words, (B,) int64, of a (B, N) mask; checked when the graph runs.

    An operator, since a tracer sees no values. On a CPU, another mask raises a ValueError. A GPU
    asserts on the device, so that the host does not wait.
    """
    right = _right_padded(mask)
    if mask.device.type != "cpu":
        torch._assert_async(right.all(), _RULE)
    elif not right.all():
        row = int(right.logical_not().nonzero()[0])
        raise ValueError(
            f"{_RULE}; row {row} differs. Pad on the right, or call the model uncompiled"
        )
    return mask.bool().sum(1)


@padded_lengths.register_fake
def _(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty(mask.shape[0], dtype=torch.int64)


def _right_padded(mask: torch.Tensor) -> torch.Tensor:
    """(B,): whether a row has words and then padding."""
    words = mask.bool()
    return words[:, :1].all(1) & (words[:, 1:] <= words[:, :-1]).all(1)
