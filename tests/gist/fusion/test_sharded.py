"""Fused sublayers of blocks that fully_shard has sharded, in two processes."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from models import images, made, wrapped
from text_models import made as made_text
from text_models import texts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import in_processes

import gist
import gist_kernels as gk
from gist.fusion import sharding

TARGET = torch.tensor([1, 4, 2, 0])
EVERY = ("q", "k", "v", "proj", "fc1", "fc2")
FUSED = "fused sublayers, served by 'cpu'"


def vit():
    return wrapped("vit"), images(4)


def recomputing():
    model, inputs = vit()
    model.set_grad_checkpointing(True)
    return model, inputs


def rotary():
    methods = (gist.Adapter(rank=4, scale=0.7), gist.LayerNormTuning())
    config = gist.GistConfig(methods, token_dropout=0.0)
    model = gist.wrap(made("timm Eva")[0], config)
    return model, images(4)


def joined():
    method = gist.LoRA(rank=2, targets=EVERY)
    config = gist.GistConfig(method, token_dropout=0.0)
    model = gist.wrap(made("transformers ViT")[0], config)
    return model, images(4)


def post_norm():
    config = gist.GistConfig(gist.Adapter(rank=4, scale=0.7), token_dropout=0.0)
    model = gist.wrap(made_text("Bert", "sdpa"), config)
    words = texts("Bert", "right")
    return model, {name: torch.cat((value, value))[:4] for name, value in words._asdict().items()}


CASES = {"vit": vit, "recomputed": recomputing, "rotary": rotary, "joined": joined,
         "post-norm": post_norm}  # fmt: skip


def rows(inputs, chosen):
    if isinstance(inputs, torch.Tensor):
        return inputs[chosen].double()
    return {name: value[chosen] for name, value in inputs.items()}


def train(model, inputs, target):
    """Two steps: the losses, and what is trained with its last gradients."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.SGD(trained.values(), lr=0.05), []
    for _ in range(2):
        optimizer.zero_grad()
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        loss = gist.GistLoss()(out, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), trained


def shard(model, mesh, **options):
    for block in model.family.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


class Watched:
    """The frozen weights that calls of sharded blocks have seen."""

    def __init__(self):
        self.seen, call = [], sharding.Sharding.call

        def watched(around, forward, x):
            def inner(x):
                self.seen += [p for p in around.block.parameters() if not p.requires_grad]
                return forward(x)

            return call(around, inner, x)

        sharding.Sharding.call = watched

    @property
    def bytes(self):
        return sum(p.untyped_storage().nbytes() for p in self.seen)


def same_as_one_process():
    dist.init_process_group("gloo")
    mesh, rank, watched = init_device_mesh("cpu", (2,)), dist.get_rank(), Watched()
    for name, case in CASES.items():
        whole, inputs = case()
        losses, expected = train(whole.double().train(), rows(inputs, slice(None)), TARGET)
        model = case()[0].double().train()
        shard(model, mesh)
        own = slice(2 * rank, 2 * rank + 2)
        found, trained = train(model, rows(inputs, own), TARGET[own])
        assert FUSED in gist.explain(model), (name, gist.explain(model))
        assert "\n" not in gist.explain(model), name
        dist.all_reduce(found)
        torch.testing.assert_close(found / 2, losses, rtol=0, atol=1e-12)
        for key, parameter in trained.items():
            # Two processes add a batch's gradients in another order.
            for ours, theirs in ((parameter, expected[key]), (parameter.grad, expected[key].grad)):
                torch.testing.assert_close(
                    ours.full_tensor(), theirs.detach(), rtol=1e-9, atol=1e-11, msg=f"{name} {key}"
                )
        assert watched.seen, name
        assert watched.bytes == 0, name
        watched.seen.clear()
    dist.barrier()
    dist.destroy_process_group()


def test_the_result_is_that_of_one_process():
    pytest.importorskip("transformers")
    assert in_processes(same_as_one_process, count=2) == [0, 0]


def copies(shape, dtype):
    return [
        t
        for t in gc.get_objects()
        if type(t) is torch.Tensor and (t.shape, t.dtype) == (shape, dtype)
    ]


def keeps_no_weights():
    dist.init_process_group("gloo")
    mesh, watched = init_device_mesh("cpu", (2,)), Watched()
    for case, cast in ((vit, torch.bfloat16), (joined, None)):
        model, inputs = case()
        shard(model.train(), mesh)
        width = 48
        made_of = (3 * width, width), cast or torch.float32
        with gk.cached_casts(), torch.autocast("cpu", cast) if cast else nullcontext():
            out = model(inputs)
            assert watched.seen
            assert watched.bytes == 0
            assert not copies(*made_of)
            gist.GistLoss()(out, TARGET).backward()
            assert watched.bytes == 0
            assert not copies(*made_of)
        assert all(p.grad is not None for p in model.method.parameters())
        watched.seen.clear()
    dist.barrier()
    dist.destroy_process_group()


def test_a_call_keeps_no_gathered_weights():
    assert in_processes(keeps_no_weights, count=2) == [0, 0]


def unusual():
    """Shards by other means: a part of a block, two blocks together, half weights, compiled."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    expected = vit()[0].eval()(images(4))

    def check(model, *lines, atol=1e-5):
        out = model.eval()(images(4))
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=atol)
        assert gist.explain(model).splitlines() == list(lines), gist.explain(model)

    model = vit()[0]
    fully_shard(model.backbone.blocks[1].mlp, mesh=mesh)
    shard(model, mesh)
    own = "the block's own forward, for"
    check(model, f"block 0: {FUSED}", f"block 1: {own} its MLP is a FSDPMlp", f"block 2: {FUSED}")

    model = vit()[0]
    fully_shard(list(model.backbone.blocks[:2]), mesh=mesh)
    fully_shard(model, mesh=mesh)
    check(model, f"blocks 0 to 1: {own} it carries hooks that are not gist's", f"block 2: {FUSED}")

    model = vit()[0]
    shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    check(model, f"blocks 0 to 2: {FUSED}", atol=0.2)

    model = vit()[0]
    shard(model, mesh)
    check(torch.compile(model, backend="eager"), f"blocks 0 to 2: {FUSED}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_other_ways_to_shard():
    assert in_processes(unusual, count=2) == [0, 0]
