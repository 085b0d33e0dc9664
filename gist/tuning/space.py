"""The settings that are searched, and one choice of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from gist.methods import method_type
from gist.runs.run import AnyConfig, check_model

HEAD_ONLY = "none"
METHODS = ("adapter", "adaptformer", "lora", "ssf")
"""The methods of a search that names none."""
RANKS = (2, 64)
"""Powers of two from the first to the second."""
LOGARITHMIC: dict[str, tuple[float, float]] = {"scale": (0.01, 10.0), "alpha": (1.0, 64.0)}
TOKENS = (1, 50)


class Draw(Protocol):
    """What a space draws from, as an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any: ...


@dataclass(frozen=True)
class Candidate:
    """One choice of the searched settings.

    Args:
        lr: peak learning rate.
        weight_decay: as :class:`gist.training.config.TrainConfig`.
        method: a method's name, several joined by +, or "none".
        settings: the method's settings other than its defaults.
    """

    lr: float
    weight_decay: float
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, config: AnyConfig) -> AnyConfig:
        """The run that ``config`` describes, with these settings."""
        names = [] if self.method == HEAD_ONLY else self.method.split("+")
        methods = [method_type(name)(**self.settings) for name in names]
        return replace(
            config,
            gist=replace(config.gist, method=methods),
            train=replace(config.train, lr=self.lr, weight_decay=self.weight_decay),
        )


@dataclass(frozen=True)
class Space:
    """What is searched. Everything else is the config's.

    Of a single method, the settings are searched too: ``rank`` (2 to 64, powers of two), ``scale``
    (0.01 to 10), LoRA's ``alpha`` (1 to 64) and VPT's ``num_tokens`` (1 to 50).

    Args:
        lr, weight_decay: lowest and highest value, searched on a logarithmic scale; None for the
            config's own.
        methods: names, each a method's, several joined by +, or "none".
        fixed: settings of the only method, which are not searched.

    Raises:
        ValueError: a range that is not 0 < low < high, an unknown or repeated method, none at all,
            or ``fixed`` with several methods or for a setting that the method lacks.
    """

    lr: tuple[float, float] | None = (1e-4, 1e-1)
    weight_decay: tuple[float, float] | None = (1e-6, 1e-1)
    methods: tuple[str, ...] = METHODS
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            limits = getattr(self, name)
            if limits is not None and not 0 < limits[0] < limits[1] < float("inf"):
                raise ValueError(f"{name} must be a range, 0 < low < high; it is {limits}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be different names; they are {self.methods}")
        known = [_fields(method) for method in self.methods]
        if self.fixed and len(self.methods) > 1:
            raise ValueError("fixed settings need a single method")
        for name in self.fixed:
            if name not in known[0]:
                raise ValueError(f"{self.methods[0]} has no setting {name!r}")

    def draw(self, trial: Draw, config: AnyConfig) -> Candidate:
        """A candidate of a trial's choosing. Numbers are rounded to three significant digits."""
        lr, weight_decay = config.train.lr, config.train.weight_decay
        if self.lr is not None:
            lr = _rounded(trial.suggest_float("lr", *self.lr, log=True))
        if self.weight_decay is not None:
            weight_decay = _rounded(
                trial.suggest_float("weight_decay", *self.weight_decay, log=True)
            )
        method = self.methods[0]
        if len(self.methods) > 1:
            method = trial.suggest_categorical("method", self.methods)
        settings = dict(self.fixed)
        for name in self._searched(method):
            label = f"{method}.{name}"
            if name == "rank":
                low, high = (limit.bit_length() - 1 for limit in RANKS)
                settings[name] = 2 ** trial.suggest_int(f"log2({label})", low, high)
            elif name == "num_tokens":
                settings[name] = trial.suggest_int(label, *TOKENS, log=True)
            else:
                settings[name] = _rounded(trial.suggest_float(label, *LOGARITHMIC[name], log=True))
        return Candidate(lr, weight_decay, method, settings)

    def start(self, config: AnyConfig) -> dict[str, Any]:
        """The parameters of the first trial: the config's own rates, the first method's defaults.

        A value outside its range is left to the sampler.
        """
        method = self.methods[0]
        start: dict[str, Any] = {"method": method} if len(self.methods) > 1 else {}
        for name in ("lr", "weight_decay"):
            limits, own = getattr(self, name), getattr(config.train, name)
            if limits is not None and limits[0] <= own <= limits[1]:
                start[name] = own
        for name in self._searched(method):
            default = _fields(method)[name]
            if name == "rank" and default in (2, 4, 8, 16, 32, 64):
                start[f"log2({method}.rank)"] = default.bit_length() - 1
            elif name != "rank":
                start[f"{method}.{name}"] = default
        return start

    def check(self, config: AnyConfig) -> None:
        """Check each method, at its largest rank, against the config's backbone.

        Raises:
            ValueError: as :func:`gist.runs.run.check_model`, with the method's name.
        """
        for method in self.methods:
            settings = dict(self.fixed)
            if "rank" in self._searched(method):
                settings["rank"] = RANKS[1]
            candidate = Candidate(config.train.lr, config.train.weight_decay, method, settings)
            try:
                check_model(candidate.apply(config))
            except ValueError as error:
                raise ValueError(f"method {method}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def _searched(self, method: str) -> Iterator[str]:
        """Names of the method's settings that are searched."""
        known = ("rank", "num_tokens", *LOGARITHMIC)
        return (name for name in _fields(method) if name in known and name not in self.fixed)


def _fields(method: str) -> dict[str, Any]:
    """Settings of a single method, with their defaults; none of several or of no method.

    Raises:
        ValueError: an unknown name.
    """
    if method == HEAD_ONLY:
        return {}
    kinds = [method_type(name) for name in method.split("+")]
    if len(kinds) > 1:
        return {}
    return {each.name: each.default for each in fields(kinds[0])}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
