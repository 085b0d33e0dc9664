"""The binaries that launches compile to, for processors that need not be here."""

from __future__ import annotations

import pytest
import torch

from gist_kernels.kernels import triton as gpu

binaries = pytest.importorskip("bench.binaries", exc_type=ImportError)
pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing")


# Each regime with something different; bench/binaries.py goes through every combination.
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (10, {}),
        (100, {"kind": "smoothed", "dtype": torch.float32, "reduction": "none"}),
        (1000, {"temperature": 4.7}),
        (4000, {"kind": "probability", "dtype": torch.float16, "temperature": 4.7}),
        (65537, {"kind": "none", "temperature": 1.0}),
        (4000, {"kind": "none", "reduction": "sum", "masked": True, "stop_gradient": "targets"}),
        (8192, {"reduction": "sum", "masked": True, "gist_scale": 0.5}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_nothing_spills(target, classes, options):
    target = binaries.TARGETS[target]
    for launch in binaries.distinct(binaries.launches(classes, target, **options)):
        usage = binaries.usage(binaries.compiled(launch, target))
        assert usage.registers > 0
        assert usage.spills == 0, f"{launch.name()} {launch.shape()}: {usage}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("classes", "sides"), [(100, 2), (1000, 3), (4000, 2), (32000, 2)])
def test_nothing_of_the_divergence_spills(target, classes, sides):
    target = binaries.TARGETS[target]
    launches = binaries.divergence_launches(classes, sides, target, torch.float32)
    assert {launch.name() for launch in launches} == {"forward_kernel", "backward_kernel"}
    for launch in binaries.distinct(launches):
        usage = binaries.usage(binaries.compiled(launch, target))
        assert usage.registers > 0
        assert usage.spills == 0, f"{launch.name()} {launch.shape()}: {usage}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("features", "rank", "dtype"),
    [(384, 0, torch.float32), (768, 4, torch.bfloat16), (1024, 8, torch.float32),
     (768, 64, torch.float32), (768, 128, torch.bfloat16)],
)  # fmt: skip
def test_nothing_of_the_adapter_spills(target, features, rank, dtype):
    target = binaries.TARGETS[target]
    for launch in binaries.distinct(binaries.adapter_launches(features, rank, target, dtype)):
        usage = binaries.usage(binaries.compiled(launch, target))
        assert usage.registers > 0
        assert usage.spills == 0, f"{launch.name()} {launch.shape()}: {usage}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("keys", "head_dim"), [(198, 64), (100, 64), (50, 80)])
def test_nothing_of_attention_spills(target, keys, head_dim):
    if target == "sm_80" and keys > 128:
        pytest.skip("left to PyTorch there")
    target = binaries.TARGETS[target]
    forward, backward = binaries.attention_launches(keys, head_dim, target)
    for launch in (forward, backward):
        usage = binaries.usage(binaries.compiled(launch, target))
        assert usage.registers > 0
        assert usage.spills == 0, f"{launch.name()} {launch.shape()}: {usage}"


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
