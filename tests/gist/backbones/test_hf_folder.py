"""transformers' models from a folder: weights, sizes, normalisation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

import gist
from gist.backbones import create_backbone
from gist.backbones.create import input_size

transformers = pytest.importorskip("transformers")
KINDS = ("ViT", "Dinov2", "Dinov2WithRegisters")


def saved(folder: Path, kind: str = "ViT", **options):
    """A small model of three classes, with its processor, in a folder."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=8, num_labels=3, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3)
    processor.save_pretrained(folder)
    return model


def equal(model, expected, without: str = "?") -> bool:
    own = model.state_dict()
    return all(torch.equal(own[n], t) for n, t in expected.state_dict().items() if without not in n)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folders_weights_sizes_and_normalisation_are_used(kind, tmp_path):
    source = saved(tmp_path, kind)
    model = create_backbone(f"hf:{tmp_path}", num_classes=3, pretrained=True)
    assert equal(model, source)
    assert input_size(model) == 32
    assert resolve_model_data_config(model)["mean"] == (0.1, 0.2, 0.3)
    assert resolve_model_data_config(model)["std"] == (0.5, 0.5, 0.5)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images).logits, source(images).logits)

    small = create_backbone(f"hf:{tmp_path}", num_classes=5, img_size=16, pretrained=True)
    assert input_size(small) == 16
    family = gist.backbones.families.family_of(small)
    assert family.encoder.embeddings.position_embeddings.shape == (1, 1 + 2 * 2, 32)
    assert small.classifier.weight.std() < 0.05
    output = gist.wrap(small)(torch.randn(2, 3, 16, 16))
    assert [logits.shape for logits in output] == [(2, 5), (2, 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_classifier_gets_one(kind, tmp_path):
    source = saved(tmp_path, kind)
    getattr(source, source.base_model_prefix).save_pretrained(tmp_path)
    model = create_backbone(f"hf:{tmp_path}", num_classes=3, pretrained=True)
    assert equal(model, source, without="classifier")


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_checkpoint_with_a_prefix_is_taken(prefix, tmp_path):
    source = saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    torch.save({"state_dict": {prefix + n: t for n, t in state.items()}}, tmp_path / "w.pth")
    (tmp_path / "model.safetensors").unlink()
    file = str(tmp_path / "w.pth")
    assert equal(create_backbone(f"hf:{tmp_path}", num_classes=3, weights=file), source)
    other = create_backbone(f"hf:{tmp_path}", num_classes=3)
    assert not equal(other, source)


def test_weights_that_lack_a_part_are_refused(tmp_path):
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in state if "layernorm_before.bias" in name)
    torch.save({n: t for n, t in state.items() if n != lost}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth holds another model's weights: it lacks .*layern"):
        create_backbone(f"hf:{tmp_path}", num_classes=3, weights=str(tmp_path / "w.pth"))
    torch.save({**state, "extra.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"it has other parameters \(extra.weight\)"):
        create_backbone(f"hf:{tmp_path}", num_classes=3, weights=str(tmp_path / "w.pth"))


def test_half_a_classifier_is_not_loaded(tmp_path):
    source = saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.bias"]
    torch.save(state, tmp_path / "w.pth")
    model = create_backbone(f"hf:{tmp_path}", num_classes=3, weights=str(tmp_path / "w.pth"))
    assert equal(model, source, without="classifier")
    assert not torch.equal(model.classifier.weight, source.classifier.weight)


def test_stochastic_depth_goes_where_there_is_one(tmp_path):
    saved(tmp_path / "dino", "Dinov2")
    model = create_backbone(f"hf:{tmp_path / 'dino'}", num_classes=2, drop_path_rate=0.2)
    assert model.config.drop_path_rate == 0.2
    saved(tmp_path / "vit")
    with pytest.raises(ValueError, match="has no stochastic depth; drop_path must be 0"):
        create_backbone(f"hf:{tmp_path / 'vit'}", num_classes=2, drop_path_rate=0.2)


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json; hf: takes a local folder"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (lambda f: rewrite(f / "preprocessor_config.json", rescale_factor=1.0), "1/255"),
        (lambda f: rewrite(f / "preprocessor_config.json", image_mean=[0.5]), "no image_mean of"),
        (lambda f: rewrite(f / "config.json", model_type="beit"), "a BeitForImageClassification"),
        (lambda f: rewrite(f / "config.json", num_channels=1), "takes 1 channels"),
        (lambda f: rewrite(f / "config.json", image_size=[32, 64]), "takes squares"),
    ],
)
def test_what_a_folder_lacks_is_said(change, message, tmp_path):
    saved(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_backbone(f"hf:{tmp_path}", num_classes=2, pretrained=True)


def test_a_size_that_does_not_fit_is_answered(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="not a multiple of hf:.* patch size, 8; take 32"):
        create_backbone(f"hf:{tmp_path}", num_classes=2, img_size=33)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("bilinear", 1.0, "squash")),  # ViT's: straight to 224 x 224
        ({"resample": 3, "size": 224}, ("bicubic", 1.0, "squash")),
        ({"do_center_crop": True, "size": {"shortest_edge": 256},
          "crop_size": {"height": 224, "width": 224}}, ("bilinear", 0.875, "center")),
        ({"do_center_crop": True, "size": {"shortest_edge": 200}, "crop_size": 224},
         ("bilinear", 1.0, "center")),
        ({"resample": None, "size": {"longest_edge": 9}}, ("bicubic", 0.875, "center")),
    ],
)  # fmt: skip
def test_the_processors_resizing_is_the_backbones(settings, expected, tmp_path):
    saved(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    config = resolve_model_data_config(create_backbone(f"hf:{tmp_path}", num_classes=3))
    assert tuple(config[key] for key in ("interpolation", "crop_pct", "crop_mode")) == expected
