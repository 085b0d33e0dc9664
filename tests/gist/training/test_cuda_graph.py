"""CUDA graphs: what is replayed when, on any machine; that it is the same training, on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from models import images, wrapped
from training import model, stripes

import gist
from gist.training.config import TrainConfig
from gist.training.cuda_graph import WARM_UP, CudaGraphed
from gist.training.loop import fit


@pytest.fixture
def recorded(monkeypatch):
    """Stands for a device: what is captured is called again, on the tensors that it was given."""
    captured, replays = [], []

    def capture(self, places, options):
        captured.append([tuple(place.shape) for place in places])
        result = torch.full((), float("nan"))

        def replay():
            replays.append(len(captured))
            result.copy_(self._function(*places, **options))

        return replay, result

    monkeypatch.setattr(CudaGraphed, "_capture", capture)
    monkeypatch.setattr(CudaGraphed, "_apart", lambda self, *a, **o: self._function(*a, **o))
    return captured, replays


def test_calls_of_a_kind_are_captured_when_they_have_come_some_times(recorded):
    captured, replays = recorded
    total = CudaGraphed(lambda x, y, scale: scale * (x.sum() + y.sum()))
    for call in range(WARM_UP + 3):
        for size in (4, 2):
            x, y = torch.full((size,), float(call)), torch.ones(size)
            assert total(x, y, scale=0.5) == 0.5 * size * (call + 1)
        assert total(x, y, scale=float(call)) == call * 2 * (call + 1)  # never twice the same
    assert captured == [[(4,), (4,)], [(2,), (2,)]]
    assert replays == [1, 2] + [2, 2] * 2


def test_gradients_add_up_where_they_are(recorded):
    m, loss = wrapped(), gist.GistLoss()
    batch, target = images(4), torch.tensor([0, 5, 2, 6])

    def function(batch, target):
        value = loss(m(batch), target)
        value.backward()
        return value.detach()

    for p in m.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    replayed = CudaGraphed(function)
    for _ in range(WARM_UP + 2):
        for p in m.parameters():
            if p.grad is not None:
                p.grad.zero_()
        replayed(batch, target)
    found = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    m.zero_grad()
    function(batch, target)
    for name, grad in found.items():
        assert torch.equal(grad, m.get_parameter(name).grad), name


def test_a_training_on_a_cpu_has_none():
    with pytest.raises(ValueError, match="cuda_graph needs a model on a CUDA device; it is on cpu"):
        fit(model(), stripes(8, 1), stripes(8, 2), TrainConfig(cuda_graph=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_training_with_and_without(precision):
    """Without random draws; two sizes of batch, one of which comes once an epoch."""

    def trained(cuda_graph):
        m = model(config=gist.GistConfig(token_dropout=0.0)).cuda()
        config = TrainConfig(
            epochs=8, batch_size=16, lr=1e-2, precision=precision, cuda_graph=cuda_graph
        )
        return fit(m, stripes(50, 1), stripes(31, 2), config), m.trainable_state_dict()

    (result, ours), (expected, truth) = trained(True), trained(False)
    for epoch, eager in zip(result.history, expected.history, strict=True):
        assert epoch.train_loss == pytest.approx(eager.train_loss, rel=1e-4)
    assert all(torch.allclose(ours[key], truth[key], rtol=1e-3, atol=1e-5) for key in truth)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_the_whole_step_in_one_graph(half):
    """Optimiser included."""
    loss = gist.GistLoss()
    batches = [
        (images(4).roll(shift, 0).cuda(), torch.arange(4, device="cuda").roll(shift))
        for shift in range(4)
    ]
    eager = wrapped().cuda().train()
    captured = copy.deepcopy(eager)

    def stepper(m):
        optimizer = torch.optim.AdamW(
            [p for p in m.parameters() if p.requires_grad], lr=1e-3, capturable=True
        )
        for p in m.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

        def step(batch, target):
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                value = loss(m(batch), target)
            value.backward()
            optimizer.step()
            return value.detach()

        return step

    step, replayed = stepper(eager), CudaGraphed(stepper(captured))
    for batch in [batches[0]] * WARM_UP + batches:
        torch.testing.assert_close(replayed(*batch), step(*batch), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
