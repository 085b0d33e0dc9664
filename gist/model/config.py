"""What to train: the PEFT methods and the Gist token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Any

from gist.methods import Adapter, Method, method_type
from gist.validate import check_count, check_known, check_rate

TOKEN_INITS = ("uniform", "normal", "zeros", "class", "words")


@dataclass(frozen=True)
class GistConfig:
    """How :func:`gist.wrap` adapts a backbone.

    Args:
        method: a PEFT method's config such as :class:`gist.Adapter` or :class:`gist.LoRA`, several
            of different kinds, or None to train only the head (and the Gist token).
        gist: add the Gist token and give two heads' logits in training. False is the same PEFT
            method without knowledge interaction: the baseline.
        token_dropout: dropout on the Gist token, drawn for each image, in [0, 1).
        num_tokens: Gist tokens; the mean of several is classified.
        token_init: "uniform" in [-0.5, 0.5] as released, "normal" with standard deviation 0.02,
            "zeros", "class", the class token with its position, or "words", normal with each
            feature's mean and standard deviation over the vocabulary's embeddings. None is
            "uniform" for images and "words" for text, which have no "class".
        separate_head: a classifier of its own for the Gist token, which starts as a copy of the
            shared one.
    """

    method: Method | Sequence[Method] | None = field(default_factory=Adapter)
    gist: bool = True
    token_dropout: float = 0.1
    num_tokens: int = 1
    token_init: str | None = None
    separate_head: bool = False

    def __post_init__(self) -> None:
        given = self.method
        methods = () if given is None else (given,) if isinstance(given, Method) else given
        if not isinstance(methods, Sequence) or not all(isinstance(m, Method) for m in methods):
            raise TypeError(
                "method must be a PEFT method's config, such as gist.Adapter(rank=4), several, or "
                f"None; it is {given!r}"
            )
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(f"method must not name a method twice; it has {', '.join(names)}")
        if not isinstance(given, Method):
            only = methods[0] if len(methods) == 1 else None
            object.__setattr__(self, "method", only or tuple(methods) or None)
        check_rate("token_dropout", self.token_dropout)
        check_count("num_tokens", self.num_tokens)
        if self.token_init is not None:
            check_known("token_init", self.token_init, TOKEN_INITS)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods' configs, as a tuple."""
        if self.method is None:
            return ()
        return (self.method,) if isinstance(self.method, Method) else tuple(self.method)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; :meth:`from_dict` is the inverse."""
        described: Any = [{"name": m.name, **m.settings()} for m in self.methods]
        if len(described) < 2:
            described = described[0] if described else None
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "method": described}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GistConfig:
        """The config that :meth:`to_dict` described.

        Raises:
            ValueError: an unknown method.
            TypeError: an unknown field.
        """
        described = values["method"]
        if isinstance(described, Mapping):
            described = [described]
        methods = []
        for method in described or ():
            settings = dict(method)
            methods.append(method_type(settings.pop("name"))(**settings))
        return cls(**{**values, "method": methods or None})


_set_attribute = GistConfig.__setattr__  # dataclass's, which refuses any change


def _refuse_trainer(config: GistConfig, name: str, value: Any) -> None:
    # Trainer sets it in the config of any model, before it trains.
    if name == "use_cache":
        raise FrozenInstanceError(
            "transformers' Trainer needs a model that returns a loss: after import gist.hf, write "
            "Trainer(model=gist.hf.ForTrainer(model, gist.GistLoss()), ...)"
        )
    _set_attribute(config, name, value)


GistConfig.__setattr__ = _refuse_trainer  # type: ignore[method-assign, assignment]
