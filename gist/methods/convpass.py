"""Convpass: convolutional bypasses beside both sublayers."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.methods import hooks
from gist.methods.base import AttachedMethod, FusedParts, Method, Refusal, new_parameters
from gist.methods.hooks import Hook
from gist.methods.linear import CastLinear
from gist.validate import check_count, check_finite, check_rate

_PLACES = ("attention", "mlp")


@dataclass(frozen=True)
class Convpass(Method):
    """Bottlenecks with a 3 x 3 convolution, parallel to both sublayers (arXiv:2207.07039)::

        n = norm(x);  x = x + drop_path(sublayer(n) + scale * bypass(n))
        bypass(n) = up(dropout(quick_gelu(conv(quick_gelu(down(n))))))

    ``quick_gelu(z) = z * sigmoid(1.702 * z)``, as in the released code. The convolution pads with
    zeros and runs over the grid of the image's patches. Every other token, such as class token,
    registers, Gist tokens and prompts, is a grid of its own of 1 x 1: only the centre of the kernel
    meets it. The publication's backbones have the class token only. Down starts Xavier-uniform, the
    centre of the kernel as the identity, all else at 0.

    The released code draws drop-path for the bypass on its own; here one draw drops sublayer and
    bypass together. LayerScale scales the sublayer only.

    Parameters: ``2 * depth * (2 * D * rank + D + 9 * rank**2 + 2 * rank)``.

    Args:
        rank: bottleneck width h, at least 1.
        scale: factor on the update; the released code sets it for each task.
        dropout: dropout rate of the bottleneck, in [0, 1).
    """

    name: ClassVar[str] = "convpass"
    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_finite("scale", self.scale)
        check_rate("dropout", self.dropout)

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        blocks = [family.parts(index) for index in range(len(family.blocks))]
        bypasses = Bypasses(family.num_prefix_tokens)
        for index, parts in enumerate(blocks):
            bypasses.append(nn.ModuleDict({place: Bypass(self, family) for place in _PLACES}))
            for place, norm, output in zip(_PLACES, parts.norms, parts.branch_outputs, strict=True):
                norm.register_forward_hook(Hook(bypasses, "at_norm", index, place))
                output.register_forward_pre_hook(Hook(bypasses, "at_output", index, place))
            # Also after an exception, and where activation checkpointing stops within a block.
            end = Hook(bypasses, "at_end", index)
            family.blocks[index].register_forward_hook(end, always_call=True)
        family.patch_projection.register_forward_hook(Hook(bypasses, "at_patches"))
        return bypasses

    def num_parameters(self, family: BackboneFamily) -> int:
        _ = family.patch_projection  # a ValueError of a model without patches
        width, rank = family.embed_dim, self.rank
        each = 2 * width * rank + width + 9 * rank**2 + 2 * rank
        return 2 * len(family.blocks) * each


def quick_gelu(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(1.702 * z)


class TokenConv(nn.Conv2d):
    """A 3 x 3 convolution over the patches among (B, N, rank) tokens."""

    def __init__(self, rank: int, options: dict[str, Any]) -> None:
        super().__init__(rank, rank, 3, padding=1, **options)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.weight[:, :, 1, 1] = torch.eye(rank)

    def forward(self, low: torch.Tensor, first: int, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """``grid`` is the patches' rows and columns, ``first`` the number of tokens before them."""
        assert self.bias is not None
        weight, bias = self.weight.to(low.dtype), self.bias.to(low.dtype)
        (batch, _, rank), count = low.shape, grid[0] * grid[1]
        before, patches, after = low.tensor_split((first, first + count), dim=1)
        maps = F.conv2d(patches.mT.reshape(batch, rank, *grid), weight, bias, padding=1)
        centre = weight[:, :, 1, 1]
        before, after = (F.linear(tokens, centre, bias) for tokens in (before, after))
        return torch.cat((before, maps.flatten(2).mT, after), dim=1)


