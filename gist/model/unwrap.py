"""Unwrapping: the backbone as it was given to :func:`gist.wrap`."""

from __future__ import annotations

from typing import Any

from torch import nn

from gist.methods.hooks import remove_hooks
from gist.model.containers import gist_model_of, is_sharded
from gist.model.interface import show_added_tokens


def unwrap(model: nn.Module) -> Any:
    """Give the backbone back, without methods and Gist token; it can be wrapped again.

    What :func:`gist.wrap` changed is as before: hooks, counters of tokens, and which parameters are
    trained. Values stay: a new classifier, and whatever of the backbone was trained. A parameter
    that wrap had turned to float32 has its former dtype again.

    Args:
        model: what :func:`gist.wrap` returned, also within DistributedDataParallel or
            ``torch.compile``. It can't be used any more; its ``method`` and ``token`` keep their
            parameters. Use ``copy.deepcopy`` first to keep the model.

    Returns:
        The very module that was given to :func:`gist.wrap`.

    Raises:
        RuntimeError: the backbone has been given back already.
        ValueError: the parameters are sharded over processes.
    """
    model = gist_model_of(model)
    family, backbone = model.family, model.backbone
    if is_sharded(model):
        raise ValueError(
            "a model sharded by fully_shard can't be unwrapped; gist.save it, and unwrap what "
            "gist.load makes of it on a fresh backbone"
        )
    remove_hooks(backbone, model.hook_owners)
    show_added_tokens(family)
    if model.token is not None:
        for module in family.prefix_counters:
            module.num_prefix_tokens -= model.token.count
    model.before_wrap.restore(backbone)
    model.backbone = None
    return backbone
