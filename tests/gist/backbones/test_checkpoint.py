"""Checkpoints of the layouts that trainings write: loaded wholly, or refused by their prefix."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch

from gist.backbones import create_backbone

TINY = "test_vit"
DISTILLED = "deit_tiny_distilled_patch16_224"


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    """A state dict with three classes, no two models' alike."""
    return timm.create_model(TINY, num_classes=3).state_dict()


def saved(folder: Path, content) -> str:
    torch.save(content, folder / "weights.pth")
    return str(folder / "weights.pth")


def under(prefix: str, state) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in state.items()}


def body(state) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def same(model, state, names) -> bool:
    return all(torch.equal(model.state_dict()[name], state[name]) for name in names)


PROJECTION = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_v": torch.ones(2)}


@pytest.mark.parametrize(
    "layout",
    [
        lambda s: under("module.", s),
        lambda s: {"state_dict": under("model.", s), "epoch": 3},
        lambda s: {"state_dict": under("net.", s) | {"criterion.weight": torch.ones(3)}},
        lambda s: {"state_dict": under("module.", s), "state_dict_ema": under("module.", s)},
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {0: {}}}},
        lambda s: under("_orig_mod.", s),
        lambda s: under("backbone.", s) | PROJECTION,
        lambda s: {"teacher": under("module.backbone.", s) | under("module.", PROJECTION)},
        lambda s: {"state_dict": under("module.encoder.trunk.", s)},
    ],
    ids=[
        "ddp",
        "lightning",
        "lightning_net",
        "ema",
        "args",
        "compiled",
        "backbone",
        "dino",
        "deep",
    ],
)
def test_one_common_prefix_is_stripped(layout, source, tmp_path):
    model = create_backbone(TINY, num_classes=3, weights=saved(tmp_path, layout(source)))
    assert same(model, source, source)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("teacher.module.backbone.", "student.module.backbone."),
        ("state_dict.module.base_encoder.", "state_dict.module.momentum_encoder."),
        ("state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_of_a_teacher_and_its_student_one_is_chosen_and_named(
    first, second, turned, source, tmp_path
):
    content: dict = {}
    pair = [(first, source), (second, other(source))]
    for prefix, state in reversed(pair) if turned else pair:
        top, _, rest = prefix.partition(".")
        content.setdefault(top, {}).update(under(rest, state))
    with pytest.warns(UserWarning, match=f"below '{first}' are used, not those below '{second}'"):
        model = create_backbone(TINY, num_classes=3, weights=saved(tmp_path, content))
    assert same(model, source, source)


def test_averaged_weights_come_first(source, tmp_path):
    file = saved(tmp_path, {"state_dict": other(source), "state_dict_ema": source})
    assert same(create_backbone(TINY, num_classes=3, weights=file), source, source)


def test_two_models_that_nothing_tells_apart_are_refused(source, tmp_path):
    file = saved(tmp_path, under("left.", source) | under("right.", other(source)))
    with pytest.raises(ValueError, match=r"several models that fit, below .*'left\.', 'right\.'"):
        create_backbone(TINY, num_classes=3, weights=file)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s.pop("blocks.3.mlp.fc1.bias"), r"lacks parameters \(blocks.3.mlp.fc1.bias\)"),
        (lambda s: s.update({"extra": torch.zeros(1)}), r"has other parameters \(extra\)"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"has misshapen parameters"),
    ],
)
def test_a_prefix_that_does_not_explain_the_model_is_named(change, fault, source, tmp_path):
    changed = dict(source)
    change(changed)
    file = saved(tmp_path, {"state_dict": under("model.", changed)})
    with pytest.raises(ValueError, match=rf"below the prefix 'state_dict.model\.' it {fault}"):
        create_backbone(TINY, num_classes=3, weights=file)


def test_parameters_under_different_prefixes_are_not_gathered(source, tmp_path):
    half = {n: t for n, t in source.items() if n.startswith("blocks.")}
    rest = {n: t for n, t in source.items() if n not in half}
    file = saved(tmp_path, under("a.", half) | under("b.", rest))
    with pytest.raises(ValueError, match=r"below the prefix 'b\.' it lacks parameters \(blocks"):
        create_backbone(TINY, num_classes=3, weights=file)


def test_half_a_classifier_is_not_loaded(source, tmp_path):
    state = dict(source)
    del state["head.bias"]
    torch.manual_seed(7)
    model = create_backbone(TINY, num_classes=3, weights=saved(tmp_path, state))
    torch.manual_seed(7)
    new = timm.create_model(TINY, num_classes=3).state_dict()
    assert same(model, new, ["head.weight", "head.bias"])
    assert same(model, source, body(source))


def test_a_file_that_holds_no_dictionary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds a Tensor, not a dictionary of parameters"):
        create_backbone(TINY, num_classes=3, weights=saved(tmp_path, torch.ones(2)))


def test_both_heads_of_a_distilled_model_are_new_for_other_classes(tmp_path):
    source = timm.create_model(DISTILLED).state_dict()
    file = saved(tmp_path, {"model": source})
    model = create_backbone(DISTILLED, num_classes=5, weights=file)
    heads = [name for name in source if name.startswith("head")]
    assert len(heads) == 4
    assert model.head.weight.shape == model.head_dist.weight.shape == (5, 192)
    assert same(model, source, [name for name in source if name not in heads])
    whole = create_backbone(DISTILLED, num_classes=1000, weights=file)
    assert same(whole, source, source)


@pytest.mark.parametrize(
    "name",
    ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"],
)
def test_an_evas_checkpoint_is_loaded_and_its_grid_resampled(name, tmp_path):
    source = timm.create_model(name, num_classes=4).state_dict()
    file = saved(tmp_path, {"state_dict": under("module.", source)})
    assert same(create_backbone(name, num_classes=4, weights=file), source, source)
    patch = source["patch_embed.proj.weight"].shape[-1]
    small = create_backbone(name, num_classes=2, img_size=4 * patch, weights=file)
    fitting = [n for n in body(source) if small.state_dict()[n].shape == source[n].shape]
    assert same(small, source, fitting)
    assert small(torch.zeros(1, 3, 4 * patch, 4 * patch)).shape == (1, 2)
    other = tmp_path / "weights.npz"
    other.touch()
    with pytest.raises(ValueError, match="Eva has no .npz layout"):
        create_backbone(name, num_classes=2, weights=str(other))


def test_deit_threes_own_names_of_the_scales_are_taken(tmp_path):
    name = "deit3_small_patch16_224"
    source = timm.create_model(name, num_classes=3).state_dict()
    renamed = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
               for n, t in source.items()}  # fmt: skip
    assert renamed.keys() != source.keys()
    model = create_backbone(name, num_classes=3, weights=saved(tmp_path, {"model": renamed}))
    assert same(model, source, source)