class Bypass(nn.Module):
    """``scale * up(act(conv(act(down(n)))))``: the update of one sublayer."""

    def __init__(self, config: Convpass, family: BackboneFamily) -> None:
        super().__init__()
        width, options = family.embed_dim, new_parameters(family.model)
        self.scale, self.dropout = config.scale, config.dropout
        self.down = CastLinear(width, config.rank, **options)
        self.conv = TokenConv(config.rank, options)
        self.up = CastLinear(config.rank, width, **options)
        nn.init.xavier_uniform_(self.down.weight)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}"

    def forward(self, n: torch.Tensor, first: int, grid: tuple[int, int]) -> torch.Tensor:
        low = quick_gelu(self.conv(quick_gelu(self.down(n)), first, grid))
        update: torch.Tensor = self.up(F.dropout(low, self.dropout, self.training))
        return self.scale * update


class _Thread(threading.local):
    def __init__(self) -> None:
        self.grids: dict[int, tuple[int, tuple[int, int]]] = {}


_thread = _Thread()


class Bypasses(nn.ModuleList, AttachedMethod):
    """For each block a :class:`Bypass` for "attention" and one for "mlp".

    The grid of a call is known where its patches are embedded, and is kept by thread. Activation
    checkpointing runs blocks again without their embedding, and may do so in another thread. The
    number of patches then tells the grid, unless grids of several shapes had that number.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self._by_count: dict[int, tuple[int, int] | None] = {}  # None where several have it

    def fused(self, index: int) -> FusedParts | Refusal:
        return Refusal("its method is Convpass, whose convolutions run by hooks")

    def grid(self, num_tokens: int) -> tuple[int, int]:
        """The rows and columns of the patches among a block's tokens.

        Raises:
            ValueError: the patches form no known grid.
        """
        count = num_tokens - self.num_prefix_tokens - sum(self.added_tokens)
        backward, grid = _thread.grids.get(id(self), (None, None))
        if backward != _backward_pass():
            if count in self._by_count and self._by_count[count] is None:
                raise ValueError(
                    f"Convpass can't tell which grid {count} patches form, because images of "
                    "several shapes have that number and activation checkpointing runs blocks "
                    "again; use images of one shape, or turn checkpointing off"
                )
            grid = self._by_count.get(count)
        if grid is None:
            raise ValueError(
                "Convpass needs the grid of the patches, which it reads where the images are "
                "embedded; call the model with images"
            )
        if grid[0] * grid[1] != count:
            raise ValueError(
                f"Convpass needs all {grid[0]} x {grid[1]} patches of an image in every block; "
                f"there are {count}; set the backbone's patch_drop_rate to 0"
            )
        return grid

    def at_patches(self, projection: nn.Module, args: object, output: torch.Tensor) -> None:
        """Hook: note the grid of the (B, D, rows, columns) patches."""
        grid = int(output.shape[-2]), int(output.shape[-1])
        _thread.grids[id(self)] = _backward_pass(), grid
        if not torch.compiler.is_compiling():
            known = self._by_count.setdefault(grid[0] * grid[1], grid)
            if known != grid:
                self._by_count[grid[0] * grid[1]] = None

    def at_norm(
        self, index: int, place: str, norm: nn.Module, args: object, output: torch.Tensor
    ) -> None:
        """Hook: compute the update from a norm's output, for :meth:`at_output`."""
        bypass = self._bypass(index, place)
        first = self.num_prefix_tokens + self.added_tokens[0]
        hooks.hand_on(bypass, bypass(output, first, self.grid(output.shape[1])))

    def at_output(
        self, index: int, place: str, module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """Hook: add the update to what enters a sublayer's drop-path."""
        # Both sublayers may end in one module.
        update = hooks.taken(self._bypass(index, place))
        return None if update is None else (args[0] + update, *args[1:])

    def at_end(self, index: int, block: nn.Module, args: object, output: object) -> None:
        """Hook: drop an update that found no output."""
        for place in _PLACES:
            hooks.taken(self._bypass(index, place))

    def _bypass(self, index: int, place: str) -> Any:
        of_block: Any = self[index]
        return of_block[place]


def _backward_pass() -> int:
    """The number of the backward pass that this thread is in; -1 outside of any."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
