"""What a launch asks of a device, for devices that need not be here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gist_kernels.kernels import triton as gpu
from gist_kernels.kernels.triton import heuristics, launch

attention = pytest.importorskip("gist_kernels.kernels.triton.attention", exc_type=ImportError)
loss = pytest.importorskip("gist_kernels.kernels.triton.loss", exc_type=ImportError)

# Compute capability, and the most shared memory of a program, in KiB: the CUDA programming guide's
# table of technical specifications.
CARDS = {
    (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227,
    (10, 3): 227, (12, 0): 99, (12, 1): 99,
}  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    """Pretends to have a card, and returns its device."""

    def pretend(capability: tuple[int, int], kib: int) -> torch.device:
        properties = SimpleNamespace(shared_memory_per_block_optin=1024 * kib)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for function in _CACHED:
            function.cache_clear()
        return torch.device("cuda", 0)

    yield pretend
    for function in _CACHED:
        function.cache_clear()


_CACHED = (
    launch.tensor_cores_take_bf16,
    launch.tensor_cores_read_shared_memory,
    launch.shared_memory,
)


def served(device: torch.device, tokens: int, head_dim: int, dtype=torch.float16) -> bool:
    tensor = SimpleNamespace(shape=(1, tokens, head_dim), dtype=dtype, device=device)
    return attention.serves(tensor, tensor, 1)


def holds(device: torch.device, tokens: int, head_dim: int) -> bool:
    """Whether a program takes all keys of a head."""
    tensor = SimpleNamespace(shape=(1, tokens, head_dim), device=device)
    return isinstance(attention._tile(tensor, tensor, 1), heuristics.AttentionTile)


@pytest.mark.parametrize("capability", CARDS)
def test_tensor_cores_read_shared_memory_on_hopper_and_in_data_centres(card, capability):
    device = card(capability, CARDS[capability])
    expected = capability in ((9, 0), (10, 0), (10, 3))
    assert launch.tensor_cores_read_shared_memory(device) == expected


@pytest.mark.parametrize("capability", CARDS)
def test_attention_serves_what_a_card_can_hold(card, capability):
    device = card(capability, CARDS[capability])
    for tokens in (50, 128, 198, 320):
        assert served(device, tokens, 64) == (capability >= (8, 0))
    assert not served(device, 321, 64)


@pytest.mark.parametrize("capability", CARDS)
def test_attention_goes_by_tiles_where_a_program_can_not_hold_a_head(card, capability):
    device = card(capability, CARDS[capability])
    large = capability in ((9, 0), (10, 0), (10, 3))
    if capability >= (8, 0):
        held = [tokens for tokens in (50, 128, 198, 256, 258) if holds(device, tokens, 64)]
        assert held == ([50, 128, 198, 256] if large else [50, 128])


def test_attention_goes_by_tiles_on_a_card_with_less_shared_memory(card):
    tile = heuristics.attention(198, 64, reads_shared=True, shared_memory=232_448)
    needed = tile.shared_memory()
    assert holds(card((9, 0), needed / 1024), 198, 64)
    assert not holds(card((9, 0), needed / 1024 - 1), 198, 64)
    assert served(card((9, 0), needed / 1024 - 1), 198, 64)


@pytest.mark.parametrize(("tokens", "head_dim"), [(258, 72), (258, 60), (321, 8)])
def test_heads_too_wide_or_too_long_for_tiles_are_pytorchs(card, tokens, head_dim):
    assert not served(card((9, 0), 227), tokens, head_dim)


def test_attention_serves_rows_of_16_bytes_up_to_128_columns(card):
    device = card((9, 0), 227)
    found = [head_dim for head_dim in range(1, 300) if served(device, 16, head_dim)]
    assert found == list(range(8, 129, 8))


@pytest.mark.triton
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_operator_of_the_loss_keeps_no_counter(monkeypatch, reduction):
    """It may run with the memory of a CUDA graph, which a later call must not read."""
    monkeypatch.setattr(loss, "_counters", {})
    cls, gist = torch.randn(2, 4, 7, device=gpu.DEVICE_TYPES[0])
    settings = [3.0, 1.0, 0.5, 0.75, 0.75, 0.1, 1.0], -100, reduction, ""
    operator = torch.ops.gist_kernels.triton_loss.default
    target = torch.tensor([0, -100, 6, 2], device=cls.device)
    traced = operator(cls, gist, target, None, *settings)
    assert not loss._counters
    numbers, ignore_index, *_ = settings
    options = loss.LossOptions(*numbers[:6], ignore_index, reduction)
    eager = loss.forward(cls, gist, target, options)
    assert len(loss._counters) == 1
    for x, y in zip(traced, eager, strict=True):
        assert torch.equal(x, y)


def test_a_captured_call_keeps_no_counter(monkeypatch):
    zeros, capturing = torch.zeros, True
    monkeypatch.setattr(loss, "_counters", {})
    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: zeros(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    driver = SimpleNamespace(get_current_stream=lambda index: 5)
    monkeypatch.setattr(loss.triton.runtime, "driver", SimpleNamespace(active=driver))
    device = torch.device("cuda", 0)
    first, second = (loss._counter(device, stateless=False) for _ in range(2))
    assert first is not second
    assert not loss._counters
    capturing = False
    assert loss._counter(device, stateless=True) is not loss._counter(device, stateless=True)
    assert not loss._counters
    kept = loss._counter(device, stateless=False)
    assert loss._counter(device, stateless=False) is kept
    assert loss._counters == {(0, 5): kept}
