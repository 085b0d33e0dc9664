"""The whole training step, optimiser included, as one CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch
from models import images, wrapped

import gist


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_a_replayed_step_is_the_eager_one(half):
    loss = gist.GistLoss()
    batches = [
        (images(4).roll(shift, 0).cuda(), torch.arange(4, device="cuda").roll(shift))
        for shift in range(4)
    ]
    eager = wrapped().cuda().train()

    def trainer(model):
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, capturable=True
        )

        def step(batch, target):
            with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
                value = loss(model(batch), target)
            value.backward()
            optimizer.step()
            return value.detach()

        return optimizer, step

    captured = copy.deepcopy(eager)
    optimizer, step = trainer(eager)
    expected = []
    for batch in [batches[0]] * 3 + batches:
        optimizer.zero_grad()
        expected.append(step(*batch))

    optimizer, step = trainer(captured)
    static = [t.clone() for t in batches[0]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # binaries are compiled and loaded, the optimiser's state is made
            optimizer.zero_grad()
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        value = step(*static)
    for batch, truth in zip(batches, expected[3:], strict=True):
        for place, given in zip(static, batch, strict=True):
            place.copy_(given)
        graph.replay()
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
