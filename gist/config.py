"""What to train: the PEFT method and the Gist token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gist.methods import Adapter, Method, method_type


@dataclass(frozen=True)
class GistConfig:
    """How :func:`gist.wrap` adapts a backbone.

    Args:
        method: a PEFT method's config such as :class:`gist.Adapter`, or None to train the head
            (and the Gist token) alone.
        gist: add the Gist token and give two heads' logits in training. False is the same PEFT
            method without knowledge interaction: the baseline.
        token_dropout: dropout on the Gist token, drawn anew for each image, in [0, 1).
    """

    method: Method | None = field(default_factory=Adapter)
    gist: bool = True
    token_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.method is not None and not isinstance(self.method, Method):
            raise TypeError(
                "method must be a PEFT method's config, such as gist.Adapter(rank=4), or None; "
                f"it is {self.method!r}"
            )
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"token_dropout must be in [0, 1); it is {self.token_dropout}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the inverse of :meth:`from_dict`."""
        method = None if self.method is None else {"name": self.method.name, **asdict(self.method)}
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "method": method}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GistConfig:
        """Raises ValueError for an unknown method, TypeError for an unknown field."""
        method = values["method"]
        if method is not None:
            method = dict(method)
            method = method_type(method.pop("name"))(**method)
        return cls(**{**values, "method": method})
