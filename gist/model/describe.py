"""Descriptions of a model: parameter counts, methods that fit, and which blocks run fused."""

from __future__ import annotations

import contextlib

from torch import nn

import gist_kernels
from gist.backbones.families import family_of
from gist.methods import METHODS
from gist.methods.base import Refusal
from gist.model.containers import gathered_root, gist_model_of
from gist.model.wrapped import GistModel, ParameterCount


def available_methods(backbone: nn.Module) -> dict[str, int]:
    """The PEFT methods that fit a backbone, with the number of parameters each trains by default.

    Args:
        backbone: what :func:`gist.wrap` takes, or a :class:`gist.GistModel`.

    >>> import gist, timm
    >>> gist.available_methods(timm.create_model("vit_tiny_patch16_224"))["adapter"]
    20784
    """
    family = family_of(backbone.backbone if isinstance(backbone, GistModel) else backbone)
    counts = {}
    for name, method in METHODS.items():
        # A method that doesn't fit raises a ValueError with its reason.
        with contextlib.suppress(ValueError):
            counts[name] = method().num_parameters(family)
    return counts


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters by method, token, head and frozen backbone.

    The backbone's own parameters that a method trains count as the method's. The model may stand
    within DistributedDataParallel or ``torch.compile``, or be sharded.
    """
    return gist_model_of(model).count_parameters()


def explain(model: nn.Module) -> str:
    """Which blocks run as fused sublayers and which by their own forward, and why: a line each.

    The answer holds for the state at the call: training or evaluation mode, inside or outside
    autocast. It holds under ``torch.compile`` too. Of a model sharded by ``fully_shard``, what is
    outside of the blocks is gathered: call this in every process.

    >>> import gist, timm
    >>> model = gist.wrap(timm.create_model("vit_tiny_patch16_224"))
    >>> print(gist.explain(model))
    blocks 0 to 11: fused sublayers, served by 'cpu'
    """
    model = gist_model_of(model)
    backbone = model.family.model
    last = len(model.family.blocks) - 1
    lost = model.lost_hook
    if lost is not None:
        return f"blocks 0 to {last}: none, a call raises an error, for {lost}"
    with gathered_root(model):
        plan = model.plan()
    whole = plan.refusal
    if whole is not None:
        return f"blocks 0 to {last}: the backbone's own forward, for {whole.reason}"
    like = next(backbone.parameters())
    serving = gist_kernels.backend.serving("sublayers", like.device.type, like.dtype)
    lines: list[tuple[int, int, str]] = []
    for index, block in enumerate(plan.blocks):
        how = f"fused sublayers, served by {serving!r}"
        if isinstance(block, Refusal):
            how = f"the block's own forward, for {block.reason}"
        elif block.own_attention is not None:
            sublayers = "MLP" if block.own_attention.always else "sublayers"
            how = f"fused {sublayers}, served by {serving!r}, attention by PyTorch's, "
            how += block.own_attention.reason
        if lines and lines[-1][2] == how:
            lines[-1] = (lines[-1][0], index, how)
        else:
            lines.append((index, index, how))
    return "\n".join(
        f"block {first}: {how}" if first == last else f"blocks {first} to {last}: {how}"
        for first, last, how in lines
    )
