"""Fixtures of the fused blocks' tests."""

from __future__ import annotations

import pytest

import gist
from gist.fusion import block as fused_block
from gist.methods.base import Refusal


class OwnForward:
    """Lets every block run by its own forward, from a call on, or for a ``with`` block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.fused = monkeypatch, fused_block.plan

    def __call__(self) -> OwnForward:
        self.monkeypatch.setattr(fused_block, "plan", lambda *_: Refusal("a test wants it so"))
        # A model keeps its plan while its modules stay as they are.
        self.monkeypatch.setattr(gist.GistModel, "plan", gist.GistModel._planned)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.monkeypatch.setattr(fused_block, "plan", self.fused)


@pytest.fixture
def own_forward(monkeypatch: pytest.MonkeyPatch) -> OwnForward:
    return OwnForward(monkeypatch)
