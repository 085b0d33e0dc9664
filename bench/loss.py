"""The loss, forward and backward, against what else computes it, in one run.

    python bench/loss.py [--device cpu|cuda] [--dtype float32] [--shapes 32x100 ...] [--out FILE]

A line is one contender at one shape: median and 20 % to 80 % quantiles of a call in milliseconds;
how many times our time it took, as the median over rounds; and the bandwidth at which a copy would
have to run to move, in that time, the least a loss must move, as a share of the bandwidth at which
a copy of such tensors does run. No ratio is printed where our results fail their comparison.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F

import gist_kernels as gk

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SHAPES = {
    "cpu": ("32x100", "64x1000", "256x21843", "1024x32000"),
    "cuda": ("64x100", "64x1000", "256x21843", "4096x32000", "2048x131072"),
}
# Logit tensors read and written by a loss and its backward pass that keep nothing in between.
TRANSFERS = {"ours": 6, "ours, no autograd": 4}


def released(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As published with the method: nan where a probability underflows."""
    p, q = F.softmax(cls / 3, dim=1), F.softmax(gist / 3, dim=1)
    kl = F.kl_div(q.log(), p, reduction="batchmean") + F.kl_div(p.log(), q, reduction="batchmean")
    return F.cross_entropy(cls, target) + 0.5 * F.cross_entropy(gist, target) + 0.75 * kl


def log_softmax_form(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same, written as a careful user of PyTorch would."""
    log_p, log_q = F.log_softmax(cls / 3, dim=1), F.log_softmax(gist / 3, dim=1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    kl = kl + F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return F.cross_entropy(cls, target) + 0.5 * F.cross_entropy(gist, target) + 0.75 * kl


def liger() -> Loss:
    """Liger-Kernel's operators composed: its KL has a gradient for one side alone, hence twice."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    cross_entropy = LigerCrossEntropyLoss()
    kl_div = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log_p, log_q = F.log_softmax(cls / 3, dim=1), F.log_softmax(gist / 3, dim=1)
        # Each direction's gradient into the side that the operator takes for a constant.
        p, q = log_p.detach(), log_q.detach()
        constant = (log_p.exp() * (log_p - q)).sum(1).mean()
        constant = constant + (log_q.exp() * (log_q - p)).sum(1).mean()
        kl = kl_div(log_q, p) + kl_div(log_p, q) + constant - constant.detach()
        # In place of their gradients its cross-entropies overwrite logits: they get copies.
        ce = cross_entropy(cls.clone(), target) + 0.5 * cross_entropy(gist.clone(), target)
        return ce + 0.75 * kl

    return loss


def contenders(device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """What computes the loss, and what can't take part, with the reason."""
    compiled = torch.compile(log_softmax_form, dynamic=False)
    found: dict[str, Loss] = {
        "released": released,
        "log-softmax": log_softmax_form,
        "torch.compile": compiled,
    }
    absent = {}
    if device.type != "cuda":
        absent["Liger-Kernel"] = "its operators need a GPU"
    elif importlib.util.find_spec("liger_kernel") is None:
        absent["Liger-Kernel"] = "not installed"
    else:
        found["Liger-Kernel"] = liger()
    return found, absent


def parity(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> str | None:
    """What is wrong with our loss or gradients of these, or of the first rows of large ones."""
    rows = max(1, min(len(cls), 2**23 // cls.shape[1]))
    inputs = [x.detach()[:rows].requires_grad_() for x in (cls, gist)]
    exact = [x.detach()[:rows].double().requires_grad_() for x in (cls, gist)]
    ours = gk.gist_loss(*inputs, target[:rows])
    truth = log_softmax_form(*exact, target[:rows])
    pairs = [(ours, truth)]
    pairs += zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, exact), strict=True)
    for name, (value, expected) in zip(("loss", "d_cls", "d_gist"), pairs, strict=True):
        tolerance = max(1e-5, 2 * torch.finfo(value.dtype).eps) * expected.abs().max().item()
        error = (value.double() - expected).abs().max().item()
        if not error <= tolerance:
            return f"{name} is off by {error:.3g}, where {tolerance:.3g} is allowed"
    return None


def measure(
    rows: int, classes: int, dtype: torch.dtype, device: torch.device, losses: dict[str, Loss]
) -> dict[str, Any]:
    """Timings at one shape, as they go into the JSON file."""
    generator = torch.Generator(device).manual_seed(0)
    cls, gist = (
        (3 * torch.randn(rows, classes, generator=generator, device=device))
        .to(dtype)
        .requires_grad_()
        for _ in range(2)
    )
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    copies = [(x.detach(), torch.empty_like(x)) for x in (cls, gist)]

    def differentiated(loss: Loss) -> timing.Call:
        return lambda: torch.autograd.grad(loss(cls, gist, target), (cls, gist))

    calls = {"ours": differentiated(gk.gist_loss)}
    calls["ours, no autograd"] = lambda: gk.gist_loss_and_grad(cls, gist, target)
    calls |= {name: differentiated(loss) for name, loss in losses.items()}
    calls["copy of both"] = lambda: [to.copy_(x) for x, to in copies]
    failure = parity(cls, gist, target)
    times = timing.in_turns(calls, device)
    results = _table(times, failure)
    if device.type == "cuda":
        # Where launches cost more than the kernels, a training step that cares is a graph.
        graphs = {name: timing.graphed(call) for name, call in calls.items()}
        results |= {
            f"{name}, graph": result
            for name, result in _table(timing.in_turns(graphs, device), failure).items()
        }
    return {
        "rows": rows,
        "classes": classes,
        "dtype": str(dtype)[6:],
        "logit_bytes": cls.numel() * cls.itemsize,
        "parity": failure or "ok",
        "results": results,
    }


def _table(times: dict[str, list[float]], failure: str | None) -> dict[str, dict[str, float]]:
    results = {}
    for name, seconds in times.items():
        results[name] = timing.quantiles(seconds)
        if failure is None:
            results[name]["times_ours"] = timing.ratio(seconds, times["ours"])
        if name in TRANSFERS:
            share = timing.ratio(times["copy of both"], seconds) * TRANSFERS[name] / 4
            results[name]["share_of_copy_bandwidth"] = share
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--shapes", nargs="+", metavar="BxC")
    parser.add_argument("--threads", type=int, help="on a CPU; default: as PyTorch chooses")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    losses, absent = contenders(device)
    report: dict[str, Any] = {"benchmark": "loss", "machine": timing.machine(device)}
    report |= {"absent": absent, "shapes": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for name, reason in absent.items():
        print(f"{name} takes no part: {reason}")
    columns = "".join(f"{name:>10}" for name in ("median", "20 %", "80 %", "x ours", "of copy"))
    print(f"\n{'B x C':>14}  {'milliseconds':<26}{columns}")
    for shape in arguments.shapes or SHAPES[device.type]:
        rows, classes = map(int, shape.split("x"))
        torch.compiler.reset()
        found = measure(rows, classes, dtype, device, losses)
        report["shapes"].append(found)
        if found["parity"] != "ok":
            print(f"{shape}: {found['parity']}; no ratios")
        for name, result in found["results"].items():
            cells = "".join(f"{1e3 * result[key]:10.3f}" for key in ("median", "q20", "q80"))
            cells += f"{result['times_ours']:10.2f}" if "times_ours" in result else 10 * " "
            if "share_of_copy_bandwidth" in result:
                cells += f"{result['share_of_copy_bandwidth']:10.0%}"
            print(f"{f'{rows} x {classes}':>14}  {name:<26}{cells}", flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
