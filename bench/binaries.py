"""Registers, shared memory and spills of every kernel that can be launched: no device is needed.

    python bench/binaries.py [TARGET ...] [--family FAMILY]

The launchers run on CPU tensors with the launch itself replaced, so what is compiled here is what
they choose: every tile of the heuristics, with each kind of target, reduction and temperature. It
is an error if a binary spills, or takes more than the card has.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.kernels.triton import (
    activation,
    adapter,
    attention,
    divergence,
    heuristics,
    launch,
    loss,
)
from gist_kernels.weights import AdapterWeights, NormWeights, Rotation

# The most shared memory of a program, in KiB. CUDA's: "Maximum amount of shared memory per thread
# block" in the programming guide's table of technical specifications.
_SHARED_KIB: dict[int | str, int] = {
    75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64,
}  # fmt: skip
TARGETS = {
    f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in _SHARED_KIB if isinstance(arch, int)
} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
# Of a multiprocessor, which one program must not exceed.
_REGISTERS = {"cuda": 64 * 1024, "hip": 128 * 1024}
# One width for each tile that the heuristics know: they are constant between powers of two.
WIDTHS = (10, 30, 60, 100, 200, 500, 1000, 2000, 4000, 8000, 16_000, 65_537, 4_194_304)
KINDS = ("none", "index", "smoothed", "probability")
# ViTs' features, and ranks of either regime.
FEATURES = (192, 384, 768, 1024, 1280, 2048, 4096)
RANKS = (0, 1, 4, 8, 16, 64, 128)
HEAD_DIMS = (16, 32, 48, 64, 72, 80, 128)
KEYS = (10, 30, 50, 100, 198, 258)
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Launch(NamedTuple):
    """A kernel with the arguments of one launch."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]
    shared_bound: int | None = None
    """The most shared memory by the heuristics, which serve attention or leave it by that."""

    def family(self) -> str:
        """The file of its kernel."""
        return self.kernel.fn.__module__.rpartition(".")[2]

    def name(self) -> str:
        keeps = self.arguments.get("d_a") is not None and "loss" in self.arguments
        return self.kernel.__name__.strip("_") + ("+gradients" if keeps else "")

    def shape(self) -> str:
        names = ("QUERIES", "KEYS") if "KEYS" in self.arguments else ("ROWS", "BLOCK")
        rows, block = (self.arguments.get(name, "") for name in names)
        return f"{rows} x {block}, {self.warps()} warps"

    def warps(self) -> int:
        found: int = self.options.get("num_warps", 4)
        return found


