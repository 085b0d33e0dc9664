"""What timm's models offer beside their forward, for wrapped models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.methods import AttachedMethod
from gist.methods.hooks import remove_hooks
from gist.model.attach import attach_methods, carry_hooks, take_over
from gist.model.config import GistConfig
from gist.model.token import GistToken

_take_indices: Any = feature_take_indices  # which takes any sequence, not only a list
_ANCHOR = re.compile(r"(?<![\\[])\^")  # neither an escaped one nor one that begins a class


def _of_backbone(name: str) -> Any:
    return property(
        lambda model: getattr(model.family.model, name), doc=f"The backbone's ``{name}``."
    )


class TimmInterface(nn.Module):
    """The backbone's attributes and methods beside its forward, as far as timm defines them.

    Each gives the backbone's result. No Gist token or prompt is among patches or prefix tokens.
    What the backbone lacks raises an AttributeError: transformers' models have few of these.
    """

    method: nn.Module | None
    token: GistToken | None
    config: GistConfig

    default_cfg = _of_backbone("default_cfg")
    pretrained_cfg = _of_backbone("pretrained_cfg")
    in_chans = _of_backbone("in_chans")
    num_features = _of_backbone("num_features")
    head_hidden_size = _of_backbone("head_hidden_size")
    feature_info = _of_backbone("feature_info")
    global_pool = _of_backbone("global_pool")
    patch_embed = _of_backbone("patch_embed")
    dynamic_img_size = _of_backbone("dynamic_img_size")
    grad_checkpointing = _of_backbone("grad_checkpointing")

    @property
    def family(self) -> BackboneFamily:
        raise NotImplementedError

    @property
    def attached_methods(self) -> list[AttachedMethod]:
        raise NotImplementedError

    def _note_hooks(self) -> None:
        raise NotImplementedError

    def _check_hooks(self) -> None:
        raise NotImplementedError

    @property
    def embed_dim(self) -> int:
        return self.family.embed_dim

    @property
    def num_classes(self) -> int:
        return self.family.num_classes

    def get_classifier(self) -> Any:
        """The backbone's classifier; two for a distilled one."""
        heads = self.family.heads
        return heads[0] if len(heads) == 1 else tuple(heads)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass rather than keep them."""
        self.family.set_grad_checkpointing(enable)

    # ---- intermediate layers

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **options: Any,
    ) -> Any:
        """The outputs of blocks, and the final features, as timm's method of this name.

        The intermediates hold the backbone's own tokens alone. The final features are those of
        ``forward_features``, with the Gist token, as ``forward_head`` takes them.

        Args:
            x: (B, 3, H, W) images.
            indices: the last so many blocks, or those of these numbers; None for all.
            return_prefix_tokens: also give each intermediate's class and register tokens.
            norm: put the intermediates through the final norm.
            stop_early: run no block after the last one asked for.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: leave the final features out.
            options: further ones of timm's; masks only if the method and config add no token.
        """
        self._check_hooks()
        return self.family.model.forward_intermediates(
            x,
            indices=indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            **options,
        )

    def get_intermediate_layers(self, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        """timm's form of DINO's interface; see :meth:`forward_intermediates`."""
        self._check_hooks()
        return self.family.model.get_intermediate_layers(x, *args, **options)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last one asked for, and the methods' part in them.

        Args:
            indices, prune_norm, prune_head: as timm's method of this name takes them.

        Returns:
            The numbers of the blocks asked for.
        """
        prune, family = self.family.model.prune_intermediate_layers, self.family
        _take_indices(len(family.blocks), indices)  # its errors come first
        owners = {id(part) for method in self.attached_methods for part in method.modules()}
        remove_hooks(family.model, owners, free=False)
        norm = self.family.model.norm
        taken: list[int] = prune(indices, prune_norm=prune_norm, prune_head=prune_head)
        carry_hooks(norm, self.family.model.norm)
        if self.method is not None:
            method = attach_methods(self.config, family)
            assert method is not None
            take_over(method, self.method)
            self.method = method
        self._note_hooks()
        return taken

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another image or patch size, in pixels, by timm's resampling; None keeps the present one.

        Whether the patch embedding is trained stays, and so do hooks on it.
        """
        model: Any = self.family.model
        before, trained = self.family.patch_projection, _trained(model)
        model.set_input_size(img_size=img_size, patch_size=patch_size)
        after = self.family.patch_projection
        carry_hooks(before, after)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])

    # ---- groups of parameters

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of parameter names by depth, for this model's names.

        A method's parameters belong to their block; the Gist token to the stem. Those that all
        blocks share belong to the last group, with the classifier.
        """
        prefix = re.escape(self._backbone_prefix)

        def within(pattern: str) -> str:
            return f"^{prefix}(?:{_ANCHOR.sub('', pattern)})"

        matcher: dict[str, Any] = {}
        for group, given in self.family.model.group_matcher(coarse=coarse).items():
            many = isinstance(given, (list, tuple))
            matcher[group] = [(within(p), s) for p, s in given] if many else within(given)
        named = r"^method\.(?:[a-z]+\.)?"
        if "stem" in matcher and isinstance(matcher["stem"], str):
            matcher["stem"] += rf"|^token\.|{named}patch_embed"
        if "blocks" in matcher:
            blocks = matcher["blocks"]
            blocks = blocks if isinstance(blocks, list) else [(blocks, None)]
            matcher["blocks"] = [*blocks, (rf"{named}(\d+)", None), (rf"{named}norm", (99999,))]
        return matcher

    def no_weight_decay(self) -> set[str]:
        """Names that timm's optimiser factory must not decay: the backbone's, and the token."""
        own: Any = getattr(self.family.model, "no_weight_decay", set)
        names = {self._backbone_prefix + name for name in own()}
        return names | ({"token.weight"} if self.token is not None else set())

    @property
    def _backbone_prefix(self) -> str:
        """What the names of the backbone's parameters begin with: HF PEFT has a longer one."""
        model = self.family.model
        return next(f"{name}." for name, part in self.named_modules() if part is model)


