"""GistModel: a frozen vision transformer, PEFT methods, a Gist token and a shared head."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import gist_kernels
from gist import blocks
from gist.backbones.base import BackboneFamily
from gist.backbones.families import family_of
from gist.config import GistConfig
from gist.embedding import embed_patches
from gist.methods import METHODS, AttachedMethod
from gist.token import GistToken

# Parameters that come after the patches' embedding.
_LATER = ("blocks.", "norm.", "fc_norm.", "head.", "attn_pool.")


class GistOutput(NamedTuple):
    """What a model with a Gist token returns in training mode: two (B, C) logits, one head."""

    cls_logits: torch.Tensor
    gist_logits: torch.Tensor


class ParameterCount(NamedTuple):
    """Parameters by what they belong to; the first three are trained."""

    method: int
    token: int
    head: int
    frozen: int

    @property
    def trainable(self) -> int:
        return self.method + self.token + self.head

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} trainable (method {self.method:,}, token {self.token:,}, "
            f"head {self.head:,}); {self.frozen:,} frozen"
        )


class GistModel(nn.Module):
    """A backbone adapted by :func:`wrap`; use that to make one.

    In training mode with a Gist token it returns :class:`GistOutput`; in evaluation mode, and
    without a token, plain (B, C) logits of the class token (or of the backbone's own pooling).

    Attributes:
        backbone: the timm model. Its forward now runs through method and token; its state dict
            is what it was.
        method: the module with the PEFT method's parameters, or None.
        token: the :class:`gist.token.GistToken`, or None.
        config: the :class:`gist.GistConfig`.
    """

    def __init__(self, backbone: nn.Module, config: GistConfig) -> None:
        super().__init__()
        family = family_of(backbone)
        _check(family, config)
        self.config = config
        trained = [p for method in config.methods for p in method.trained(family)]
        if family.model is not backbone:  # HF PEFT's, which has chosen what it trains
            trained += [p for p in backbone.parameters() if p.requires_grad]
        # The methods first: they may refuse the backbone, which is then still untouched.
        for method in config.methods:
            method.num_parameters(family)
        attached = {method.name: method.attach(family) for method in config.methods}
        modules = {name: module for name, module in attached.items() if module is not None}
        several = len(config.methods) > 1
        self.method: nn.Module | None = (
            nn.ModuleDict(modules) if several else next(iter(modules.values()), None)
        )
        self.token = None
        if config.gist:
            self.token = GistToken(
                family, config.token_dropout, config.num_tokens, config.token_init
            )
            self.token.attach(family)
        self.backbone: Any = backbone.requires_grad_(False)
        self.gist_head: nn.Module | None = None
        for parameter in trained:
            parameter.requires_grad_(True)
        self._train_heads()

    @property
    def family(self) -> BackboneFamily:
        """The backbone's family, which knows its blocks, pooling and classifier."""
        return family_of(self.backbone)

    @property
    def anatomy(self) -> BackboneFamily:
        """The earlier name of :attr:`family`."""
        return self.family

    @property
    def num_classes(self) -> int:
        return self.family.num_classes

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in :meth:`forward_features`, the Gist token included."""
        return self.family.num_prefix_tokens + (0 if self.token is None else self.token.count)

    def forward(self, images: torch.Tensor) -> torch.Tensor | GistOutput:
        """(B, 3, H, W) images to :class:`GistOutput` or (B, C) logits, see the class."""
        read = None
        if self.family.reads_prefix_alone:
            read = 1 if self.token is None else 1 + self.token.count
        return self.forward_head(self._features(images, read))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images to all (B, N, D) tokens after the final norm, Gist at index 1."""
        return self._features(images, None)

    def _features(self, images: torch.Tensor, read: int | None) -> torch.Tensor:
        """The first ``read`` tokens after the final norm, or all. What only others would need of
        the last block is not computed, nor what leads back to patches that nothing trains."""
        family, attached, token = self.family, self._attached(), self.token
        if _general_path(family) is not None:
            return family.features(images)
        backbone = family.model
        embedding = (p for name, p in backbone.named_parameters() if not name.startswith(_LATER))
        frozen = not (
            images.requires_grad
            or any(p.requires_grad for p in embedding)
            or any(method.reaches_embedding for method in attached)
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            x = backbone.patch_drop(
                backbone._pos_embed(embed_patches(backbone.patch_embed, images))
            )
            x = backbone.norm_pre(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(next(backbone.parameters()).dtype)  # where no wide position has been added
        # Of the first block's input only the Gist token's gradient leads anywhere then.
        grad_tokens = None
        if frozen and token is not None and not any(method.appended_tokens for method in attached):
            grad_tokens = token.index, token.count
        owned = self._owned(attached)
        last = len(backbone.blocks) - 1

        def run(index: int, x: torch.Tensor) -> torch.Tensor:
            block = backbone.blocks[index]
            parts = blocks.plan(block, index, attached, owned)
            if isinstance(parts, str):
                return block(x)
            if index == 0 and token is not None:
                x = token(x)
            for method in attached:
                x = method.before_block(index, x)
            x = blocks.run(
                block, parts, x,
                num_queries=read if index == last else None,
                grad_tokens=grad_tokens if index == 0 else None,
            )  # fmt: skip
            if index == last and read is None:
                for method in attached:
                    x = method.after_blocks(x)
            return x

        for index in range(last + 1):
            if backbone.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, index, x, use_reentrant=False)
            else:
                x = run(index, x)
        return backbone.norm(x)

    def _attached(self) -> list[AttachedMethod]:
        """The modules of the methods that have one."""
        method: Any = self.method
        if method is None:
            return []
        return list(method.values()) if len(self.config.methods) > 1 else [method]

    def _owned(self, attached: Iterable[nn.Module]) -> set[int]:
        """The ids of the modules whose hooks are gist's."""
        return {id(self.token)} | {id(part) for module in attached for part in module.modules()}

    def forward_head(self, features: torch.Tensor) -> torch.Tensor | GistOutput:
        """(B, N, D) tokens of :meth:`forward_features` to logits."""
        family, token = self.family, self.token
        if token is None:
            return family.classify(family.pool(features))
        of_backbone = features if family.reads_prefix_alone else token.remove(features)
        pooled = family.pool(of_backbone)
        if not self.training:
            return family.classify(pooled)
        of_token = family.pool_token(token.pick(features), of_backbone)
        if self.gist_head is not None:
            return GistOutput(family.classify(pooled), family.classify(of_token, self.gist_head))
        logits = family.classify(torch.stack((pooled, of_token), dim=1))
        return GistOutput(*gist_kernels.split_heads(logits))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new, trainable one for ``num_classes`` classes."""
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; it is {num_classes}")
        self.family.reset_classifier(num_classes)
        self._train_heads()

    def _train_heads(self) -> None:
        heads = self.family.heads
        for parameter in _head_parameters(heads):
            parameter.requires_grad_(True)
        if self.config.gist and self.config.separate_head:
            self.gist_head = copy.deepcopy(heads[0])

    def extra_repr(self) -> str:
        counted, family = count_parameters(self), self.family
        parts = {method.name: method.num_parameters(family) for method in self.config.methods}
        if family.model is not self.backbone:
            parts["peft"] = counted.method - sum(parts.values())
        parts |= {"token": counted.token, "head": counted.head}
        trained = ", ".join(f"{name} {count:,}" for name, count in parts.items() if count)
        return f"trained: {trained}; frozen: {counted.frozen:,}"

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimiser factory should not decay: the token, as timm's own."""
        return {"token.weight"} if self.token is not None else set()

    def trainable_state_dict(self) -> dict[str, torch.Tensor]:
        """The trained parameters alone, by name, detached; what a checkpoint holds."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def wrap(backbone: nn.Module, config: GistConfig | None = None) -> GistModel:
    """Adapt a vision transformer, in place: freeze it, attach the methods and the Gist token.

    The backbone's modules and their ``forward`` stay; methods and token join by hooks. All its
    parameters are frozen but those of the classifier and those that a method trains.

    Args:
        backbone: timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP's image tower, ...) or Eva, or
            transformers' ViT or DINOv2 for image classification, with a classifier. One adapted by
            HF PEFT is taken with what it trains, as a rule with ``GistConfig(method=None)``.
        config: what to train; the default is ``GistConfig()``, the released adapter with GIST.

    Raises:
        TypeError: a model without a sequence of tokens, or of another library.
        ValueError: a backbone without classifier or supported blocks or pooling, or one that is
            wrapped already. The backbone is unchanged then.
    """
    model = GistModel(backbone, config if config is not None else GistConfig())
    counted = count_parameters(model)
    if not (counted.method or counted.token) and (
        model.config.method is not None or model.family.model is not backbone
    ):
        warnings.warn("nothing but the classifier is trainable", UserWarning, stacklevel=2)
    return model


def remove_hooks(model: GistModel) -> None:
    """Take methods and token off the backbone, which is then as it was before :func:`wrap`."""
    owned = model._owned(model._attached())
    for part in model.backbone.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if id(blocks.owner(hook)) in owned]:
                del hooks[key]
    if model.token is not None:
        for module in model.family.prefix_counters:
            module.num_prefix_tokens -= model.token.count


def available_methods(backbone: nn.Module) -> dict[str, int]:
    """The PEFT methods that fit a backbone, with how many parameters each trains by default.

    Args:
        backbone: what :func:`wrap` takes, or a :class:`GistModel`.

    >>> gist.available_methods(timm.create_model("vit_base_patch16_224"))["adapter"]
    82992
    """
    family = family_of(backbone.backbone if isinstance(backbone, GistModel) else backbone)
    counts = {}
    for name, method in METHODS.items():
        # One that doesn't fit says so, when asked for, by a ValueError of its own.
        with contextlib.suppress(ValueError):
            counts[name] = method().num_parameters(family)
    return counts


def count_parameters(model: GistModel) -> ParameterCount:
    """Count a model's parameters by method, token, head and frozen backbone.

    What a method trains of the backbone's own counts as the method's.
    """

    def size(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters())

    heads = _head_parameters(model.family.heads)
    of_heads = {id(parameter) for parameter in heads}
    of_backbone = [p for p in model.backbone.parameters() if id(p) not in of_heads]
    return ParameterCount(
        method=size(model.method) + sum(p.numel() for p in of_backbone if p.requires_grad),
        token=size(model.token),
        head=sum(p.numel() for p in heads) + size(model.gist_head),
        frozen=sum(p.numel() for p in of_backbone if not p.requires_grad),
    )


def explain(model: GistModel) -> str:
    """Which blocks run as fused sublayers and which by their own forward, and why: a line each.

    As things stand at the call: in training or evaluation mode, inside or outside autocast.

    >>> print(gist.explain(model))
    blocks 0 to 11: fused sublayers, served by 'cpu'
    """
    family = model.family
    like = next(family.model.parameters())
    whole = _general_path(family)
    if whole is not None:
        return f"blocks 0 to {len(family.blocks) - 1}: the backbone's own forward, for {whole}"
    serving = gist_kernels.backend.serving("adapter_attention", like.device.type, like.dtype)
    attached = model._attached()
    lines: list[tuple[int, int, str]] = []
    for index, block in enumerate(family.blocks):
        parts = blocks.plan(block, index, attached, model._owned(attached))
        how = f"fused sublayers, served by {serving!r}"
        if isinstance(parts, str):
            how = f"the block's own forward, for {parts}"
        if lines and lines[-1][2] == how:
            lines[-1] = (lines[-1][0], index, how)
        else:
            lines.append((index, index, how))
    return "\n".join(
        f"block {first}: {how}" if first == last else f"blocks {first} to {last}: {how}"
        for first, last, how in lines
    )


def _general_path(family: BackboneFamily) -> str | None:
    """Why no block is fused: the backbone's own forward runs as a whole."""
    model = family.model
    if torch.compiler.is_compiling():
        return "it is traced by torch.compile or torch.export"
    if not isinstance(model, VisionTransformer):
        return f"it is a {type(model).__name__}"
    if type(model).forward_features is not VisionTransformer.forward_features:
        return f"{type(model).__name__} has a forward_features of its own"
    return None


def _head_parameters(heads: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained ones: of a head that HF PEFT keeps beside the original, its copy."""
    return [
        parameter
        for head in heads
        for parameter in getattr(head, "modules_to_save", head).parameters()
    ]


def _check(family: BackboneFamily, config: GistConfig) -> None:
    reason = family.refusal(config.gist)
    if reason is not None:
        raise ValueError(f"backbone {reason}")
    if config.gist and config.separate_head and len(family.heads) > 1:
        raise ValueError("separate_head is not defined for a backbone with two heads")