class Usage(NamedTuple):
    """What one program of a binary takes; spills in bytes a thread (AMD: registers)."""

    registers: int
    shared: int
    spills: int

    def excess(self, launched: Launch, target: GPUTarget) -> str:
        """What a device of ``target`` can't give it; "" if it can give all."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills}")
        shared = 1024 * _SHARED_KIB[target.arch]
        if self.shared > shared:
            found.append(f"{self.shared} of {shared} bytes of shared memory")
        threads, most = launched.warps() * target.warp_size, _REGISTERS[target.backend]
        if self.registers * threads > most:
            found.append(f"{self.registers * threads} of {most} registers")
        bound = launched.shared_bound
        if bound is not None and self.shared > bound:
            found.append(f"{self.shared} bytes of shared memory; the heuristics say {bound}")
        return ", ".join(found)


def launches(
    classes: int,
    target: GPUTarget,
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "index",
    temperature: float = 3.0,
    reduction: str = "mean",
    masked: bool = False,
    **changes: Any,
) -> list[Launch]:
    """What forward, backward and forward_backward launch for rows of so many classes; ``changes``
    are of the options."""
    rows = 2
    cls, gist = torch.zeros(2, rows, classes, dtype=dtype)
    targets = {
        "none": None,
        "index": torch.zeros(rows, dtype=torch.int64),
        "smoothed": torch.zeros(rows, dtype=torch.int64),
        "probability": torch.zeros(rows, classes),
    }
    smoothing = 0.1 if kind == "smoothed" else 0.0
    options = LossOptions(temperature, 1.0, 0.5, 0.75, 0.75, smoothing, -100, reduction)
    options = options._replace(**changes)
    row_scale = torch.ones(rows) if masked else None
    with recorded(target) as found:
        _, _, stats = loss.forward(cls, gist, targets[kind], options, True, row_scale)
        grad = torch.zeros(rows if reduction == "none" else ())
        loss.backward(grad, cls, gist, targets[kind], stats, options, True, True, row_scale)
        loss.forward_backward(cls, gist, targets[kind], options, row_scale)
    return found


def adapter_launches(
    features: int,
    rank: int,
    target: GPUTarget,
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "gelu",
) -> list[Launch]:
    """What the adapter family launches: with LayerNorm onto x, as in a sublayer, alone onto a
    residual, and, of rank 0, LayerNorm alone; and the activation,
    plain and gated."""
    x, other, d_out = torch.zeros(3, 2, features, dtype=dtype)
    norm = NormWeights(torch.zeros(features, dtype=dtype), torch.zeros(features, dtype=dtype), 1e-6)
    weights = None
    if rank:
        weights = AdapterWeights(
            torch.zeros(rank, features), torch.zeros(rank), torch.zeros(features, rank),
            torch.zeros(features), 0.1, kind,
        )  # fmt: skip
    with recorded(target) as found:
        _, _, z, stats = adapter.forward(x, x, norm, weights, norm.bias)
        adapter.backward(d_out, other, x, norm, stats, weights, z, pass_through=True)
        if rank:
            adapter.forward(x, other, None, weights)
            adapter.backward(d_out, None, x, None, None, weights, z, pass_through=False)
            adapter.backward(
                d_out, None, x, None, None, weights, z, pass_through=False, need_dx=False
            )
        else:
            adapter.backward(None, other, x, norm, stats, None, None, pass_through=False)
        activation.backward(d_out, activation.forward(x, kind), kind)
        u = torch.zeros(2, 2 * features, dtype=dtype)
        activation.gated_backward(activation.gated_forward(u, kind), u, kind)
    return found


def divergence_launches(
    classes: int, sides: int, target: GPUTarget, dtype: torch.dtype = torch.bfloat16
) -> list[Launch]:
    """What the Jensen-Shannon divergence launches, with and without masked rows."""
    logits = tuple(torch.zeros(2, classes, dtype=dtype) for _ in range(sides))
    shares, temperatures = (1 / sides,) * sides, (2.0,) * sides
    with recorded(target) as found:
        for scale in (None, torch.ones(2)):
            _, stats = divergence.forward(logits, shares, temperatures, scale)
            needs = (True,) * sides
            divergence.backward(torch.zeros(2), logits, shares, temperatures, stats, needs, scale)
    return found


def attention_launches(
    keys: int,
    head_dim: int,
    target: GPUTarget,
    dtype: torch.dtype = torch.bfloat16,
    half: bool | None = None,
    padded: bool = False,
) -> list[Launch]:
    """What attention launches, of slices of packed tensors as in a sublayer; nothing where it
    leaves them to PyTorch. With rotary positions in pairs ``half`` or not, unless None; with
    lengths if ``padded``."""
    heads = 2
    lengths = torch.ones(1, dtype=torch.int64) if padded else None
    q, k, v = torch.zeros(1, keys, 3 * heads * head_dim, dtype=dtype).chunk(3, dim=-1)
    rotation = None
    if half is not None:
        rotation = Rotation(*torch.zeros(2, heads, keys - 1, head_dim), 1, half)
    with recorded(target) as found:
        if attention.serves(q, k, heads):
            if rotation is not None and not attention.rotates(q, k, heads, rotation):
                rotation = None
            out, lse = attention.forward(q, k, v, heads, 0.125, rotation, lengths)
            attention.backward(out, q, k, v, lse, heads, 0.125, q, k, v, rotation, lengths)
    return found


@contextmanager
def recorded(target: GPUTarget) -> Iterator[list[Launch]]:
    """Launches inside the block are recorded, as on a device of ``target``, and not made."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = kernel.arg_names
        bound = dict(zip(names, args, strict=False))
        bound |= {name: kwargs.pop(name) for name in names if name in kwargs}
        shared_bound = None
        if "KEYS" in bound:
            columns, keys, queries = bound["COLUMNS"], bound["KEYS"], heuristics.QUERIES
            shared_bound = heuristics.AttentionTile(columns, keys, queries, 0).shared_memory()
        found.append(Launch(kernel, bound, kwargs, shared_bound))

    hip = target.backend == "hip"
    shared = 1024 * _SHARED_KIB[target.arch]
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.multiple(
            launch,
            warp_size=lambda device: target.warp_size,
            tensor_cores_take_bf16=lambda device: hip or target.arch >= 80,
            tensor_cores_read_shared_memory=lambda device: hip or target.arch // 10 in (9, 10),
            shared_memory=lambda device: shared,
        ),
        mock.patch.object(torch.version, "hip", "6.4" if hip else None),
    ):
        yield found


