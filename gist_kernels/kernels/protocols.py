"""The definition of a backend, and the protocol of each family of kernels.

A backend is one :class:`Backend` value. A family is a module (or any object) that meets its
protocol here; mypy checks it. Kernels take plain tensors, know nothing of autograd, and write to an
argument only where its docstring says so.

Shapes: B rows of a batch, C classes, D features, R rank, M rows of all sequences, N tokens,
Q queries, H heads, Dh features per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from gist_kernels.weights import AdapterWeights, NormWeights, Rotation


class LossOptions(NamedTuple):
    """Checked arguments of :func:`gist_kernels.gist_loss`, under the names kernels use.

    ``bidirectional_kl`` is a ``gist_loss`` without target.
    """

    temperature: float
    cls_weight: float
    gist_weight: float
    kl_cls_gist_weight: float
    kl_gist_cls_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: str
    """"mean", "sum" or "none"; "batchmean" is "mean"."""
    gist_scale: float = 1.0
    """Of the KL terms: ``temperature`` over the Gist side's own, which multiplies its logits."""
    stop_gradient: str = ""
    """Where the KL terms give no gradient: "" nowhere, "a" and "b" to the first and the second
    logits, "targets" to the distribution that each KL starts from."""

    def kl_gradient_weights(self) -> tuple[float, float, float, float]:
        """The KL terms' weights in the gradients: of KL(p || q) and KL(q || p) to the side that
        each starts from, then of the two to the side that each ends at."""
        pq, qp, stop = self.kl_cls_gist_weight, self.kl_gist_cls_weight, self.stop_gradient
        return (
            0.0 if stop in ("a", "targets") else pq,
            0.0 if stop in ("b", "targets") else qp,
            0.0 if stop == "b" else pq,
            0.0 if stop == "a" else qp,
        )


