"""The adapter as GIST releases it, and two other placements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import gist_kernels
from gist.backbones.base import BackboneFamily
from gist.methods import hooks
from gist.methods.base import AttachedMethod, FusedParts, Method, Refusal, new_parameters, unique
from gist.methods.hooks import Hook
from gist.methods.linear import CastLinear, is_untouched
from gist.untouched import is_bare
from gist.validate import check_activation, check_count, check_finite, check_known
from gist_kernels.activations import ACTIVATIONS
from gist_kernels.tracing import watched

PLACEMENTS = ("shared", "parallel", "sequential")
ALTERED = "its adapter's layers are not as gist made them"


@dataclass(frozen=True)
class Adapter(Method):
    """Bottleneck adapter; by default one per block, parallel to both sublayers (arXiv:2312.07255).

    With ``A(x) = scale * (up(act(down(x))))`` and ``placement="shared"`` every block computes::

        x = x + drop_path(attn(norm1(x))) + A(x)
        x = x + drop_path(mlp(norm2(x))) + A(x)

    A reads the residual stream before its norm, and drop-path never drops it. In a post-norm block,
    the norm takes the sum: ``x = norm1(x + attn(x) + A(x))``. Weights start
    truncated-normal with standard deviation 0.02, biases at 0, as the ViT's own linears do.

    ``placement="parallel"`` is the same with an adapter of its own for each sublayer;
    ``"sequential"`` is the adapter of Houlsby et al. (arXiv:1902.00751), after each sublayer's last
    linear layer: ``h = h + A(h)``, published with rank 64, scale 1 and a start near 0.

    Parameters: ``depth * (2 * D * rank + rank + D)``, twice as many unless shared; 82,992 for
    ViT-B/16 at rank 4.

    Args:
        rank: bottleneck width, at least 1.
        scale: factor on the update.
        activation: one of those of :func:`gist_kernels.adapter`.
        placement: "shared", "parallel" or "sequential".
    """

    name: ClassVar[str] = "adapter"
    rank: int = 4
    scale: float = 0.1
    activation: str = "gelu"
    placement: str = "shared"

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_finite("scale", self.scale)
        check_activation(self.activation)
        check_known("placement", self.placement, PLACEMENTS)

    def attach(self, family: BackboneFamily) -> AttachedMethod:
        blocks = [family.parts(index) for index in range(len(family.blocks))]
        if self.placement == "sequential":
            last = [family.last_layers(index) for index in range(len(blocks))]
        adapters = Adapters(self.placement)
        for index, parts in enumerate(blocks):
            if self.placement == "shared":
                shared = Bottleneck(self, family)
                shared.attach_parallel(family.blocks[index], parts.readers, parts.branch_outputs)
                adapters.append(shared)
                continue
            pair = {name: Bottleneck(self, family) for name in ("attention", "mlp")}
            for place, bottleneck in enumerate(pair.values()):
                if self.placement == "sequential":
                    nn.init.trunc_normal_(bottleneck.down.weight, std=0.01)
                    nn.init.trunc_normal_(bottleneck.up.weight, std=0.01)
                    last[index][place].register_forward_hook(Hook(bottleneck, "after"))
                else:
                    bottleneck.attach_parallel(
                        family.blocks[index],
                        parts.readers[place : place + 1],
                        parts.branch_outputs[place : place + 1],
                    )
            adapters.append(nn.ModuleDict(pair))
        return adapters

    def num_parameters(self, family: BackboneFamily) -> int:
        width = family.embed_dim
        each = 2 * width * self.rank + self.rank + width
        return len(family.blocks) * each * (1 if self.placement == "shared" else 2)


class Bottleneck(nn.Module):
    """``scale * up(act(down(x)))``: the update of one sublayer, or of both of a block."""

    def __init__(self, config: Any, family: BackboneFamily) -> None:
        super().__init__()
        width, options = family.embed_dim, new_parameters(family.model)
        self.scale, self.activation = config.scale, config.activation
        self.down = CastLinear(width, config.rank, **options)
        self.up = CastLinear(config.rank, width, **options)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, activation={self.activation!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The update A(x) of (B, N, D) tokens, to be added to the residual stream."""
        if watched() or not self.is_untouched:
            return self.scale * self.up(ACTIVATIONS[self.activation](self.down(x)))
        parameters = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        return gist_kernels.adapter(
            x,
            *(parameter.to(x.dtype) for parameter in parameters),
            scale=self.scale,
            activation=self.activation,
        )

    @property
    def is_untouched(self) -> bool:
        """Whether both layers are as made here, so that kernels may read their weights."""
        return is_untouched(self.down) and is_untouched(self.up)

    def weights(self) -> gist_kernels.AdapterWeights:
        """Parameters and settings as the fused sublayers take them."""
        down, up = self.down, self.up
        return gist_kernels.AdapterWeights(
            down.weight, down.bias, up.weight, up.bias, self.scale, self.activation
        )

    def attach_parallel(
        self,
        block: nn.Module,
        readers: tuple[nn.Module, ...],
        branch_outputs: tuple[nn.Module, ...],
    ) -> None:
        """Read x where the sublayer begins, and add A(x) to the sublayer's output."""
        for reader in readers:
            reader.register_forward_hook(Hook(self, "at_norm"))
        for output in unique(branch_outputs):
            output.register_forward_hook(Hook(self, "at_output"))
        # Also after an exception, and where activation checkpointing stops within a block.
        block.register_forward_hook(Hook(self, "at_end"), always_call=True)

    def after(self, linear: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        """Hook: the update of a layer's own output, added to it."""
        return output + self(output)

    def at_norm(self, norm: nn.Module, args: tuple[torch.Tensor], output: object) -> None:
        """Hook: compute the update of the residual stream, which a norm reads, or another module
        in a post-norm block, for :meth:`at_output`."""
        hooks.hand_on(self, self(args[0]))

    def at_output(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        """Hook: add the update to a sublayer's output."""
        # Both sublayers may end in one module: this bottleneck may belong to only one of them.
        update = hooks.taken(self)
        return output if update is None else output + update

    def at_end(self, block: nn.Module, args: object, output: object) -> None:
        """Hook: drop an update that found no output."""
        hooks.taken(self)


class Adapters(nn.ModuleList, AttachedMethod):
    """For each block a :class:`Bottleneck`, or one for "attention" and one for "mlp"."""

    def __init__(self, placement: str) -> None:
        super().__init__()
        self.placement = placement

    def fused(self, index: int) -> FusedParts | Refusal:
        if self.placement == "sequential":
            return Refusal("its adapters come after the sublayers, not beside them")
        part: Any = self[index]
        bottlenecks = [part] if isinstance(part, Bottleneck) else part.values()
        if not all(is_bare(each) and each.is_untouched for each in bottlenecks):
            return Refusal(ALTERED)
        if isinstance(part, Bottleneck):
            return FusedParts(part.weights(), part.weights())
        return FusedParts(part["attention"].weights(), part["mlp"].weights())
