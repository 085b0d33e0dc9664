"""GistModel: a frozen transformer with PEFT methods, a Gist token and a shared head."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

import gist_kernels
from gist.backbones.base import BackboneFamily
from gist.backbones.families import family_of
from gist.fusion import backbone as fusion
from gist.fusion.families import fused_backbone
from gist.fusion.sharding import has_shards
from gist.fusion.snapshot import Snapshot
from gist.methods import AttachedMethod, hooks
from gist.methods.hooks import FreeHook
from gist.model.attach import Before, attach_methods
from gist.model.checks import check, refuse_quantised
from gist.model.config import GistConfig
from gist.model.interface import TimmInterface, hide_added_tokens
from gist.model.precision import IN_OWN_DTYPE, InputDtype, convert_when_run_again, mixes, train
from gist.model.scripted import Scripted
from gist.model.text_token import TOKENS
from gist.untouched import any_global_hook
from gist_kernels.quantised import is_quantised
from gist_kernels.tracing import needs_dispatcher


class GistOutput(NamedTuple):
    """The output of a model with a Gist token in training mode: two (B, C) logits of one head."""

    cls_logits: torch.Tensor
    gist_logits: torch.Tensor


class ParameterCount(NamedTuple):
    """Numbers of parameters, by part of the model; the first three are trained."""

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


class GistModel(TimmInterface):
    """A backbone adapted by :func:`wrap`, which makes it.

    In training mode with a Gist token, the model returns :class:`GistOutput`. In evaluation mode,
    or without a token, it returns (B, C) logits of the class token (or of the backbone's own
    pooling).

    timm's other methods and attributes, such as ``forward_intermediates`` and ``pretrained_cfg``,
    are the backbone's: timm's functions take the wrapped model.

    Attributes:
        backbone: the given model. Its forward now runs through method and token; its state dict
            has not changed. Call the GistModel instead: the backbone's own ``forward_features``
            has the Gist token among its tokens. :func:`gist.unwrap` gives it back.
        method: the module with the PEFT method's parameters, or None.
        token: the :class:`gist.model.token.GistToken`, or None.
        config: the :class:`gist.GistConfig`.
    """

    def __init__(
        self, backbone: nn.Module, config: GistConfig, num_classes: int | None = None
    ) -> None:
        super().__init__()
        family = family_of(backbone)
        check(backbone, family, config, num_classes)
        self.config, self.before_wrap = config, Before.of(backbone)
        trained = [p for method in config.methods for p in method.trained(family)]
        if family.model is not backbone:  # HF PEFT's, which has marked what it trains
            trained += [p for p in backbone.parameters() if p.requires_grad]
        # First, because a method may refuse the backbone, which must then be unchanged.
        for method in config.methods:
            method.num_parameters(family)
        refuse_quantised(trained, [] if num_classes is not None else _head_parameters(family.heads))
        self.method = attach_methods(config, family)
        self.token = None
        if config.gist:
            self.token = TOKENS[family.token_place](
                family, config.token_dropout, config.num_tokens, config.token_init
            )
            self.token.attach(family)
        self.backbone: Any = backbone.requires_grad_(False)
        self.gist_head: nn.Module | None = None
        train(trained)
        if trained:
            convert_when_run_again(family.model)
        self._trains_backbone = bool(trained)
        if num_classes is not None:
            family.reset_classifier(num_classes)
        self._train_heads()
        hide_added_tokens(family, self.token, self.attached_methods)
        self._known = frozenset(self.state_dict())
        self._note_hooks()

    @property
    def family(self) -> BackboneFamily:
        """The backbone's family, which knows its blocks, pooling and classifier."""
        if self.backbone is None:
            raise RuntimeError("gist.unwrap has given this model's backbone back; wrap it again")
        return family_of(self.backbone)

    @property
    def anatomy(self) -> BackboneFamily:
        """The earlier name of :attr:`family`."""
        return self.family

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in :meth:`forward_features`, the Gist token included."""
        return self.family.num_prefix_tokens + (0 if self.token is None else self.token.count)

    def forward(
        self, images: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor | GistOutput:
        """(B, 3, H, W) images to :class:`GistOutput` or (B, C) logits, see the class.

        Text models take (B, N) int64 ``input_ids`` in place of images, and by name what else the
        backbone takes, such as ``attention_mask``, (B, N): 1 for words, 0 for padding. Labels go to
        the loss. ``family.main_input_name`` names the first argument as transformers does.

        Raises:
            TypeError: an input is missing, or has no place beside a Gist token.
            ValueError: a mask of another shape, or ``position_ids`` without a mask.
        """
        family = self.family
        if inputs or images is None:
            images, inputs = family.named_inputs(images, inputs)
        if getattr(self, "_is_replica", False):
            with hooks.replica_owners(list(self.modules())):
                return self._by_backbone(images, inputs)
        plan = self._plan_of_call(images, inputs)
        if plan.refusal is not None:
            with self._at_use(images):
                return self._by_backbone(images, inputs)
        num_read = None
        if family.reads_only_prefix:
            num_read = 1 if self.token is None else 1 + self.token.count
        with self._at_use(images):
            return self._head(self._features(plan, images, num_read, **inputs), inputs)

    def _by_backbone(
        self, images: torch.Tensor, inputs: dict[str, Any]
    ) -> torch.Tensor | GistOutput:
        """Run the backbone as its library does, by its call: the class token's logits are its."""
        family, token, images = self.family, self.token, self._with_gradient(images)
        if token is None or not (self.training or token.in_evaluation):
            return family.logits(self.backbone(images, **inputs))
        with hooks.asking(token) as answer:
            logits = family.logits(self.backbone(images, **inputs))
        if not self.training:
            return logits
        self._check_pooling()
        pooled = family.pool_token(*answer)
        return GistOutput(logits, family.classify(pooled, self.gist_head))

    def _with_gradient(self, images: torch.Tensor) -> torch.Tensor:
        """Images that require a gradient where, behind a frozen embedding, nothing else would."""
        if torch.is_grad_enabled() and self.family.needs_input_gradients:
            return images if images.requires_grad else images.detach().requires_grad_()
        return images

    def _check_pooling(self) -> None:
        if not self.family.pooling:
            raise ValueError(
                "with global_pool='' there is nothing to train the Gist token against; call "
                "reset_classifier(num_classes, global_pool='token'), or eval() for features"
            )

    def forward_features(self, images: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        """(B, 3, H, W) images to all (B, N, D) tokens after the final norm, Gist at index 1.

        Text models take what :meth:`forward` takes. A decoder's tokens are without the Gist token.
        """
        if inputs or images is None:
            images, inputs = self.family.named_inputs(images, inputs)
        with self._at_use(images):
            return self._features(self._plan_of_call(images, inputs), images, None, **inputs)

    def _at_use(self, x: torch.Tensor) -> AbstractContextManager[Any]:
        """Where a method trains parameters of a half backbone in float32, convert them at use."""
        if not self._trains_backbone:
            return nullcontext()
        heads = {id(p) for p in _head_parameters(self.family.heads)}
        body = [p for p in self.backbone.parameters() if id(p) not in heads]
        return InputDtype() if mixes(body, x) else nullcontext()

    def _features(
        self,
        plan: fusion.BackbonePlan,
        images: torch.Tensor,
        num_read: int | None,
        **inputs: Any,
    ) -> torch.Tensor:
        """The first ``num_read`` tokens after the final norm; None for all."""
        if plan.refusal is not None:
            return self.family.features(self._with_gradient(images), **inputs)
        return fusion.features(plan, images, self.attached_methods, self.token, num_read, **inputs)

    def _plan_of_call(self, images: torch.Tensor, inputs: dict[str, Any]) -> fusion.BackbonePlan:
        """:meth:`plan`, where inputs beside the main one decide too."""
        plan = self.plan()
        if not inputs or plan.backbone is None:
            return plan
        refusal = plan.backbone.call_refusal(images, inputs)
        return plan if refusal is None else fusion.BackbonePlan(refusal)

    def plan(self) -> fusion.BackbonePlan:
        """How the backbone runs in the model's present state, see :func:`gist.explain`."""
        # What is outside of the model decides too: nothing is kept then.
        if torch.compiler.is_compiling() or needs_dispatcher() or any_global_hook():
            return self._planned()
        cached = self.__dict__.get("_plan")
        if cached is None or not cached[0].holds():
            parts = (self.backbone, self.method, self.token)
            snapshot = Snapshot(part for part in parts if part is not None)
            cached = self.__dict__["_plan"] = snapshot, self._planned()
        return cached[1]

    def _planned(self) -> fusion.BackbonePlan:
        self._check_hooks()
        return fusion.plan(
            fused_backbone(self.family.model), self.attached_methods, self.hook_owners
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy's plan would be of the original's weights.
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    @property
    def attached_methods(self) -> list[AttachedMethod]:
        """The modules of the methods that have one."""
        method: Any = self.method
        if method is None:
            return []
        return list(method.values()) if len(self.config.methods) > 1 else [method]

    @property
    def hook_owners(self) -> set[int]:
        """The ids of the modules whose hooks gist has put on the backbone."""
        methods = {id(part) for method in self.attached_methods for part in method.modules()}
        return {id(self.token)} | methods

    def _note_hooks(self) -> None:
        self._hooks = hooks.hooks_on(self.backbone, self.hook_owners)

    @property
    def lost_hook(self) -> str | None:
        """What was replaced after wrap, so that a method or the token has no effect; or None."""
        return hooks.lost(self.backbone, self._hooks, self.hook_owners)

    def _check_hooks(self) -> None:
        if self.backbone is not None and (lost := self.lost_hook) is not None:
            raise RuntimeError(
                f"{lost}; replace modules before gist.wrap, or call gist.unwrap and wrap again"
            )

    def forward_head(
        self, features: torch.Tensor, pre_logits: bool = False
    ) -> torch.Tensor | GistOutput:
        """(B, N, D) tokens of :meth:`forward_features` to logits.

        With ``pre_logits``, to the classifier's (B, F) input instead, of both tokens in training.
        """
        return self._head(features, {}, pre_logits)

    def _head(
        self, features: torch.Tensor, inputs: dict[str, Any], pre_logits: bool = False
    ) -> torch.Tensor | GistOutput:
        """:meth:`forward_head` for a call with inputs beside the main one."""
        family, token = self.family, self.token
        classify = family.pre_logits if pre_logits else family.classify
        if token is None:
            return classify(family.pool_call(features, **inputs))
        own_tokens = features if family.reads_only_prefix else token.remove(features)
        pooled = family.pool_call(own_tokens, **inputs)
        if not self.training:
            return classify(pooled)
        self._check_pooling()
        token_pooled = family.pool_token(token.pick(features), own_tokens)
        if pre_logits:
            return GistOutput(classify(pooled), classify(token_pooled))
        if self.gist_head is not None:
            return GistOutput(
                family.classify(pooled), family.classify(token_pooled, self.gist_head)
            )
        logits = family.classify(torch.stack((pooled, token_pooled), dim=1))
        both = gist_kernels.split_heads(logits)
        # Beside tensor subclasses PyTorch compiles no outputs that share memory, and fully_shard
        # warns of them.
        if has_shards(self) or (
            torch.compiler.is_compiling() and any(map(is_quantised, self.backbone.parameters()))
        ):
            return GistOutput(*(each.clone() for each in both))
        return GistOutput(*both)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new, trainable one.

        Args:
            num_classes: 0 removes the head: the logits are then its input.
            global_pool: another pooling, by timm's names; None keeps the present one.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0; it is {num_classes}")
        self.family.reset_classifier(num_classes, global_pool)
        self._train_heads()

    def _train_heads(self) -> None:
        heads = self.family.heads
        train(_head_parameters(heads))
        for layer in (layer for head in _trained_heads(heads) for layer in head.modules()):
            if not any(isinstance(hook, FreeHook) for hook in layer._forward_pre_hooks.values()):
                layer.register_forward_pre_hook(IN_OWN_DTYPE)
        if self.config.gist and self.config.separate_head:
            self.gist_head = self.family.head_copy()

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the classifier, and of the Gist token's where it has its own."""
        gist_head = [] if self.gist_head is None else list(self.gist_head.parameters())
        return _head_parameters(self.family.heads) + gist_head

    def count_parameters(self) -> ParameterCount:
        """What :func:`gist.count_parameters` returns."""

        def size(module: nn.Module | None) -> int:
            return 0 if module is None else sum(p.numel() for p in module.parameters())

        heads = _head_parameters(self.family.heads)
        head_ids = {id(parameter) for parameter in heads}
        body = [p for p in self.backbone.parameters() if id(p) not in head_ids]
        return ParameterCount(
            method=size(self.method) + sum(p.numel() for p in body if p.requires_grad),
            token=size(self.token),
            head=sum(p.numel() for p in heads) + size(self.gist_head),
            frozen=sum(p.numel() for p in body if not p.requires_grad),
        )

    def extra_repr(self) -> str:
        if self.backbone is None:
            return "unwrapped"
        counted, family = self.count_parameters(), self.family
        parts = {method.name: method.num_parameters(family) for method in self.config.methods}
        if family.model is not self.backbone:
            parts["peft"] = counted.method - sum(parts.values())
        parts |= {"token": counted.token, "head": counted.head}
        trained = ", ".join(f"{name} {count:,}" for name, count in parts.items() if count)
        return f"trained: {trained}; frozen: {counted.frozen:,}"

    def trainable_state_dict(self) -> dict[str, torch.Tensor]:
        """Only the trained parameters, by name, detached."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def adapted_names(self) -> list[str]:
        """Names of the parameters that the config trains, whether or not they are trained now."""
        family, before = self.family, self.before_wrap.parameters
        parameters = _head_parameters(family.heads)
        for method in self.config.methods:
            parameters += method.trained(family)
        ids = {id(parameter) for parameter in parameters}

        def adapted(name: str, parameter: nn.Parameter) -> bool:
            module, _, own = name.partition(".")
            if module != "backbone":
                return module == "gist_head" or name in self._known
            by_peft = family.model is not self.backbone and before.get(own, (False,))[0]
            return by_peft or id(parameter) in ids

        return [name for name, parameter in self.named_parameters() if adapted(name, parameter)]

    def added_names(self) -> list[str]:
        """Names in the state dict that are neither wrap's nor were the backbone's then."""
        known = self._known.union(self.adapted_names())
        return [name for name in self.state_dict() if name not in known]

    def __prepare_scriptable__(self) -> nn.Module:
        if self.training:
            raise RuntimeError("torch.jit.script takes a wrapped model in evaluation mode: eval()")
        return Scripted(self, self.family.image_size)


def wrap(
    backbone: nn.Module, config: GistConfig | None = None, *, num_classes: int | None = None
) -> GistModel:
    """Adapt a transformer, in place: freeze it, attach the methods and the Gist token.

    The backbone's modules and their ``forward`` stay; methods and token join by hooks. All
    parameters are frozen, except the classifier's and those that a method trains. These become
    float32 in a half backbone, whose dtype would lose small steps, and are converted where they
    are used. The classifier computes in float32, or in autocast's dtype.

    Args:
        backbone: timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP's image tower, ...) or Eva, or
            transformers' ViT, DINOv2, DINOv3 or SigLIP, with a classifier, or one
            of transformers' text classifiers (BERT, RoBERTa, Llama, Qwen, ...; docs/text.md). A
            backbone adapted by HF PEFT keeps what PEFT trains; use ``GistConfig(method=None)`` for
            it.
        config: what to train; the default is ``GistConfig()``, the released adapter with GIST.
        num_classes: give the backbone a new linear classifier for so many classes. 0 removes it,
            for a head of one's own: outputs are then its (B, F) inputs, of class and Gist token in
            training, which :func:`gist_kernels.linear_gist_loss` takes. Default: the backbone's
            own classifier stays.

    Raises:
        TypeError: a model without a sequence of tokens, or of another library.
        ValueError: the backbone has no classifier, unsupported blocks or pooling, is for regression
            or several labels, has HF PEFT's prompts, or is wrapped already, or weights to be
            trained are quantised. It is then unchanged.
    """
    model = GistModel(backbone, config if config is not None else GistConfig(), num_classes)
    counted = model.count_parameters()
    if not (counted.method or counted.token) and (
        model.config.method is not None or model.family.model is not backbone
    ):
        warnings.warn("nothing but the classifier is trainable", UserWarning, stacklevel=2)
    return model


def _trained_heads(heads: Sequence[nn.Module]) -> list[nn.Module]:
    """The trained layers; HF PEFT keeps a trained copy of a head beside the original."""
    found: list[nn.Module] = []
    for head in heads:
        copies: Any = getattr(head, "modules_to_save", None)
        found += [head] if copies is None else copies.values()
    return found


def _head_parameters(heads: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for head in _trained_heads(heads) for parameter in head.parameters()]
