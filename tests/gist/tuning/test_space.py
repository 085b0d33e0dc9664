"""The space of a search: what it draws, where it starts, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

import gist
from gist.runs.run import RunConfig
from gist.training.config import TrainConfig
from gist.tuning import Candidate, Space

CONFIG = RunConfig("data", "test_vit", train=TrainConfig(lr=1e-3, weight_decay=1e-4))


class Fixed:
    """Draws the value at a share of each range, and the last choice."""

    def __init__(self, share: float) -> None:
        self.share, self.drawn = share, {}

    def suggest_float(self, name, low, high, *, log):
        assert log
        self.drawn[name] = (low, high)
        return low * (high / low) ** self.share

    def suggest_int(self, name, low, high, *, log=False):
        self.drawn[name] = (low, high)
        return round(low + self.share * (high - low))

    def suggest_categorical(self, name, choices):
        self.drawn[name] = choices
        return choices[-1]


@pytest.mark.parametrize(
    ("method", "settings"),
    [("adapter", {"rank": 16, "scale": 0.316}), ("lora", {"rank": 16, "alpha": 8.0}),
     ("vpt", {"num_tokens": 26}), ("ssf", {}), ("fact", {"rank": 16, "scale": 0.316}),
     ("adapter+ssf", {}), ("none", {})],
)  # fmt: skip
def test_a_method_is_drawn_with_its_own_settings(method, settings):
    found = Space(methods=("bitfit", method)).draw(Fixed(0.5), CONFIG)
    assert found == Candidate(0.00316, 0.000316, method, settings)
    run = found.apply(CONFIG)
    names = [] if method == "none" else method.split("+")
    assert [m.name for m in run.gist.methods] == names
    assert (run.train.lr, run.train.weight_decay) == (0.00316, 0.000316)
    for method_ in run.gist.methods[:1]:
        assert settings.items() <= method_.settings().items()


def test_both_ends_of_the_ranks_are_drawn():
    space = Space(methods=("lora",))
    assert space.draw(Fixed(0), CONFIG).settings["rank"] == 2
    assert space.draw(Fixed(1), CONFIG).settings["rank"] == 64


def test_what_is_fixed_is_not_searched():
    trial = Fixed(0.5)
    space = Space(lr=None, weight_decay=None, methods=("lora",), fixed={"rank": 3})
    found = space.draw(trial, CONFIG)
    assert list(trial.drawn) == ["lora.alpha"]
    assert (found.lr, found.weight_decay, found.settings["rank"]) == (1e-3, 1e-4, 3)


def test_the_start_is_the_configs_own():
    assert Space().start(CONFIG) == {
        "method": "adapter", "lr": 1e-3, "weight_decay": 1e-4,
        "log2(adapter.rank)": 2, "adapter.scale": 0.1,
    }  # fmt: skip
    outside = replace(CONFIG, train=TrainConfig(lr=1.0, weight_decay=0.0))
    assert Space(methods=("lora",)).start(outside) == {"log2(lora.rank)": 3, "lora.alpha": 8.0}
    assert Space(methods=("fact",)).start(outside) == {"fact.scale": 1.0}  # no default rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": (1e-2, 1e-3)}, "lr must be a range, 0 < low < high"),
        ({"weight_decay": (0.0, 0.1)}, "weight_decay must be a range"),
        ({"methods": ()}, "methods must be different names"),
        ({"methods": ("lora", "lora")}, "methods must be different names"),
        ({"methods": ("loar",)}, "method: 'loar' is not known; did you mean"),
        ({"fixed": {"rank": 2}}, "fixed settings need a single method"),
        ({"methods": ("ssf",), "fixed": {"rank": 2}}, "ssf has no setting 'rank'"),
    ],
)
def test_what_can_not_be_searched_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Space(**options)


def test_a_method_that_does_not_fit_the_backbone_is_named():
    config = replace(CONFIG, model="vit_small_patch16_dinov3_qkvb", gist=gist.GistConfig())
    with pytest.raises(ValueError, match="method ssf: .*changes the biases"):
        Space(methods=("adapter", "ssf")).check(config)
