"""Other methods of HF PEFT than LoRA below GIST: DoRA, VeRA and OFT."""

from __future__ import annotations

import pytest
import torch
from models import backbone, images, transformers_vit

import gist

peft = pytest.importorskip("peft")
TARGET = torch.tensor([1, 4])
LAYERS = {"timm": ["attn.qkv", "mlp.fc1"], "transformers": ["q_proj", "v_proj"]}
PARAMETERS = {"dora": "lora_magnitude_vector", "vera": "vera_lambda_d", "oft": "oft_R"}


def adapted(kind, name, **options):
    """A backbone that PEFT has adapted, the same at each call."""
    torch.manual_seed(4)
    vit, head = (backbone(), "head") if kind == "timm" else (transformers_vit(), "classifier")
    options = {"target_modules": LAYERS[kind], "modules_to_save": [head], **options}
    if name == "dora":
        config = peft.LoraConfig(r=2, use_dora=True, **options)
    elif name == "vera":  # whose layers share one projection, for the largest of them
        config = peft.VeraConfig(r=4, **options)
    else:
        config = peft.OFTConfig(r=0, oft_block_size=4, **options)
    return peft.get_peft_model(vit, config)


def trained(kind, name, **options):
    """A model after a few steps, its losses, and its state before them."""
    model = gist.wrap(adapted(kind, name), gist.GistConfig(None, token_dropout=0.0, **options))
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=1e-2), []
    loss_of = gist.GistLoss() if model.token is not None else torch.nn.CrossEntropyLoss()
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model(images()), TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses, before


every_adapter = pytest.mark.parametrize("name", PARAMETERS)
both_libraries = pytest.mark.parametrize("kind", LAYERS)


@both_libraries
@every_adapter
def test_trains_with_token_and_loss_and_a_file_keeps_it(kind, name, tmp_path):
    model, losses, before = trained(kind, name)
    assert losses[-1] < 0.7 * losses[0]
    names = model.trainable_state_dict()
    depth = len(model.family.blocks)
    assert sum(PARAMETERS[name] in each for each in names) == depth * len(LAYERS[kind])
    for each, parameter in model.named_parameters():
        assert parameter.requires_grad == (each in names)
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, each
    for each, value in model.state_dict().items():
        assert torch.equal(value, before[each]) == (each not in names), each

    logits = model.eval()(images())
    gist.save(model, tmp_path)
    fresh = gist.wrap(adapted(kind, name), model.config).eval()
    assert not torch.allclose(fresh(images()), logits, atol=0.1)
    assert torch.equal(gist.load(adapted(kind, name), tmp_path)(images()), logits)


@both_libraries
@every_adapter
def test_is_merged_by_peft(kind, name):
    model, _, _ = trained(kind, name, gist=False)
    plain = gist.merge(model.eval())
    logits = plain(images())
    logits = getattr(logits, "logits", logits)
    torch.testing.assert_close(logits, model(images()), rtol=0, atol=1e-5)


def test_vera_is_not_loaded_onto_other_projections(tmp_path):
    gist.save(trained("timm", "vera")[0], tmp_path)
    with pytest.raises(ValueError, match="frozen weights differ"):
        gist.load(adapted("timm", "vera", projection_prng_key=1), tmp_path)


def test_oft_of_a_convolution_is_not_merged():
    """PEFT's forward rotates overlapping windows of the image, its merge the kernel."""
    oft = adapted("timm", "oft", target_modules=["proj"])
    assert type(oft.get_base_model().patch_embed.proj) is not torch.nn.Conv2d
    model = gist.wrap(oft, gist.GistConfig(None, gist=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match="OFT of the convolution .*patch_embed.proj"):
        gist.merge(model)
