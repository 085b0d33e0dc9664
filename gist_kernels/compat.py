"""Losses under the names, arguments and numbers of what people use, on the kernels here.

Each says which version it follows and where it differs. Nothing materialises a probability, and
rows that a mask leaves out are never read.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from gist_kernels.functional.divergence import bidirectional_kl, jensen_shannon
from gist_kernels.functional.linear_loss import (
    linear_bidirectional_kl,
    linear_gist_loss,
    linear_jensen_shannon,
)
from gist_kernels.functional.logits import Reduction
from gist_kernels.weights import HeadWeights

__all__ = [
    "JsdCrossEntropy",
    "LigerFusedLinearJSDLoss",
    "LigerJSD",
    "SymmetricKLLoss",
    "compute_kl_loss",
    "generalized_jsd_loss",
]


def compute_kl_loss(
    p: torch.Tensor, q: torch.Tensor, pad_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """R-Drop's loss of two passes, ``(KL(q || p) + KL(p || q)) / 2`` summed over all rows.

    Follows the README of dropreg/R-Drop. ``pad_mask`` is True where a row is *dropped*, the
    opposite of ``mask`` elsewhere here. It differs in one point: rows of padding may hold nan.

    Args:
        p, q: (..., C) logits.
        pad_mask: (...) or (..., 1) bool.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
    """
    mask = None
    if pad_mask is not None:
        if pad_mask.ndim == p.ndim and pad_mask.shape[-1] == 1:
            pad_mask = pad_mask.squeeze(-1)
        mask = ~pad_mask
    return bidirectional_kl(p, q, weights=(0.5, 0.5), reduction="sum", mask=mask)


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """TRL's loss of generalised knowledge distillation: ``beta KL(teacher || m) + (1 - beta)
    KL(student || m)``, ``m = beta teacher + (1 - beta) student``; at beta 0 KL(teacher || student),
    at 1 KL(student || teacher).

    Follows ``GKDTrainer.generalized_jsd_loss`` of TRL 1.16.0. It differs so: ``reduction="none"``
    (every class' share) and ``logits_are_probs=True`` raise, a mean of no rows is 0, not nan, and
    ``num_items_in_batch`` takes no other reduction than the default.

    Args:
        student_logits, teacher_logits: (B, T, V). Both get gradients, unless detached.
        labels: (B, T), -100 where a token is left out.
        beta: in [0, 1].
        temperature: T > 0, of both.
        reduction: "batchmean" (over the labelled tokens; without labels over B), "sum", or "mean"
            (over tokens and classes).
        logits_are_probs: must be False.
        num_items_in_batch: instead of what "batchmean" divides by.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
    """
    if logits_are_probs:
        raise ValueError("logits_are_probs=True is not taken: pass logits, or log-probabilities")
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(f"reduction must be batchmean, sum or mean; it is {reduction!r}")
    if num_items_in_batch is not None and reduction != "batchmean":
        raise ValueError(
            f"num_items_in_batch takes the place of a mean's divisor; reduction is {reduction!r}"
        )
    mask = None if labels is None else labels != -100
    divisor: float | torch.Tensor | None = num_items_in_batch
    if divisor is None and reduction == "batchmean" and mask is None:
        divisor = max(len(student_logits), 1)
    elif reduction == "mean":
        classes = student_logits.shape[-1]
        rows = mask.sum() if mask is not None else student_logits[..., 0].numel()
        divisor = rows * classes
    return _generalized_jsd(
        student_logits, teacher_logits, beta, temperature, mask, divisor, reduction
    )


class LigerJSD(torch.nn.Module):
    """Liger Kernel's generalised Jensen-Shannon divergence of log-probabilities, a scalar.

    Follows ``liger_kernel.transformers.LigerJSD`` 0.8.5: ``beta KL(P || m) + (1 - beta)
    KL(Q || m)`` with ``m = beta P + (1 - beta) Q``, over the rows with a label; at beta 0 and 1
    the forward and the reverse KL. It differs so:

    - The gradient to ``log_q`` is that of its softmax, whose sum is 0. The logits below a
      log-softmax get the same gradient.
    - Logits may stand in place of log-probabilities.
    - Nothing waits for the device, and a second backward pass is right.

    Args:
        beta: in [0, 1].
        ignore_index: of ``shift_labels``.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(
        self,
        log_q: torch.Tensor,
        log_p: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of the student's ``log_q`` and the teacher's ``log_p``, (BT, V), and labels (BT,)."""
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        return _generalized_jsd(log_q, log_p.detach(), self.beta, 1.0, mask, None, "batchmean")


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """Liger Kernel's distillation of a language model's head, without the logits of all rows:
    ``weight_hard_loss CE(student, labels) + weight_soft_loss JSD(student / T, teacher / T)``.

    Follows ``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`` 0.8.5: the divergence is that of
    :class:`LigerJSD`, both losses are means over the rows with a label, 0 where there are none, and
    the teacher gets no gradient. It differs so:

    - A frozen head's gradient is not computed. A trained head's is summed in float32.
    - A teacher with more classes than the student raises. Liger appends logits of 0.
    - ``compiled`` changes nothing, and nothing waits for the device.

    Each loss computes the student's logits. A weight of 0 saves that of its loss.

    Args:
        weight_hard_loss, weight_soft_loss: of the two losses.
        beta: in [0, 1].
        ignore_index: of ``true_labels``.
        temperature: T > 0, of the divergence only.
        compiled: taken for Liger's sake.
        chunk_size: ``chunk_rows`` of :func:`linear_gist_loss`, whose default it has.
        return_soft_hard_loss: return ``(loss, soft, hard)``, the last two without gradients.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int | None = None,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        _check_beta(beta)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_weight: torch.Tensor,
        true_labels: torch.Tensor,
        student_bias: torch.Tensor | None = None,
        teacher_bias: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of features (BT, H) and (BT, H'), heads (V, H) and (V, H') with biases (V,), and labels
        (BT,)."""
        mask = true_labels != self.ignore_index
        student = HeadWeights(student_weight, student_bias)
        soft = hard = student_input.new_zeros((), dtype=torch.float32)
        if self.weight_soft_loss != 0 or self.return_soft_hard_loss:
            bias = None if teacher_bias is None else teacher_bias.detach()
            teacher = HeadWeights(teacher_weight.detach(), bias)
            sides = teacher_input.detach(), student_input, teacher, student
            if 0 < self.beta < 1:
                soft = linear_jensen_shannon(
                    *sides, beta=self.beta, temperature=self.temperature, mask=mask,
                    chunk_rows=self.chunk_size,
                )  # fmt: skip
            else:
                soft = linear_bidirectional_kl(
                    *sides, weights=_one_way(self.beta), temperature=self.temperature, mask=mask,
                    chunk_rows=self.chunk_size,
                )  # fmt: skip
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            # The second side has no features: its logits of 0 cost no matmul.
            nothing = HeadWeights(student_weight.detach()[:, :0])
            found = linear_gist_loss(
                student_input, student_input.detach()[:, :0], true_labels, student, nothing,
                gist_weight=0.0, kl_weights=(0.0, 0.0), ignore_index=self.ignore_index, mask=mask,
                chunk_rows=self.chunk_size,
            )  # fmt: skip
            assert isinstance(found, torch.Tensor)
            hard = found
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


def _check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1]; it is {beta}")


def _one_way(beta: float) -> tuple[float, float]:
    """The weights of KL(teacher || student) and KL(student || teacher), at beta 0 or 1."""
    return (1.0, 0.0) if beta == 0 else (0.0, 1.0)


def _generalized_jsd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    beta: float,
    temperature: float,
    mask: torch.Tensor | None,
    divisor: float | torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    _check_beta(beta)
    kind: Reduction = "sum" if reduction == "sum" else "mean"
    if 0 < beta < 1:
        return jensen_shannon(
            teacher, student, beta=beta, temperature=temperature, mask=mask, divisor=divisor,
            reduction=kind,
        )  # fmt: skip
    return bidirectional_kl(
        teacher, student, weights=_one_way(beta), temperature=temperature, mask=mask,
        divisor=divisor, reduction=kind,
    )  # fmt: skip


class SymmetricKLLoss(torch.nn.Module):
    """torchtune's symmetric KL: ``r CE(teacher, student) + (1 - r) KL(student || teacher)``.

    Follows ``torchtune.modules.loss.SymmetricKLLoss`` 0.6.1, whose first term is the cross-entropy:
    KL(teacher || student) and the teacher's entropy, a constant. It differs so: the teacher gets no
    gradient, and a class of -inf on one side alone makes a KL infinite, where torchtune leaves it
    out.

    Args:
        sym_kd_ratio: r in [0, 1].
        ignore_index: label of the tokens to leave out.
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        if not 0 <= sym_kd_ratio <= 1:
            raise ValueError(f"sym_kd_ratio must be in [0, 1]; it is {sym_kd_ratio}")
        self.sym_kd_ratio = sym_kd_ratio
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        normalize: bool = True,
    ) -> torch.Tensor:
        """Of (..., V) logits and (...) labels: over the labelled tokens, or, without
        ``normalize``, their sum."""
        teacher, ratio = teacher_logits.detach(), self.sym_kd_ratio
        mask = labels.reshape(student_logits.shape[:-1]) != self.ignore_index
        kind: Reduction = "mean" if normalize else "sum"
        loss = bidirectional_kl(
            teacher, student_logits, weights=(ratio, 1 - ratio), mask=mask, reduction=kind
        )
        with torch.no_grad():
            # H(p) = log V - KL(p || uniform), and the uniform distribution takes no memory.
            flat = teacher.reshape(-1, teacher.shape[-1])
            uniform = flat.new_zeros(flat.shape[-1]).expand(flat.shape)
            kl = bidirectional_kl(
                flat, uniform, weights=(1.0, 0.0), mask=mask.reshape(-1), reduction=kind
            )
            count = mask.sum().clamp(max=1) if normalize else mask.sum()
            entropy = math.log(flat.shape[-1]) * count - kl
        return loss + ratio * entropy


class JsdCrossEntropy(torch.nn.Module):
    """timm's loss of AugMix: cross-entropy of the clean images, and all splits' Jensen-Shannon
    divergence.

    Follows ``timm.loss.JsdCrossEntropy`` 1.0.31. It differs in one point: timm clamps the mixture
    at 1e-7, where its gradient ends; here it is exact.

    Args:
        num_splits: views of each image, one after the other along the batch; the first is clean.
        alpha: of the divergence.
        smoothing: of the cross-entropy's labels; None or 0 for none.
    """

    def __init__(self, num_splits: int = 3, alpha: float = 12, smoothing: float | None = 0.1):
        super().__init__()
        self.num_splits = num_splits
        self.alpha = alpha
        self.smoothing = smoothing or 0.0

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of (num_splits * B, C) logits and at least B class indices."""
        size, rest = divmod(len(output), self.num_splits)
        if rest:
            raise ValueError(f"output has {len(output)} rows, no multiple of {self.num_splits}")
        splits = output.split(size)
        loss = F.cross_entropy(splits[0], target[:size], label_smoothing=self.smoothing)
        return loss + self.alpha * jensen_shannon(*splits)
