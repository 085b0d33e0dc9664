"""Saving and loading: bit-identical logits, and a clear refusal of what does not belong."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import gist


def backbone(seed: int = 0, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**{**sizes, "num_classes": 5, **options})
    model.pretrained_cfg = {"architecture": "vit_for_tests"}
    return model


def trained(config: gist.GistConfig | None = None) -> gist.GistModel:
    """A model whose trainables are all away from what wrap would draw."""
    model = gist.wrap(backbone(), config or gist.GistConfig(gist.Adapter(rank=3, scale=0.5)))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.trainable_state_dict().values():
            parameter.add_(torch.randn_like(parameter))
    return model.eval()


PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "config",
    [
        gist.GistConfig(gist.Adapter(rank=3, scale=0.5, activation="relu"), token_dropout=0.2),
        gist.GistConfig(gist=False),
        gist.GistConfig(method=None),
        gist.GistConfig(method=None, gist=False),
    ],
)
def test_a_fresh_backbone_gives_bit_identical_logits(tmp_path, config):
    model = trained(config)
    gist.save(model, tmp_path / "deep" / "folder")
    loaded = gist.load(backbone(), tmp_path / "deep" / "folder")
    assert loaded.config == config
    assert not loaded.training
    assert torch.equal(loaded(PIXELS), model(PIXELS))


def test_only_what_was_trained_is_written(tmp_path):
    model = trained()
    gist.save(model, tmp_path, classes=["a", "b", "c", "d", "e"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    bytes_trained = 4 * gist.count_parameters(model).trainable
    assert (tmp_path / "adapter.safetensors").stat().st_size < bytes_trained + 2048
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["classes"] == ["a", "b", "c", "d", "e"]
    assert config["gist"]["method"] == {
        "name": "adapter", "rank": 3, "scale": 0.5, "activation": "gelu", "placement": "shared",
    }  # fmt: skip


def test_number_of_classes_comes_with_the_adapter(tmp_path):
    model = trained()
    gist.save(model, tmp_path)
    other = backbone()
    other.reset_classifier(1000)
    assert torch.equal(gist.load(other, tmp_path)(PIXELS), model(PIXELS))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"embed_dim": 32}, "embed_dim 32, .*vit_for_tests with 24"),
        ({"depth": 3}, "depth 3"),
        ({"reg_tokens": 2}, "num_prefix_tokens 3"),
        ({"global_pool": "avg"}, "global_pool 'avg'"),
        ({"seed": 9}, "frozen weights differ"),
        ({"img_size": 32}, "frozen weights differ.*image size"),
    ],
)
def test_another_backbone_is_refused_and_left_alone(tmp_path, other, message):
    gist.save(trained(), tmp_path)
    vit = backbone(**other)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        gist.load(vit, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert all(p.requires_grad for p in vit.parameters())


def test_differing_weights_may_be_meant(tmp_path):
    gist.save(trained(), tmp_path)
    model = gist.load(backbone().bfloat16(), tmp_path, check_weights=False)
    assert model(PIXELS.bfloat16()).isfinite().all()


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json; is it what gist.save wrote"):
        gist.load(backbone(), tmp_path)
    gist.save(trained(), tmp_path)
    weights, config = tmp_path / "adapter.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"adapter.safetensors is damaged"):
        gist.load(backbone(), tmp_path)
    weights.write_bytes(whole)
    text = config.read_text()
    config.write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99; this version reads formats 1 to 2"):
        gist.load(backbone(), tmp_path)
    config.write_text(text[:40])
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        gist.load(backbone(), tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter.safetensors"):
        gist.load(backbone(), tmp_path)


def test_a_failed_write_keeps_the_earlier_file(tmp_path, monkeypatch):
    model = trained()
    gist.save(model, tmp_path)
    expected = model(PIXELS)
    with torch.no_grad():
        model.token.weight.add_(1)

    def full_disk(path, data):
        path.open("wb").write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        gist.save(model, tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    assert torch.equal(gist.load(backbone(), tmp_path)(PIXELS), expected)


@pytest.mark.parametrize("failing", ["adapter.safetensors", "config.json"])
def test_a_disk_that_is_full_at_either_file_keeps_the_earlier_pair(tmp_path, monkeypatch, failing):
    model = trained()
    gist.save(model, tmp_path)
    expected = model(PIXELS)
    with torch.no_grad():
        model.token.weight.add_(1)
    write = Path.write_bytes

    def full_disk(path, data):
        if failing in path.name:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left") as raised:
        gist.save(model, tmp_path)
    monkeypatch.undo()
    assert failing in raised.value.filename
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    assert torch.equal(gist.load(backbone(), tmp_path)(PIXELS), expected)


def test_threads_that_save_into_one_folder_leave_a_pair(tmp_path, monkeypatch):
    early, late = trained(), trained()
    with torch.no_grad():
        late.token.weight.add_(1)
    between, replace = threading.Event(), Path.replace

    def slowly(path, target):
        if target.name == "config.json" and not between.is_set():
            between.set()
            time.sleep(0.2)  # for the other to save meanwhile
        return replace(path, target)

    monkeypatch.setattr("pathlib.Path.replace", slowly)
    thread = threading.Thread(target=gist.save, args=(early, tmp_path))
    thread.start()
    assert between.wait(10)
    gist.save(late, tmp_path)
    thread.join()
    assert torch.equal(gist.load(backbone(), tmp_path)(PIXELS), late(PIXELS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]


# ---- trained otherwise than the config says ------------------------------------------------------

CONFIG = gist.GistConfig(gist.Adapter(rank=3, scale=0.5))


def unfreeze_norm(model):
    model.backbone.norm.requires_grad_(True)


def unfreeze_position_and_a_block(model):
    model.backbone.pos_embed.requires_grad_(True)
    model.backbone.blocks[1].requires_grad_(True)


def freeze_head(model):
    model.backbone.head.requires_grad_(False)


def freeze_token_and_unfreeze_norm(model):
    model.token.requires_grad_(False)
    model.backbone.norm.requires_grad_(True)


def freeze_all(model):
    model.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [unfreeze_norm, unfreeze_position_and_a_block, freeze_head, freeze_token_and_unfreeze_norm,
     freeze_all],
)  # fmt: skip
@pytest.mark.parametrize("check_weights", [True, False])
def test_what_the_user_trains_or_freezes_is_saved_and_restored(tmp_path, change, check_weights):
    model = gist.wrap(backbone(), CONFIG)
    trained_by_config = set(model.trainable_state_dict())
    change(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name in trained_by_config:
                parameter.add_(torch.randn_like(parameter))
    gist.save(model.eval(), tmp_path)
    loaded = gist.load(backbone(), tmp_path, check_weights=check_weights)
    assert torch.equal(loaded(PIXELS), model(PIXELS))
    assert loaded.trainable_state_dict().keys() == model.trainable_state_dict().keys()
    again = tmp_path / "again"
    gist.save(loaded, again)
    for file in ("config.json", "adapter.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("method", [gist.Full(), gist.BitFit(), gist.LoRA()])
def test_shared_weights_are_saved_and_restored(tmp_path, method):
    def sharing():
        vit = backbone()
        vit.blocks[1].mlp.fc1.weight = vit.blocks[0].mlp.fc1.weight
        vit.blocks[1].mlp.fc1.bias = vit.blocks[0].mlp.fc1.bias
        return vit

    model = gist.wrap(sharing(), gist.GistConfig(method)).eval()
    with torch.no_grad():
        for parameter in model.trainable_state_dict().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    gist.save(model, tmp_path)
    assert torch.equal(gist.load(sharing(), tmp_path)(PIXELS), model(PIXELS))


def test_a_classifier_that_the_user_put_in_is_saved_and_restored(tmp_path):
    model = trained()
    model.backbone.head = torch.nn.Linear(24, 9)
    gist.save(model, tmp_path)
    loaded = gist.load(backbone(), tmp_path)
    assert loaded.num_classes == 9
    assert torch.equal(loaded(PIXELS), model(PIXELS))


def test_the_rest_of_the_backbone_is_still_checked(tmp_path):
    model = gist.wrap(backbone(), CONFIG)
    unfreeze_norm(model)
    gist.save(model, tmp_path)
    vit = backbone(seed=9)
    with pytest.raises(ValueError, match="frozen weights differ"):
        gist.load(vit, tmp_path)
    with pytest.raises(ValueError, match=r"lacks \['backbone.norm.bias', 'backbone.norm.weight'\]"):
        gist.load(backbone(global_pool="avg"), tmp_path)


def test_only_files_with_such_parameters_are_of_format_2(tmp_path):
    model = gist.wrap(backbone(), CONFIG)
    for change, expected in ((None, 1), (freeze_head, 2), (unfreeze_norm, 2)):
        if change is not None:
            change(model)
        gist.save(model, tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["format"] == expected
        assert ("also_trained" in saved) is ("frozen" in saved) is (expected == 2)


@pytest.mark.parametrize(
    ("add", "name"),
    [
        (lambda m: setattr(m, "extra", torch.nn.Linear(2, 2)), "extra.weight, extra.bias"),
        (lambda m: setattr(m.method, "extra", torch.nn.Parameter(torch.ones(1))), "method.extra"),
        (
            lambda m: setattr(m.backbone, "extra", torch.nn.Parameter(torch.ones(1))),
            "backbone.extra",
        ),
        (lambda m: m.register_buffer("mean", torch.ones(3)), "mean"),
    ],
)
def test_what_was_added_later_is_refused_by_name(tmp_path, add, name):
    model = gist.wrap(backbone(), CONFIG)
    add(model)
    with pytest.raises(ValueError, match=f"added after gist.wrap: {name};"):
        gist.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_was_added_before_is_saved(tmp_path):
    def with_scale():
        vit = backbone()
        vit.extra = torch.nn.Parameter(torch.ones(2))
        return vit

    model = gist.wrap(with_scale(), CONFIG)
    model.backbone.extra.requires_grad_(True)
    with torch.no_grad():
        model.backbone.extra.mul_(3)
    gist.save(model, tmp_path)
    assert gist.load(with_scale(), tmp_path).backbone.extra.tolist() == [3, 3]


def test_a_model_without_a_classifier_is_saved(tmp_path):
    model = trained()
    model.reset_classifier(0)
    gist.save(model, tmp_path)
    loaded = gist.load(backbone(), tmp_path)
    assert torch.equal(loaded(PIXELS), model(PIXELS))
    assert loaded.num_classes == 0


def test_files_that_do_not_belong_together_leave_the_backbone_unwrapped(tmp_path):
    gist.save(trained(), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_tokens": 1', '"num_tokens": 2'))
    vit = backbone()
    with pytest.raises(RuntimeError, match="token.weight"):
        gist.load(vit, tmp_path)
    assert all(p.requires_grad for p in vit.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())


# ---- earlier files -------------------------------------------------------------------------------


def filled(model):
    """Every parameter from a formula in exact arithmetic, the same on every machine."""
    with torch.no_grad():
        for k, (_, parameter) in enumerate(sorted(model.named_parameters())):
            values = torch.arange(parameter.numel(), dtype=torch.float64) * 37 + 11 * k
            parameter.copy_((((values % 101) - 50) / 512).view(parameter.shape))
    return model


def test_a_file_of_version_0_1_0_is_read():
    config = gist.GistConfig(gist.Adapter(rank=2, scale=0.5), token_dropout=0.2)
    model = filled(gist.wrap(backbone(), config)).eval()
    fresh = backbone()
    fresh.load_state_dict(model.backbone.state_dict())
    fresh.reset_classifier(5)
    loaded = gist.load(fresh, Path(__file__).parent / "saved" / "0.1.0")
    assert loaded.config == config
    assert torch.equal(loaded(PIXELS), model(PIXELS))
