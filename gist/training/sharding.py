"""A model's frozen weights, sharded over the processes of a training by PyTorch's FSDP2.

What a PEFT method trains is small. It stays whole in every process: the training loop sums its
gradients, averages it and saves it as it does without shards.
"""

from __future__ import annotations

import torch
from torch import distributed, nn

from gist.model.containers import is_part
from gist.model.wrapped import GistModel

DEVICES = ("cpu", "cuda")


def check_shards(device: torch.device | str, processes: int) -> None:
    """Raise a ValueError where frozen weights can't be sharded."""
    if processes < 2:
        raise ValueError(
            "fsdp shards the frozen weights over several processes, and this is the only one; "
            "start several, such as torchrun --nproc_per_node 2 -m gist.cli train ..."
        )
    kind = torch.device(device).type
    if kind not in DEVICES:
        raise ValueError(f"fsdp needs the device {' or '.join(DEVICES)}; it is {kind}")


def shard_frozen(model: GistModel, device: torch.device | str) -> None:
    """Move a wrapped model to a device, with its frozen parameters sharded over all processes.

    A block's weights are gathered for its forward, freed, gathered again for its backward, and
    freed. The frozen parameters outside of the blocks are gathered by a forward and kept until the
    next save. Call this in every process, before the optimizer is made; then call the model, or
    save it, in every process as often.

    Args:
        model: on the CPU or on ``device``, trained in nothing but what :func:`gist.wrap` left
            trainable or the caller chose since. What is trained now is not sharded.
        device: "cpu" with gloo, or each process's own "cuda" device with NCCL.

    Raises:
        ValueError: there is one process only, the device is another one, or no parameter of the
            blocks is frozen.
    """
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    check_shards(device, count)
    blocks = list(model.family.blocks)
    if not any(not p.requires_grad for block in blocks for p in block.parameters()):
        raise ValueError("fsdp shards frozen weights, and the method trains all of the blocks'")
    from torch.distributed.fsdp import fully_shard

    where = torch.device(device)
    mesh = distributed.device_mesh.init_device_mesh(where.type, (count,))
    trained = {p for p in model.parameters() if p.requires_grad}
    # One by one: no device holds all blocks at any time.
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(where)


def check_whole(trained: list[nn.Parameter]) -> None:
    """Raise a ValueError where trained parameters are sharded, which the loop can't sum."""
    if any(is_part(parameter) for parameter in trained):
        raise ValueError(
            "model has trained parameters in shards; let gist.training.sharding.shard_frozen shard "
            "it, which leaves them whole"
        )
