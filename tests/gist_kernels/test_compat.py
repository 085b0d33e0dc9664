"""The losses that stand in for others' against those themselves, or against their formulas."""

from __future__ import annotations

import math

import pytest
import timm.loss
import torch
import torch.nn.functional as F

from gist_kernels import compat


def assert_same(ours, theirs, inputs, **tolerances):
    """Values and gradients."""
    tolerances = {"rtol": 2e-5, "atol": 1e-6} | tolerances
    torch.testing.assert_close(ours, theirs, **tolerances)
    for x, y in zip(
        torch.autograd.grad(ours, inputs, retain_graph=True),
        torch.autograd.grad(theirs, inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(x, y, **tolerances)


def draw(*shape):
    return (2 * torch.randn(shape)).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.1, 0.0, None])
@pytest.mark.parametrize("splits", [2, 3])
def test_jsd_cross_entropy_is_timms(splits, smoothing):
    output, target = draw(4 * splits, 10), torch.randint(10, (4 * splits,))
    theirs = timm.loss.JsdCrossEntropy(splits, alpha=7, smoothing=smoothing)
    ours = compat.JsdCrossEntropy(splits, alpha=7, smoothing=smoothing)
    assert_same(ours(output, target), theirs(output, target), output)
    with pytest.raises(ValueError, match="no multiple of"):
        ours(output[1:], target)


@pytest.mark.parametrize("pad", [None, "rows", "broadcast"])
def test_compute_kl_loss_is_r_drops(pad):
    p, q = draw(2, 5, 9), draw(2, 5, 9)
    dropped = torch.rand(2, 5) < 0.4
    total = sum(
        F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none").sum(-1)
        for x, y in ((p, q), (q, p))
    )
    mask = {None: None, "rows": dropped, "broadcast": dropped[..., None]}[pad]
    theirs = (total if pad is None else total[~dropped]).sum() / 2
    assert_same(compat.compute_kl_loss(p, q, mask), theirs, (p, q))


def jsd_by_definition(student, teacher, beta):
    """Every class' share, in float64."""
    s, t = (F.log_softmax(x.double(), -1) for x in (student, teacher))
    if beta in (0, 1):
        return t.exp() * (t - s) if beta == 0 else s.exp() * (s - t)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("labelled", [False, True])
def test_generalized_jsd_loss_is_trls(beta, labelled):
    student, teacher = draw(2, 5, 9), draw(2, 5, 9)
    labels = torch.where(torch.rand(2, 5) < 0.5, -100, 3) if labelled else None
    share = jsd_by_definition(student / 3, teacher / 3, beta)
    share = share if labels is None else share[labels != -100]
    tokens = 2 if labels is None else int((labels != -100).sum())
    theirs = {
        "batchmean": share.sum() / tokens, "sum": share.sum(), "mean": share.mean(),
    }  # fmt: skip
    for reduction, expected in theirs.items():
        ours = compat.generalized_jsd_loss(student, teacher, labels, beta, 3.0, reduction)
        assert_same(ours, expected.float(), (student, teacher))
    for items in (7, torch.tensor(7)):
        ours = compat.generalized_jsd_loss(
            student, teacher, labels, beta, 3.0, num_items_in_batch=items
        )
        assert_same(ours, (share.sum() / 7).float(), (student, teacher))
    none = torch.full((2, 5), -100)
    assert compat.generalized_jsd_loss(student, teacher, none, beta) == 0


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_generalized_jsd_loss_is_that_of_the_installed_trl(beta):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed")
    student, teacher = draw(2, 5, 9), draw(2, 5, 9)
    labels = torch.where(torch.rand(2, 5) < 0.5, -100, 3)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, 2.0)
    ours = compat.generalized_jsd_loss(student, teacher, labels, beta, 2.0)
    assert_same(ours, theirs, (student, teacher))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_liger_jsd_gives_logits_the_same_gradient(beta, labelled):
    student, teacher = draw(6, 9), torch.randn(6, 9)
    labels = torch.tensor([1, -100, 3, 4, -100, 0]) if labelled else None
    share = jsd_by_definition(student, teacher, beta).sum(-1)
    share = share if labels is None else share[labels != -100]
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    ours = compat.LigerJSD(beta)(log_q, log_p, labels)
    assert_same(ours, share.mean().float(), student)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_liger_jsd_is_that_of_the_installed_liger(beta):
    liger = pytest.importorskip("liger_kernel.transformers", reason="Liger is not installed")
    student = torch.randn(6, 90, device="cuda", requires_grad=True)
    log_q, log_p = student.log_softmax(-1), torch.randn(6, 90, device="cuda").log_softmax(-1)
    labels = torch.tensor([1, -100, 3, 4, -100, 0], device="cuda")
    theirs = liger.LigerJSD(beta)(log_q, log_p, labels)
    assert_same(compat.LigerJSD(beta)(log_q, log_p, labels), theirs, student)


