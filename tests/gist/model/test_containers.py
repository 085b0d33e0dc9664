"""Wrapped models within DistributedDataParallel, FSDP2, torch.compile and weight averages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import backbone, images, wrapped
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import in_processes

import gist

TARGET = torch.tensor([1, 4])
CONFIG = gist.GistConfig(gist.LoRA(rank=2), token_dropout=0.0)


def with_trained_norm() -> gist.GistModel:
    model = wrapped("vit", CONFIG).train()
    model.backbone.norm.requires_grad_(True)
    model.token.requires_grad_(False)
    return model


def step(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    gist.GistLoss()(model(images()), TARGET).backward()
    optimizer.step()


def sharded(directory: Path, blocks: bool) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = with_trained_norm()
    for block in model.backbone.blocks if blocks else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model)
    with torch.no_grad():
        model.eval()(images())  # leaves the root's parameters gathered
    written = []
    replace = Path.replace
    Path.replace = lambda self, path: written.append(path.name) or replace(self, path)
    gist.save(model, directory / "saved")
    assert (directory / "saved" / "config.json").is_file()  # in every process
    assert written == (["adapter.safetensors", "config.json"] if rank == 0 else [])
    counted = gist.count_parameters(model)
    assert counted == gist.count_parameters(with_trained_norm())
    assert gist.explain(model).startswith("blocks 0 to 2: ")
    for refused in (gist.merge, gist.unwrap):
        with pytest.raises(ValueError, match="sharded by fully_shard can't be"):
            refused(model)
    dist.destroy_process_group()


def replicated(directory: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(with_trained_norm())
    step(model)
    gist.save(model, directory / "saved")
    assert rank or (directory / "saved" / "config.json").is_file()
    # One that is not replicated is written by whoever saves it.
    gist.save(torch.compile(model.module, backend="eager"), directory / str(rank))
    assert (directory / str(rank) / "config.json").is_file()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("blocks", [False, True])
def test_a_sharded_model_is_saved_whole_and_once(tmp_path, blocks):
    assert in_processes(sharded, tmp_path, blocks, count=2) == [0, 0]
    check(tmp_path / "saved")


def test_a_replicated_model_is_saved_once(tmp_path):
    assert in_processes(replicated, tmp_path, count=2) == [0, 0]
    for folder in ("saved", "0", "1"):
        check(tmp_path / folder)


def check(folder: Path) -> None:
    """Whether a folder holds what the same step gives in one process."""
    expected = with_trained_norm()
    step(expected)
    loaded = gist.load(backbone(), folder)
    torch.testing.assert_close(loaded(images()), expected.eval()(images()), rtol=0, atol=1e-5)
    assert loaded.trainable_state_dict().keys() == expected.trainable_state_dict().keys()
    saved = json.loads((folder / "config.json").read_text())
    assert saved["also_trained"] == ["backbone.norm.weight", "backbone.norm.bias"]
    assert saved["frozen"] == ["token.weight"]


@pytest.mark.parametrize(
    "contain",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        torch.optim.swa_utils.AveragedModel,
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
)
def test_what_stands_around_a_model_is_looked_through(tmp_path, contain):
    model = wrapped("vit", CONFIG).eval()
    outer = contain(model)
    assert gist.count_parameters(outer) == gist.count_parameters(model)
    assert gist.explain(outer) == gist.explain(model)
    torch.testing.assert_close(gist.merge(outer)(images()), model(images()), rtol=0, atol=1e-5)
    gist.save(outer, tmp_path)
    assert torch.equal(gist.load(backbone(), tmp_path)(images()), model(images()))
    vit = gist.unwrap(outer)
    assert type(vit) is type(backbone())
    assert not vit.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("use", [gist.count_parameters, gist.explain, gist.merge, gist.unwrap])
def test_what_holds_no_wrapped_model_is_refused(use):
    with pytest.raises(TypeError, match="what gist.wrap returned; it is a VisionTransformer"):
        use(backbone())
    with pytest.raises(TypeError, match="it is a DataParallel"):
        use(nn.DataParallel(nn.Linear(2, 2)))


def flattened() -> None:
    dist.init_process_group("gloo")
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Holder(FullyShardedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    Holder.__name__ = "FullyShardedDataParallel"
    with pytest.raises(ValueError, match="shard it by torch.distributed.fsdp.fully_shard instead"):
        gist.save(Holder(), os.devnull)
    dist.barrier()  # no process may leave before the other has joined
    dist.destroy_process_group()


def test_fsdp1_is_refused():
    assert in_processes(flattened, count=2) == [0, 0]
