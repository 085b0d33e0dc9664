"""CUDA graphs: what is replayed when, on any machine; that it is the same training, on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from models import images, wrapped
from training import model, stripes

import gist
from gist.training import cuda_graph
from gist.training.config import TrainConfig
from gist.training.cuda_graph import MOST, WARM_UP, CudaGraphed, graphed
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


class Stepper:
    """Training steps with dropout, gradient accumulation and an optimizer."""

    def __init__(self, graphed):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.Dropout(0.5), torch.nn.Linear(7, 3)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.compute = self._compute
        if graphed:
            self.compute = CudaGraphed(
                self._compute, lambda: [p.grad for p in self.model.parameters()]
            )

    def _compute(self, x, target, *, share):
        loss = torch.nn.functional.cross_entropy(self.model(x), target)
        (share * loss).backward()
        return share * loss.detach()

    def losses(self, steps):
        x, target = torch.randn(steps, 2, 4, 5), torch.randint(3, (steps, 2, 4))
        for step in range(steps):
            self.optimizer.zero_grad(set_to_none=False)
            yield sum(
                self.compute(*part, share=0.5) for part in zip(x[step], target[step], strict=True)
            )
            self.optimizer.step()

    def state(self):
        moments = [v for s in self.optimizer.state.values() for v in s.values()]
        return [*self.model.parameters(), *moments, torch.get_rng_state()]


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing"), KeyError("hook")]
)
def test_a_failed_capture_changes_nothing(recorded, monkeypatch, error):
    """The capture fails after it has drawn numbers and added gradients, in the second part of a
    batch; all steps are those without graphs."""
    attempts = []

    def capture(self, places, options):
        attempts.append(self._function(*places, **options))
        raise error

    monkeypatch.setattr(CudaGraphed, "_capture", capture)
    eager, replayed = Stepper(False), Stepper(True)
    torch.manual_seed(1)
    expected = list(eager.losses(6))
    end = eager.state()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"({type(error).__name__}: {error})") as told:
        found = list(replayed.losses(6))
    assert len(attempts) == len(told) == 1
    assert replayed.compute.failed
    assert found == expected
    assert all(torch.equal(x, y) for x, y in zip(replayed.state(), end, strict=True))


def test_no_more_graphs_than_some_are_captured(recorded):
    captured, replays = recorded
    total = CudaGraphed(lambda x: x.sum())
    sizes = [size for size in range(1, MOST + 3) for _ in range(WARM_UP + 2)]
    with pytest.warns(UserWarning, match=f"than the first {MOST}") as told:
        assert [total(torch.ones(size)) for size in sizes] == sizes
    assert len(captured) == MOST
    assert len(told) == 1
    assert total(torch.ones(1)) == 1  # the first ones go on
    assert len(replays) == 2 * MOST + 1
    assert not total.failed


def test_the_stream_and_the_generator_of_a_failed_capture_are_left(monkeypatch):
    """As torch.cuda.graph does not where its end raises. The device is a stand-in."""
    done = []

    class Generator:
        def clone_state(self):
            return "as before"

        def graphsafe_set_state(self, state):
            done.append(("generator", state))

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the training's")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: done.append(("stream", stream)))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: "offset 4")
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: done.append(("draws", state))
    )
    grad = torch.ones(2)
    before = cuda_graph._State(device, [grad])
    assert not done
    grad += 1
    before.restore()
    assert done == [("stream", "the training's"), ("generator", "as before"), ("draws", "offset 4")]
    assert grad.tolist() == [1, 1]


def test_several_processes_have_none():
    assert isinstance(graphed(sum, tuple, 1), CudaGraphed)
    with pytest.warns(UserWarning, match="no CUDA graph replays steps: these are 2 processes"):
        assert graphed(sum, tuple, 2) is None


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
