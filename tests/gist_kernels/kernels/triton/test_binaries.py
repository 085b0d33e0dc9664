"""The binaries that launches compile to, for processors that need not be here."""

from __future__ import annotations

import pytest
import torch

from gist_kernels.kernels import triton as gpu

binaries = pytest.importorskip("bench.binaries", exc_type=ImportError)
pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing")


# A case is compiled for one half of the cards, the next case for the other. bench/binaries.py
# compiles every configuration for each.
HALVES = ("sm_75", "sm_86", "sm_90", "sm_120"), ("sm_80", "sm_89", "sm_100", "gfx942")


def for_half_of_the_cards(*cases):
    return [(card, *case) for i, case in enumerate(cases) for card in HALVES[i % 2]]


def check(launches, target):
    """Each fits the card, without a spill."""
    for launch in binaries.distinct(launches):
        usage = binaries.usage(binaries.compiled(launch, target))
        assert usage.registers > 0
        assert not usage.excess(launch, target), f"{launch.name()} {launch.shape()}: {usage}"


def test_every_card_is_in_a_half():
    assert {*HALVES[0], *HALVES[1]} == set(binaries.TARGETS)


# Each regime with something different.
@pytest.mark.parametrize(
    ("card", "classes", "options"),
    for_half_of_the_cards(
        (10, {}),
        (100, {"kind": "smoothed", "dtype": torch.float32, "reduction": "none"}),
        (1000, {"temperature": 4.7}),
        (4000, {"kind": "probability", "dtype": torch.float16, "temperature": 4.7}),
        (65537, {"kind": "none", "temperature": 1.0}),
        (4000, {"kind": "none", "reduction": "sum", "masked": True, "stop_gradient": "targets"}),
        (8192, {"reduction": "sum", "masked": True, "gist_scale": 0.5}),
    ),
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_the_loss_fits(card, classes, options):
    target = binaries.TARGETS[card]
    check(binaries.launches(classes, target, **options), target)


@pytest.mark.parametrize(
    ("card", "classes", "sides"), for_half_of_the_cards((100, 2), (1000, 3), (4000, 2), (32000, 2))
)
def test_the_divergence_fits(card, classes, sides):
    target = binaries.TARGETS[card]
    launches = binaries.divergence_launches(classes, sides, target, torch.float32)
    assert {launch.name() for launch in launches} == {"forward_kernel", "backward_kernel"}
    check(launches, target)


@pytest.mark.parametrize(
    ("card", "features", "rank", "dtype"),
    for_half_of_the_cards(
        (384, 0, torch.float32),
        (768, 4, torch.bfloat16),
        (1024, 8, torch.float32),
        (768, 64, torch.float32),
        (768, 128, torch.bfloat16),
    ),
)
def test_the_adapter_fits(card, features, rank, dtype):
    target = binaries.TARGETS[card]
    check(binaries.adapter_launches(features, rank, target, dtype), target)


@pytest.mark.slow
@pytest.mark.parametrize("card", binaries.TARGETS)
@pytest.mark.parametrize(
    ("keys", "head_dim", "cards"),
    [
        (198, 64, {*binaries.TARGETS} - {"sm_75"}),
        (100, 64, {*binaries.TARGETS} - {"sm_75"}),
        (258, 64, {*binaries.TARGETS} - {"sm_75"}),
        (321, 16, set()),
    ],
)
def test_attention_fits_or_is_left_to_pytorch(card, keys, head_dim, cards):
    target = binaries.TARGETS[card]
    launches = binaries.attention_launches(keys, head_dim, target)
    assert len(launches) == (2 if card in cards else 0)
    check(launches, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "keys", "head_dim", "half", "rotated"),
    [
        ("sm_90", 198, 64, True, True),
        ("sm_90", 198, 64, False, False),
        ("sm_100", 198, 64, True, True),
        ("sm_80", 100, 64, True, True),
        ("sm_80", 100, 64, False, True),
        ("sm_80", 198, 32, True, False),
        ("sm_120", 198, 64, True, False),
    ],
)
def test_attention_with_rotary_positions_fits(card, keys, head_dim, half, rotated):
    """Or gets queries and keys that PyTorch has rotated."""
    target = binaries.TARGETS[card]
    launches = binaries.attention_launches(keys, head_dim, target, half=half)
    rotates = [launch.arguments.get("sin") is not None for launch in launches]
    assert rotates == [rotated, rotated]
    check(launches, target)


@pytest.mark.parametrize(
    ("card", "keys", "half"),
    [
        *(("sm_80", 100, None), ("sm_80", 100, False), ("sm_90", 198, None), ("sm_90", 100, True)),
        *(("sm_100", 198, None), ("sm_100", 198, True)),
        *(("sm_80", 198, None), ("sm_90", 258, None), ("gfx942", 258, None)),
    ],
)
def test_attention_of_padded_rows_fits(card, keys, half):
    target = binaries.TARGETS[card]
    launches = binaries.attention_launches(keys, 64, target, half=half, padded=True)
    assert len(launches) == 2
    for launch in launches:
        assert launch.arguments["lengths"] is not None
        assert (launch.arguments.get("sin") is None) is (half is None)
    check(launches, target)


def test_what_a_card_has_not_is_told():
    target = binaries.TARGETS["sm_86"]
    launch = binaries.attention_launches(100, 64, target)[0]
    assert not binaries.Usage(255, 50_000, 0).excess(launch, target)
    assert binaries.Usage(255, 50_000, 8).excess(launch, target) == "spills 8"
    assert "of 101376 bytes" in binaries.Usage(255, 101_377, 0).excess(launch, target)
    assert "the heuristics say" in binaries.Usage(255, 101_376, 0).excess(launch, target)
    assert "of 65536 registers" in binaries.Usage(257, 50_000, 0).excess(launch, target)


@pytest.mark.parametrize(("target", "limit"), [("sm_90", "maxnreg"), ("gfx942", "waves_per_eu")])
def test_spills_would_be_seen(target, limit):
    target = binaries.TARGETS[target]
    launch = binaries.launches(8000, target)[0]
    options = {"maxnreg": 32} if limit == "maxnreg" else {"waves_per_eu": 8, "num_warps": 8}
    launch = launch._replace(options=launch.options | options)
    assert binaries.usage(binaries.compiled(launch, target)).spills > 0


def test_every_regime_launches_what_it_says():
    def launched(classes: int) -> list[str]:
        return [launch.name() for launch in binaries.launches(classes, binaries.TARGETS["sm_90"])]

    # Forward, backward, both at once.
    for classes in (2, 100, 4096):
        assert launched(classes) == [
            "forward_kernel",
            "backward_kernel",
            "forward_kernel+gradients",
        ]
    assert launched(8192) == 2 * ["forward_kernel", "backward_kernel"]
    assert launched(8193) == 2 * ["forward_kernel", "combine_kernel", "backward_kernel"]


def test_sizes_never_recompile():
    """Triton would compile anew for an integer that becomes 1 or a multiple of 16."""
    for classes in (100, 65537):
        for launch in binaries.launches(classes, binaries.TARGETS["sm_90"]):
            for parameter in launch.kernel.params:
                value = launch.arguments[parameter.name]
                if isinstance(value, int) and not parameter.is_constexpr:
                    assert parameter.do_not_specialize, parameter.name