class LossKernels(Protocol):
    """The loss family. ``target`` is None, (B,) class indices or (B, C) probabilities.

    ``row_scale`` is None or (B,), of any stride, in the statistics' dtype: what each row's loss and
    terms are multiplied by. A row of 0 is not looked at, and its gradient is 0. It comes with the
    reductions "sum" and "none" alone: what divides a mean is part of it.
    """

    MIXED_DTYPES: bool
    """Whether the sides may differ in dtype."""

    AHEAD: int
    """A differentiated loss of fewer logits than this a side calls ``forward_backward`` in its
    forward pass, and keeps both gradients. Then the upstream gradient is read on the host: 0 where
    that would wait for a device."""

    @property
    def NAME(self) -> str:  # noqa: N802
        """The backend's name, for the names of registered operators."""

    def stats_shape(self, rows: int) -> tuple[int, ...]:
        """The shape of the statistics that forward leaves for backward."""

    def forward(
        self,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        options: LossOptions,
        want_terms: bool,
        row_scale: torch.Tensor | None = None,
        stateless: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """``(loss, terms, stats)``: terms are (4,) or (4, B); ``backward`` needs stats. A
        ``stateless`` call keeps no tensor for later calls: a compiler owns the memory."""

    def backward(
        self,
        grad: torch.Tensor,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        stats: torch.Tensor,
        options: LossOptions,
        need_cls: bool,
        need_gist: bool,
        row_scale: torch.Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both gradients, in the logits' dtype; None for a side that needs none. ``in_place``
        writes them over the logits, whose rows then have one stride."""

    def forward_backward(
        self,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        options: LossOptions,
        row_scale: torch.Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """``(loss, d_cls, d_gist)``, none of them None, for an upstream gradient of 1."""


class DivergenceKernels(Protocol):
    """The Jensen-Shannon divergence of each row: 2 to 8 sides, (B, C) of one dtype."""

    @property
    def NAME(self) -> str:  # noqa: N802
        """The backend's, for the names of registered operators."""

    def stats_shape(self, rows: int, sides: int) -> tuple[int, ...]:
        """The shape of the statistics that forward leaves for backward."""

    def forward(
        self,
        sides: Sequence[torch.Tensor],
        weights: tuple[float, ...],
        temperatures: tuple[float, ...],
        row_scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(rows, stats)``: each row's divergence (B,), times its scale (as of
        :class:`LossKernels`), and what ``backward`` needs."""

    def backward(
        self,
        grad: torch.Tensor,
        sides: Sequence[torch.Tensor],
        weights: tuple[float, ...],
        temperatures: tuple[float, ...],
        stats: torch.Tensor,
        needs: Sequence[bool],
        row_scale: torch.Tensor | None,
        in_place: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """Each side's gradient in its dtype, ``grad`` being that of the rows; None where none is
        needed. ``in_place`` writes them over the logits, which are then contiguous."""


class AdapterKernels(Protocol):
    """LayerNorm and the bottleneck adapter; both read the same rows."""

    def forward(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None,
        norm: NormWeights | None,
        adapter: AdapterWeights | None,
        bias: torch.Tensor | None,
        matmul_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """``(normed, out, z, stats)``: ``LayerNorm(x)`` (M, D); ``add + adapter(x) + bias`` (M, D);
        ``z = x Wd^T + bd`` (M, R); each row's mean and 1 / standard deviation (M, 2). ``normed`` is
        in ``matmul_dtype``, of the matmul that reads it (None: x's), the rest in x's."""

    def backward(
        self,
        d_out: torch.Tensor | None,
        d_normed: torch.Tensor | None,
        x: torch.Tensor,
        norm: NormWeights | None,
        stats: torch.Tensor | None,
        adapter: AdapterWeights | None,
        z: torch.Tensor | None,
        *,
        pass_through: bool,
        need_dx: bool = True,
    ) -> tuple[
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
    ]:
        """``(dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias)``. With ``pass_through``,
        dx includes ``d_out`` itself. ``d_normed`` is in the dtype of ``normed``."""


class ActivationKernels(Protocol):
    """Element-wise activations of contiguous tensors, plain and gated.

    A gated one takes rows (M, 2 F), the gates in the first half and the values in the second.
    """

    def forward(self, u: torch.Tensor, activation: str) -> torch.Tensor:
        """``act(u)``."""

    def backward(
        self, d_a: torch.Tensor, u: torch.Tensor, activation: str, *, into_d_a: bool = False
    ) -> torch.Tensor:
        """``d_a * act'(u)``; ``into_d_a`` writes over d_a."""

    def gated_forward(self, u: torch.Tensor, activation: str) -> torch.Tensor:
        """``act(gate) * value``, (M, F)."""

    def gated_backward(
        self, d_hidden: torch.Tensor, u: torch.Tensor, activation: str
    ) -> torch.Tensor:
        """The gradient of ``u``, (M, 2 F): ``d_hidden * value * act'(gate)``, then
        ``d_hidden * act(gate)``."""


class AttentionKernels(Protocol):
    """Multi-head attention of (B, Q, H Dh) queries over (B, N, H Dh) keys and values.

    Batch and row strides may be any. ``lengths`` is None or (B,), int32 or int64 in 1 to N: each
    row's number of tokens. Queries are of the first Q tokens. Of tokens past a row's length nothing
    is read; results, log-sum-exps and gradients are 0.
    """

    def serves(self, q: torch.Tensor, k: torch.Tensor, num_heads: int) -> bool:
        """Whether the kernels take such tensors; PyTorch's attention serves the rest."""

    def rotates(self, q: torch.Tensor, k: torch.Tensor, num_heads: int, rotation: Rotation) -> bool:
        """Whether forward and backward take such a rotation; where not, queries and keys come
        rotated and their gradients are rotated back."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        num_heads: int,
        scale: float,
        rotation: Rotation | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(out, lse)``: (B, Q, H Dh), and the scores' log-sum-exps (B, H, Q) in float32. Rotated
        queries, of the first Q tokens, and keys are rounded to their dtype."""

    def backward(
        self,
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        num_heads: int,
        scale: float,
        d_q: torch.Tensor,
        d_k: torch.Tensor,
        d_v: torch.Tensor,
        rotation: Rotation | None = None,
        lengths: torch.Tensor | None = None,
    ) -> None:
        """Write the gradients of ``q``, ``k`` and ``v`` into ``d_q``, ``d_k`` and ``d_v``."""


class LinearKernels(Protocol):
    """Matmuls with frozen (O, I) weights."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """``x weight^T + bias``."""

    def add_linear(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``out + x weight^T``; may write over ``out``, which is of x's dtype or float32."""


class HeadKernels(Protocol):
    """The matmuls of a linear head (C, D) on a chunk of M rows, and how large a chunk is."""

    SKIPS_ROWS: bool
    """Whether rows that don't count are left out of the matmuls. To find them, the host reads
    the mask."""

    def chunk_rows(self, classes: int, itemsize: int) -> int:
        """Row pairs of a chunk, a function of the logits' classes and bytes each alone."""

    def buffer(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """(M, C), for the logits of one chunk after the other; None if each has its own."""

    def logits(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``rows weight^T + bias``, (M, C): a new tensor, or ``out``, of :meth:`buffer`."""

    def rows_gradient(self, d_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``d_logits weight``, (M, D)."""

    def add_weight_gradient(
        self, total: torch.Tensor, d_logits: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Adds ``d_logits^T rows`` to ``total``, (C, D) in float32 at least."""


class LinearLossKernels(NamedTuple):
    """What a loss of a linear head's logits is made of."""

    NAME: str
    loss: LossKernels
    divergence: DivergenceKernels
    head: HeadKernels


class SublayerKernels(NamedTuple):
    """The kernels of a transformer block's sublayers."""

    adapter: AdapterKernels
    activation: ActivationKernels
    attention: AttentionKernels
    linear: LinearKernels


OPERATIONS = {
    "loss": ("bidirectional_kl", "gist_loss", "gist_loss_and_grad"),
    "divergence": ("jensen_shannon",),
    "linear_loss": ("linear_bidirectional_kl", "linear_gist_loss", "linear_jensen_shannon"),
    "adapter": ("adapter",),
    "attention": ("prefix_attention",),
    "sublayers": ("adapter_attention", "adapter_mlp"),
}
"""The public operations that each family of kernels serves."""


@dataclass(frozen=True)
class Backend:
    """One backend: its name, the tensors it takes, and its kernels, by family."""

    name: str
    unavailable: str | None = None
    """The reason why it can't run on this machine; None if it can."""
    device_types: tuple[str, ...] = ()
    """Devices it takes, as values of ``tensor.device.type``."""
    dtypes: tuple[torch.dtype, ...] = ()
    detail: Callable[[], str] = str
    """Names the hardware and software it runs on here."""
    loss: Callable[[], LossKernels] | None = None
    """Each family is a function that returns its kernels: it imports them at their first use."""
    divergence: Callable[[], DivergenceKernels] | None = None
    linear_loss: Callable[[], LinearLossKernels] | None = None
    adapter: Callable[[], AdapterKernels] | None = None
    attention: Callable[[], AttentionKernels] | None = None
    sublayers: Callable[[], SublayerKernels] | None = None

    def has(self, family: str) -> bool:
        """Whether it has kernels of a family, a key of :data:`OPERATIONS`. Imports none."""
        return getattr(self, family) is not None

    def kernels(self, family: str) -> Any:
        """Its kernels of a family, a key of :data:`OPERATIONS`; None if it has none."""
        load = getattr(self, family)
        return None if load is None else load()

    def refusal(self, family: str, device_type: str, dtype: torch.dtype) -> str | None:
        """The reason why this backend can't serve such a call; None if it can."""
        if self.unavailable is not None:
            return self.unavailable
        if not self.has(family):
            return f"it has no {family} kernels"
        if device_type not in self.device_types:
            return f"it takes {' or '.join(self.device_types)} tensors, not {device_type}"
        if dtype not in self.dtypes:
            return f"it does not take {dtype}"
        return None