def compiled(recorded: Launch, target: GPUTarget) -> CompiledKernel:
    signature: dict[str, Any] = {}
    constants = {}
    attributes = {}
    for position, parameter in enumerate(recorded.kernel.params):
        value = recorded.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(map(_type_of, value))
            for i, each in enumerate(value):
                if isinstance(each, torch.Tensor):
                    attributes[(position, i)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = _type_of(value)
    source = ASTSource(recorded.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=recorded.options)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def usage(binary: CompiledKernel) -> Usage:
    if "cubin" in binary.asm:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(binary.asm["cubin"])
            tool = triton.knobs.nvidia.cuobjdump.path
            text = subprocess.check_output([tool, "-res-usage", cubin], text=True)
        found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
        registers, stack, local = map(int, found.groups())
        return Usage(registers, binary.metadata.shared, stack + local)

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", binary.asm["amdgcn"]).group(1))

    spills = count("vgpr_spill_count") + count("sgpr_spill_count")
    return Usage(
        count("vgpr_count"), binary.metadata.shared, spills + count("private_segment_fixed_size")
    )


def distinct(launches: Iterable[Launch]) -> Iterator[Launch]:
    """One of those that share a binary."""
    seen = set()
    for each in launches:
        constants = [
            str(v.dtype if isinstance(v, torch.Tensor) else v)
            for k, v in (*each.arguments.items(), ("", each.arguments.get("sides", (None,))[0]))
            if k.isupper() or v is None or isinstance(v, torch.Tensor)
        ]
        key = each.family(), each.kernel.__name__, *constants
        if key not in seen:
            seen.add(key)
            yield each


def loss_configurations(target: GPUTarget) -> Iterator[Launch]:
    """Everything, in both sizes of dtype, at a temperature with and without integer powers."""
    for classes in WIDTHS:
        for dtype in (torch.bfloat16, torch.float32):
            for kind in KINDS:
                for temperature in (3.0, 4.7):
                    yield from launches(classes, target, dtype, kind, temperature)
            yield from launches(classes, target, dtype, reduction="none")
            yield from launches(classes, target, dtype, "none", reduction="sum", masked=True)
            yield from launches(
                classes, target, dtype, reduction="sum", masked=True, gist_scale=0.5,
                stop_gradient="targets",
            )  # fmt: skip


def divergence_configurations(target: GPUTarget) -> Iterator[Launch]:
    """Every width, 2 to 8 sides, in both sizes of dtype."""
    for classes in WIDTHS:
        for dtype in (torch.bfloat16, torch.float32):
            for sides in (2, 3, 4, 8):
                yield from divergence_launches(classes, sides, target, dtype)


def adapter_configurations(target: GPUTarget) -> Iterator[Launch]:
    """Every size of features and rank, in both sizes of dtype, and every activation."""
    for features in FEATURES:
        for rank in RANKS:
            for dtype in (torch.bfloat16, torch.float32):
                yield from adapter_launches(features, rank, target, dtype)
    for kind in ("gelu_tanh", "relu", "silu", "identity"):
        yield from adapter_launches(768, 4, target, kind=kind)


def attention_configurations(target: GPUTarget) -> Iterator[Launch]:
    """Every size of heads and keys that the kernels take."""
    for head_dim in HEAD_DIMS:
        for keys in KEYS:
            for dtype in (torch.bfloat16, torch.float16):
                for half in (None, False, True):
                    for padded in (False, True):
                        yield from attention_launches(keys, head_dim, target, dtype, half, padded)


FAMILIES = {
    "loss": loss_configurations,
    "divergence": divergence_configurations,
    "adapter": adapter_configurations,
    "attention": attention_configurations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="*", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--family", choices=FAMILIES, help="default: all")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.target if name not in TARGETS]
    if unknown:
        parser.error(f"target must be of {', '.join(TARGETS)}; it is {unknown[0]}")
    families = [arguments.family] if arguments.family else FAMILIES
    found: dict[tuple[str, str, str], list[Usage]] = {}
    broken = []
    for name in arguments.target or TARGETS:
        target = TARGETS[name]
        print(
            f"{name}\n{'kernel':<26}{'tile':<22}{'dtype':<10}{'kind, rank':<21}{'T':<5}"
            f"{'registers':>9}{'shared':>8}{'spills':>8}"
        )
        for each in distinct(each for family in families for each in FAMILIES[family](target)):
            used = usage(compiled(each, target))
            found.setdefault((name, each.family(), each.name()), []).append(used)
            line = _line(each, used)
            print(line, flush=True)
            excess = used.excess(each, target)
            if excess:
                broken.append(f"{name} {line}: {excess}")
    print(f"\nTriton {triton.__version__}\n")
    print("| target | family | kernel | binaries | most registers | most shared | that spill |")
    print("|---|---|---|---:|---:|---:|---:|")
    for (name, family, kernel), uses in found.items():
        most = [max(use[i] for use in uses) for i in range(2)]
        spill = sum(use.spills > 0 for use in uses)
        print(f"| {name} | {family} | {kernel} | {len(uses)} | {most[0]} | {most[1]} | {spill} |")
    if broken:
        sys.exit("\n".join(("", "more than the card has:", *broken)))


def _line(launched: Launch, used: Usage) -> str:
    tensor = next((launched.arguments[key] for key in "axq" if key in launched.arguments), None)
    kind = launched.arguments.get("TARGET", launched.arguments.get("RANK", ""))
    if "SIDES" in launched.arguments:
        tensor, kind = launched.arguments["sides"][0], f"{launched.arguments['SIDES']} sides"
    if "HEAD_DIM" in launched.arguments:
        kind = f"head {launched.arguments['HEAD_DIM']}"
        if launched.arguments.get("sin") is not None:
            kind += ", half" if launched.arguments["HALF"] else ", pairs"
        if launched.arguments["lengths"] is not None:
            kind += ", padded"
    return (
        f"{launched.name():<26}{launched.shape():<22}"
        f"{'' if tensor is None else str(tensor.dtype)[6:]:<10}{kind!s:<21}"
        f"{launched.arguments.get('POWER', ''):<5}"
        f"{used.registers:>9}{used.shared:>8}{used.spills:>8}"
    )


if __name__ == "__main__":
    main()
