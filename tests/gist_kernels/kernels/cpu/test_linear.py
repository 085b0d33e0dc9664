"""The library of float32 matmuls: chosen by a rule, overridable, exact whichever it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

linear = pytest.importorskip("gist_kernels.kernels.cpu.linear")

AVX512, HELD = "AMD with AVX-512", "AMD with AVX-512, oneDNN held to AVX2"
INTEL = "Intel with AVX-512"
needs_onednn = pytest.mark.skipif(not linear._has_onednn(), reason="PyTorch without oneDNN")


@pytest.fixture
def on(monkeypatch):
    """Calls by the rule of a kind of processor, None for one that nobody measured."""

    def by_rule_of(kind):
        rule = linear.Rule() if kind is None else linear._RULES[kind]
        monkeypatch.setattr(linear, "_rule", rule)

    return by_rule_of


def chosen(rows, inputs, outputs, *, backward=False, adds=False, dtype=torch.float32) -> bool:
    """Whether oneDNN computes a layer, or the gradient of its input."""
    weight = torch.empty(outputs, inputs, dtype=dtype)
    weight = weight.t() if backward else weight
    return linear._by_onednn(torch.empty(rows, weight.shape[1], dtype=dtype), weight, adds=adds)


@needs_onednn
@pytest.mark.parametrize(
    ("sizes", "case", "of_avx512", "of_held", "of_others"),
    [
        ((1584, 384, 1536), {}, True, True, False),
        ((1584, 384, 1536), {"backward": True}, True, True, False),
        ((792, 768, 3072), {"backward": True}, True, False, False),
        ((1584, 1536, 384), {"adds": True}, True, True, False),
        ((1584, 128, 384), {"adds": True}, True, False, False),
        ((1584, 16, 1536), {"adds": True}, False, False, False),
        ((1584, 384, 4), {}, False, False, False),
        ((1584, 384, 16), {}, True, True, False),
        ((1584, 4, 384), {"backward": True}, True, True, True),
        ((1584, 4, 384), {"backward": True, "adds": True}, True, True, True),
        ((16, 384, 384), {}, True, True, False),
        ((16, 64, 384), {}, False, False, False),
        ((0, 384, 384), {}, False, False, False),
        ((1584, 384, 1536), {"dtype": torch.bfloat16}, False, False, False),
    ],
)
def test_the_rule_takes_the_library_measured_to_be_faster(
    sizes, case, of_avx512, of_held, of_others, on
):
    for kind, expected in ((AVX512, of_avx512), (HELD, of_held), (None, of_others)):
        on(kind)
        assert chosen(*sizes, **case) is expected, kind
    on(INTEL)
    assert not chosen(*sizes, **case)


def test_onednn_that_is_switched_off_is_not_called(on):
    on(AVX512)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not chosen(1584, 384, 1536)


@needs_onednn
@pytest.mark.parametrize("library", linear.LIBRARIES)
@pytest.mark.parametrize("backward", [False, True])
def test_every_library_computes_the_same(library, backward, monkeypatch):
    monkeypatch.setattr(linear, "_rule", linear.rule_of(library))
    x, weight, bias = torch.randn(96, 320), torch.randn(80, 320), torch.randn(160)[::2]
    if backward:
        weight = weight.t().contiguous().t()
    exact = x.double() @ weight.double().t()
    for found, truth in (
        (linear.linear(x, weight, bias), exact + bias.double()),
        (linear.add_linear(torch.ones(96, 80), x, weight), exact + 1),
    ):
        assert (found - truth).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("vendor", "avx512", "limit", "kind"),
    [
        ("amd", True, {}, AVX512),
        ("amd", True, {"ONEDNN_MAX_CPU_ISA": "avx2"}, HELD),
        ("amd", True, {"DNNL_MAX_CPU_ISA": "AVX2_VNNI"}, HELD),
        ("amd", True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, AVX512),
        ("amd", False, {}, None),
        ("intel", True, {}, INTEL),
        ("intel", True, {"ONEDNN_MAX_CPU_ISA": "avx2"}, INTEL),
        ("intel", False, {}, None),
        ("other", False, {}, None),
    ],
)
def test_the_rule_depends_on_the_processor_and_on_onednns_limit(
    vendor, avx512, limit, kind, monkeypatch
):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limit.items():
        monkeypatch.setenv(name, value)
    native = type("Native", (), {})()
    native.processor_vendor, native.processor_has_avx512 = lambda: vendor, lambda: avx512
    monkeypatch.setattr(linear, "_native", native)
    assert linear._kind_of_processor() == kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "printed"),
    [
        pytest.param("onednn", r"matmuls by oneDNN \(GIST_KERNELS_MATMUL\)$", marks=needs_onednn),
        ("pytorch", r"matmuls by PyTorch's own library \(GIST_KERNELS_MATMUL\)$"),
        ("auto", r"matmuls by (oneDNN where it is faster \(AMD|PyTorch's own library$)"),
        ("mkl", r"ValueError: GIST_KERNELS_MATMUL must be .*'pytorch'\), not 'mkl'"),
    ],
)
def test_an_environment_variable_chooses_the_library(library, printed):
    run = subprocess.run(
        [sys.executable, "-c", "import gist_kernels as gk; print(gk.backends()['cpu'].detail)"],
        env=os.environ | {linear.LIBRARY_VARIABLE: library}, capture_output=True, text=True,
    )  # fmt: skip
    assert re.search(printed, run.stdout + run.stderr, re.MULTILINE)


@needs_onednn
def test_a_library_that_pytorch_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(linear, "_linear_pointwise", None)
    with pytest.raises(ValueError, match=r"no oneDNN .* take 'pytorch'"):
        linear.rule_of("onednn")
    assert linear.rule_of("auto") == linear.Rule()
