"""Memory and time of a training step on frozen weights that torchao has quantised, on a CPU.

    python -m bench.quantised [--model NAME] [--images N] [--threads N] [--steps N] [--weights ...]

Rank-4 adapters and a Gist token. Each line is a process of its own. "own forward" is the blocks'
own forward, not the fused sublayers. The step's memory is its peak beyond what was in use before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import timm
import torch
from torch import nn

import gist
from bench.machine import machine
from bench.measure import peak_bytes
from gist_kernels.quantised import parts_of

WEIGHTS = ("float32", "int8", "nf4")


def quantise(model: nn.Module, kind: str) -> None:
    """Quantise the blocks' linear layers, in place."""
    if kind == "float32":
        return
    from torchao.quantization import Int8WeightOnlyConfig, NF4Tensor, quantize_

    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and name.startswith("blocks."):
            if kind == "int8":
                quantize_(layer, Int8WeightOnlyConfig())
            else:
                weight = NF4Tensor.from_tensor(layer.weight.detach(), 64, 256)
                layer.weight = nn.Parameter(weight, requires_grad=False)


def measured(name: str, images: int, kind: str, own: bool, steps: int) -> dict[str, float]:
    """The frozen weights' and the step's bytes, and the step's seconds."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=100)
    quantise(backbone, kind)
    model = gist.wrap(backbone, gist.GistConfig(gist.Adapter(rank=4, scale=0.1))).train()
    if own:
        for block in backbone.blocks:
            block.register_forward_hook(lambda *_: None)
    assert ("own forward" in gist.explain(model)) == own
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    loss, target = gist.GistLoss(), torch.zeros(images, dtype=torch.int64)
    pixels = torch.randn(images, 3, *backbone.patch_embed.img_size)

    # Of one thread, process_time leaves out other processes.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []

    def step() -> None:
        start = clock()
        torch.autograd.grad(loss(model(pixels), target), trained)
        times.append(clock() - start)

    peak = peak_bytes(step, pixels.device)
    for _ in range(steps - 1):
        step()
    return {
        "frozen": sum(part.nbytes for p in frozen for part in parts_of(p).values()),
        "peak": peak or float("nan"),
        "seconds": statistics.median(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # a line's process
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.only:
        kind, how = given.only
        own = how == "own"
        print(json.dumps(measured(given.model, given.images, kind, own, given.steps)))
        return
    print(machine(torch.device("cpu")))
    print(f"{given.model}, {given.images} images, {given.threads} threads, {given.steps} steps\n")
    print("| weights | frozen weights, MB | step, MB | together, MB | step, s |")
    print("|---|---:|---:|---:|---:|")
    for kind in given.weights:
        for how in ("fused", "own"):
            if (kind, how) == ("float32", "own"):
                continue
            command = [sys.executable, "-m", "bench.quantised", *sys.argv[1:]]
            line = subprocess.check_output([*command, "--only", kind, how], text=True)
            found = json.loads(line.splitlines()[-1])
            frozen, peak = found["frozen"] / 1e6, found["peak"] / 1e6
            title = kind if how == "fused" else f"{kind}, own forward"
            print(
                f"| {title} | {frozen:,.0f} | {peak:,.0f} | {frozen + peak:,.0f} "
                f"| {found['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