def hide_added_tokens(
    family: BackboneFamily, token: GistToken | None, methods: Sequence[AttachedMethod]
) -> None:
    """Let the backbone's own ``forward_intermediates`` leave out the tokens that wrap adds."""
    appended = sum(method.appended_tokens for method in methods)
    if hasattr(family.model, "forward_intermediates") and (token is not None or appended):
        index, count = (0, 0) if token is None else (token.index, token.count)
        family.model.forward_intermediates = partial(
            _intermediates, family.model, index, count, appended
        )


def show_added_tokens(family: BackboneFamily) -> None:
    """Undo :func:`hide_added_tokens`."""
    family.model.__dict__.pop("forward_intermediates", None)


def _intermediates(
    backbone: Any,
    index: int,
    count: int,
    appended: int,
    x: torch.Tensor,
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    **options: Any,
) -> Any:
    """timm's ``forward_intermediates`` without the ``count`` tokens from ``index`` on, and without
    the last ``appended`` ones, which all blocks but the last put out."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC'; it is {output_fmt!r}")
    if options.get("attn_mask") is not None or options.get("is_causal"):
        raise ValueError("attn_mask and is_causal have no place for the tokens that gist.wrap adds")
    num_prefix, depth = backbone.num_prefix_tokens, len(backbone.blocks)
    taken, highest = _take_indices(depth, indices)
    features, layers = type(backbone).forward_intermediates(
        backbone,
        x,
        indices=indices,
        return_prefix_tokens=num_prefix > 0,
        norm=norm,
        stop_early=stop_early,
        output_fmt="NLC",
        **options,
    )
    if appended and stop_early and highest < depth - 1:
        features = features[:, :-appended]

    patches, prefixes = [], []
    for number, layer in zip(sorted(set(taken)), layers, strict=True):
        tokens = torch.cat((layer[1], layer[0]), dim=1) if num_prefix else layer
        tokens = torch.cat((tokens[:, :index], tokens[:, index + count :]), dim=1)
        if appended and number < depth - 1:
            tokens = tokens[:, :-appended]
        prefixes.append(tokens[:, :num_prefix])
        patches.append(tokens[:, num_prefix:])
    if output_fmt == "NCHW":
        height, width = backbone.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        patches = [
            p.reshape(len(p), height, width, p.shape[-1]).permute(0, 3, 1, 2).contiguous()
            for p in patches
        ]

    with_prefix = return_prefix_tokens and num_prefix > 0
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": patches}
        if with_prefix:
            result["image_intermediates_prefix"] = prefixes
        return result if intermediates_only else {**result, "image_features": features}
    found: list[Any] = list(zip(patches, prefixes, strict=True)) if with_prefix else patches
    return found if intermediates_only else (features, found)


def _trained(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}
