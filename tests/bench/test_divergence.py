"""The divergences' benchmark: its contenders compute one thing, and its parity check can fail."""

from __future__ import annotations

import pytest
import torch

from bench import divergence

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", divergence.KINDS)
def test_contenders_agree_and_parity_sees_a_wrong_one(kind, monkeypatch):
    case = divergence.case(kind, (2, 3, 50), torch.float32, CPU)
    assert case.parity() is None
    ours, eager = (case.calls[name]() for name in (f"{kind}, half masked", "eager"))
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x, y)
    assert case.floors == {f"{kind}, half masked": (divergence.HALF, 1.0)}
    case.calls[divergence.HALF]()
    right, other = divergence.KINDS[kind]
    monkeypatch.setitem(
        divergence.KINDS, kind, (lambda a, b, mask: 1.001 * right(a, b, mask), other)
    )
    assert "loss is off" in divergence.case(kind, (2, 3, 50), torch.float32, CPU).parity()
