"""A frozen patch embedding as one matmul, where that is faster than a convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import nn

import gist_kernels as gk
from gist.untouched import is_bare, is_plain, written_forward
from gist_kernels.tracing import under_transform

_FORWARDS = {kind: written_forward(kind) for kind in (PatchEmbed, nn.Conv2d)}


def embed_patches(module: Any, images: torch.Tensor) -> torch.Tensor:
    """The output of timm's ``patch_embed`` for (B, 3, H, W) images.

    Patches don't overlap, so the convolution is a matmul of (B N, 3 p p) rows. On a CPU the matmul
    takes a fifth of the convolution's time. Anything but a plain, frozen
    :class:`timm.layers.PatchEmbed` on a CPU runs by its own forward, which also raises the errors.
    """
    if not _is_plain(module) or not _fits(module, images):
        return module(images)
    proj, (high, wide) = module.proj, module.patch_size
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // high, high, width // wide, wide)
    rows = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * high * wide)
    embedded = _linear()(rows, proj.weight.flatten(1), proj.bias)
    grid = (height // high, width // wide)
    shape = (grid[0] * grid[1],) if module.flatten else grid
    return module.norm(embedded.view(batch, *shape, proj.out_channels))


def _linear() -> Callable[..., torch.Tensor]:
    if torch.compiler.is_compiling():  # the choice of a library can't be traced
        return F.linear
    from gist_kernels.kernels.cpu.linear import linear

    return linear


def _is_plain(module: Any) -> bool:
    return (
        type(module) is PatchEmbed
        and type(module.proj) is nn.Conv2d
        and (module.flatten or module.output_fmt == "NHWC")
        and not module.dynamic_img_pad
        and module.proj.kernel_size == module.proj.stride == module.patch_size
        and module.proj.groups == 1
        and module.proj.padding == (0, 0)
        and module.proj.dilation == (1, 1)
        and is_plain(module.proj.weight)
        and all(
            is_bare(part) and type(part).forward is _FORWARDS[type(part)]
            for part in (module, module.proj)
        )
    )


def _fits(module: Any, images: torch.Tensor) -> bool:
    if images.ndim != 4 or images.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or under_transform():  # oneDNN's operator has no derivative
        return False
    if (
        torch.is_autocast_enabled("cpu")
        or images.dtype is not torch.float32
        or module.proj.weight.dtype is not torch.float32
    ):
        return False
    if gk.backend.serving("sublayers", "cpu", images.dtype) != "cpu":
        return False
    size = tuple(images.shape[2:])
    if module.img_size is not None and module.strict_img_size and size != tuple(module.img_size):
        return False
    return images.shape[1] == module.proj.in_channels and all(
        side and side % patch == 0 for side, patch in zip(size, module.patch_size, strict=True)
    )