def draw_distillation(labelled=True, ignore_index=-100):
    """The arguments of :class:`LigerFusedLinearJSDLoss`, and those that get gradients."""
    student, head, bias = draw(11, 5), draw(13, 5), draw(13)
    labels = torch.randint(13, (11,))
    labels[torch.rand(11) < (0.4 if labelled else 2)] = ignore_index
    teacher, teacher_head, teacher_bias = draw(11, 7), draw(13, 7), draw(13)
    arguments = student, head, teacher, teacher_head, labels, bias, teacher_bias
    return arguments, (student, head, bias)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("hard, soft", [(0.5, 0.5), (0.0, 1.0), (2.0, 0.0)])
def test_liger_fused_linear_jsd_loss_by_its_formula(beta, hard, soft):
    arguments, inputs = draw_distillation()
    student, head, teacher, teacher_head, labels, bias, teacher_bias = arguments
    x = F.linear(student, head, bias)
    y = F.linear(teacher, teacher_head, teacher_bias).detach()
    divergence = jsd_by_definition(x / 3, y / 3, beta).sum(-1)[labels != -100].mean().float()
    entropy = F.cross_entropy(x, labels)
    loss = compat.LigerFusedLinearJSDLoss(hard, soft, beta, temperature=3.0, chunk_size=4)
    assert_same(loss(*arguments), hard * entropy + soft * divergence, inputs)
    loss.return_soft_hard_loss = True
    combined, *parts = loss(*arguments)
    torch.testing.assert_close(combined, hard * entropy + soft * divergence)
    torch.testing.assert_close(parts, [divergence, entropy])
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_liger_fused_linear_jsd_loss_is_that_of_the_installed_liger(beta, labelled, biased):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")
    for options in (
        {},
        {"weight_hard_loss": 0.2, "weight_soft_loss": 3.0, "temperature": 2.0, "chunk_size": 4},
        {"weight_hard_loss": 0.0, "return_soft_hard_loss": True},
        {"weight_soft_loss": 0.0, "ignore_index": 3},
    ):
        arguments, inputs = draw_distillation(labelled, options.get("ignore_index", -100))
        if not biased:
            arguments, inputs = arguments[:5], inputs[:2]
        theirs = liger.LigerFusedLinearJSDLoss(beta=beta, compiled=False, **options)(*arguments)
        ours = compat.LigerFusedLinearJSDLoss(beta=beta, compiled=False, **options)(*arguments)
        if isinstance(theirs, tuple):
            torch.testing.assert_close(ours[1:], theirs[1:], rtol=2e-5, atol=1e-6)
            ours, theirs = ours[0], theirs[0]
        assert_same(ours, theirs, inputs)


def test_liger_fused_linear_jsd_loss_leaves_the_teacher_and_a_frozen_head_without_a_gradient():
    arguments, _ = draw_distillation()
    frozen = [arguments[0], arguments[1].detach(), *arguments[2:]]
    compat.LigerFusedLinearJSDLoss()(*frozen).backward()
    assert [t.grad is not None for t in arguments if t.is_floating_point()] == [
        True, False, False, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_symmetric_kl_loss_is_torchtunes(ratio, normalize):
    student, teacher = draw(2, 5, 9), torch.randn(2, 5, 9)
    labels = torch.where(torch.rand(2, 5) < 0.5, -100, 3)
    s, t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    rows = -ratio * (t.exp() * s).sum(-1) + (1 - ratio) * (s.exp() * (s - t)).sum(-1)
    rows = rows[labels != -100]
    ours = compat.SymmetricKLLoss(ratio)(student, teacher, labels, normalize)
    assert_same(ours, rows.mean() if normalize else rows.sum(), student)
    none = torch.full((2, 5), -100)
    assert compat.SymmetricKLLoss(ratio)(student, teacher, none, normalize) == 0


def test_symmetric_kl_loss_is_that_of_the_installed_torchtune():
    tune = pytest.importorskip("torchtune.modules.loss", reason="torchtune is not installed")
    student, teacher = draw(10, 9), torch.randn(10, 9)
    labels = torch.where(torch.rand(10) < 0.5, -100, 3)
    for normalize in (True, False):
        theirs = tune.SymmetricKLLoss(0.3)(student, teacher, labels, normalize)
        assert_same(
            compat.SymmetricKLLoss(0.3)(student, teacher, labels, normalize), theirs, student
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, r"beta must be in \[0, 1\]"),
        ({"reduction": "none"}, "reduction must be batchmean, sum or mean"),
        ({"logits_are_probs": True}, "pass logits, or log-probabilities"),
        ({"num_items_in_batch": 3, "reduction": "sum"}, "num_items_in_batch takes the place"),
    ],
)
def test_what_is_not_taken_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        compat.generalized_jsd_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), **options)
    with pytest.raises(ValueError, match="sym_kd_ratio must be in"):
        compat.SymmetricKLLoss(2.0)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        compat.LigerFusedLinearJSDLoss(beta=-0.1)


def test_padding_may_hold_nan():
    p, q = torch.randn(2, 3, 4).unbind()
    expected = compat.compute_kl_loss(p[:2], q[:2])
    p[2] = math.nan
    found = compat.compute_kl_loss(p, q, torch.tensor([False, False, True]))
    torch.testing.assert_close(found, expected)
