"""GistModel: a frozen timm VisionTransformer, a PEFT method, a Gist token and a shared head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import gist_kernels
from gist import blocks
from gist.config import GistConfig
from gist.embedding import embed_patches
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

    def __init__(self, backbone: VisionTransformer, config: GistConfig) -> None:
        super().__init__()
        _check_backbone(backbone, config)
        self.config = config
        # The method first: it may refuse the backbone, which is then still untouched.
        self.method = config.method.attach(backbone) if config.method is not None else None
        self.token = GistToken(backbone, config.token_dropout) if config.gist else None
        if self.token is not None:
            self.token.attach(backbone)
        self.backbone = backbone.requires_grad_(False)
        self.backbone.head.requires_grad_(True)

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in :meth:`forward_features`, the Gist token included."""
        return self.backbone.num_prefix_tokens + (self.token is not None)

    def forward(self, images: torch.Tensor) -> torch.Tensor | GistOutput:
        """(B, 3, H, W) images to :class:`GistOutput` or (B, C) logits, see the class."""
        read = None
        if self.backbone.global_pool == "token":
            read = 1 if self.token is None else 2
        return self.forward_head(self._features(images, read))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images to all (B, N, D) tokens after the final norm, Gist at index 1."""
        return self._features(images, None)

    def _features(self, images: torch.Tensor, read: int | None) -> torch.Tensor:
        """The first ``read`` tokens after the final norm, or all. What only others would need of
        the last block is not computed, nor what leads back to patches that nothing trains."""
        backbone = self.backbone
        if _general_path(backbone, images.device.type) is not None:
            return backbone.forward_features(images)
        embedding = (p for name, p in backbone.named_parameters() if not name.startswith(_LATER))
        frozen = not images.requires_grad and not any(p.requires_grad for p in embedding)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            x = backbone.patch_drop(
                backbone._pos_embed(embed_patches(backbone.patch_embed, images))
            )
            x = backbone.norm_pre(x)
        last = len(backbone.blocks) - 1
        for index, (block, adapter) in enumerate(self._blocks()):
            if blocks.refusal(block, adapter, self.token) is not None:
                x = block(x)
                continue
            if index == 0 and self.token is not None:
                x = self.token(x)
            x = blocks.run(
                block, adapter, x,
                num_queries=read if index == last else None,
                grad_tokens=(GistToken.index, 1) if index == 0 and frozen else None,
            )  # fmt: skip
        return backbone.norm(x)

    def _blocks(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Each block with its part of the method."""
        parts: Any = self.method
        if parts is None:
            parts = [None] * len(self.backbone.blocks)
        return zip(self.backbone.blocks, parts, strict=True)

    def forward_head(self, features: torch.Tensor) -> torch.Tensor | GistOutput:
        """(B, N, D) tokens of :meth:`forward_features` to logits."""
        backbone, token = self.backbone, self.token
        if token is None:
            return backbone.forward_head(features)
        by_class_token = backbone.global_pool == "token"
        if not self.training:
            return backbone.forward_head(features if by_class_token else token.remove(features))
        if by_class_token:
            pooled = features[:, :2]
        else:
            by_backbone = backbone.pool(token.remove(features))
            pooled = torch.stack((by_backbone, features[:, token.index]), dim=1)
        logits = backbone.head(backbone.head_drop(backbone.fc_norm(pooled)))
        return GistOutput(*gist_kernels.split_heads(logits))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new, trainable one for ``num_classes`` classes."""
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; it is {num_classes}")
        self.backbone.reset_classifier(num_classes)
        self.backbone.head.requires_grad_(True)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimiser factory should not decay: the token, as timm's own."""
        return {"token.weight"} if self.token is not None else set()

    def trainable_state_dict(self) -> dict[str, torch.Tensor]:
        """The trained parameters alone, by name, detached; what a checkpoint holds."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def wrap(backbone: VisionTransformer, config: GistConfig | None = None) -> GistModel:
    """Adapt a timm VisionTransformer, in place: freeze it, attach the method and the Gist token.

    The backbone's modules and their ``forward`` stay; method and token join by hooks. All its
    parameters are frozen but those of the classifier, ``backbone.head``.

    Args:
        backbone: a timm VisionTransformer (ViT, DeiT, DINOv2, CLIP's image tower, ...) with a
            classifier; with a class token too when ``config.gist`` is set.
        config: what to train; the default is ``GistConfig()``, the released adapter with GIST.

    Raises:
        TypeError: not a timm VisionTransformer.
        ValueError: a backbone without classifier, class token or supported blocks or pooling, or
            one that is wrapped already. The backbone is unchanged then.
    """
    return GistModel(backbone, config if config is not None else GistConfig())


def count_parameters(model: GistModel) -> ParameterCount:
    """Count a model's parameters by method, token, head and frozen backbone."""

    def size(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters())

    return ParameterCount(
        method=size(model.method),
        token=size(model.token),
        head=size(model.backbone.head),
        frozen=size(model.backbone) - size(model.backbone.head),
    )


def explain(model: GistModel) -> str:
    """Which blocks run as fused sublayers and which by their own forward, and why: a line each.

    As things stand at the call: in training or evaluation mode, inside or outside autocast.

    >>> print(gist.explain(model))
    blocks 0 to 11: fused sublayers, served by 'cpu'
    """
    backbone = model.backbone
    like = next(backbone.parameters())
    whole = _general_path(backbone, like.device.type)
    if whole is not None:
        return f"blocks 0 to {len(backbone.blocks) - 1}: the backbone's own forward, for {whole}"
    serving = gist_kernels.backend.serving("adapter_attention", like.device.type, like.dtype)
    lines: list[tuple[int, int, str]] = []
    for index, (block, adapter) in enumerate(model._blocks()):
        reason = blocks.refusal(block, adapter, model.token)
        how = f"fused sublayers, served by {serving!r}"
        if reason is not None:
            how = f"the block's own forward, for {reason}"
        if lines and lines[-1][2] == how:
            lines[-1] = (lines[-1][0], index, how)
        else:
            lines.append((index, index, how))
    return "\n".join(
        f"block {first}: {how}" if first == last else f"blocks {first} to {last}: {how}"
        for first, last, how in lines
    )


def _general_path(backbone: VisionTransformer, device_type: str) -> str | None:
    """Why no block is fused: the backbone's own forward runs as a whole."""
    if torch.compiler.is_compiling():
        return "it is traced by torch.compile or torch.export"
    if torch.is_autocast_enabled(device_type):
        return "autocast is on"
    if backbone.grad_checkpointing:
        return "it checkpoints its activations"
    if type(backbone).forward_features is not VisionTransformer.forward_features:
        return f"{type(backbone).__name__} has a forward_features of its own"
    return None


def _check_backbone(backbone: VisionTransformer, config: GistConfig) -> None:
    if not isinstance(backbone, VisionTransformer):
        raise TypeError(
            "backbone must be a timm VisionTransformer, such as "
            f"timm.create_model('vit_base_patch16_224'); it is a {type(backbone).__name__}"
        )
    if getattr(backbone, "head_dist", None) is not None:
        raise ValueError("backbone has a second, distillation head, which is not supported yet")
    if not isinstance(backbone.head, nn.Linear):
        raise ValueError(
            "backbone has no linear classifier; create it with num_classes=..., or call "
            "backbone.reset_classifier(num_classes)"
        )
    if not backbone.global_pool:
        raise ValueError("backbone has no pooling (global_pool=''); use global_pool='token'")
    # Whatever wrap attaches hangs on a block or within one.
    if any(part._forward_hooks or part._forward_pre_hooks for part in backbone.blocks.modules()):
        raise ValueError(
            "backbone carries hooks on its blocks already (is it wrapped?); wrap a fresh one"
        )
    if not config.gist:
        return
    if not backbone.has_class_token:
        raise ValueError(
            "backbone has no class token, whose logits the Gist token's interact with; "
            "use GistConfig(gist=False) for the PEFT method alone"
        )
    if backbone.attn_pool is not None:
        raise ValueError(
            f"backbone pools by attention (global_pool={backbone.global_pool!r}), for which the "
            "Gist token's logits are not defined; use global_pool='token' or 'avg'"
        )
