"""gist.unwrap gives back the backbone that gist.wrap was given."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from models import backbone, images, wrapped

import gist

METHODS = [
    gist.Adapter(), gist.AdaptFormer(), gist.LoRA(targets=("proj", "fc1")), gist.RepAdapter(),
    gist.BitFit(), gist.LayerNormTuning(), gist.Convpass(), gist.DiffFit(), None,
    [gist.Adapter(), gist.BitFit()],
]  # fmt: skip
OF_VIT = [gist.VPT(), gist.VPT(deep=False), gist.SSF(), gist.FacT(), gist.LoRA()]


def eva():
    torch.manual_seed(0)
    return timm.models.eva.Eva(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7,
        use_rot_pos_emb=True, global_pool="token",
    )  # fmt: skip


def state(model):
    """All that wrap could have changed, beside parameters' values."""
    return {
        name: (
            sorted(vars(part).keys() - {"_is_full_backward_hook"}),
            len(part._forward_hooks),
            len(part._forward_pre_hooks),
            getattr(part, "num_prefix_tokens", None),
            part.training,
        )
        for name, part in model.named_modules()
    } | {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("make", "method"),
    [(backbone, m) for m in METHODS + OF_VIT] + [(eva, m) for m in METHODS],
)
def test_the_backbone_is_as_before(make, method):
    vit = make().eval()
    vit.blocks[1].requires_grad_(False)
    before, values = state(vit), {k: v.clone() for k, v in vit.state_dict().items()}
    expected = vit(images())
    model = gist.wrap(vit, gist.GistConfig(method))
    assert state(vit) != before
    assert gist.unwrap(model) is vit
    assert state(vit) == before
    assert all(torch.equal(v, values[k]) for k, v in vit.state_dict().items())
    assert torch.equal(vit(images()), expected)


def test_the_backbone_can_be_wrapped_again():
    first = wrapped("vit", gist.GistConfig(gist.VPT()))
    again = gist.wrap(gist.unwrap(first), gist.GistConfig(gist.LoRA(), gist=False)).eval()
    fresh = gist.wrap(backbone(), gist.GistConfig(gist.LoRA(), gist=False)).eval()
    torch.testing.assert_close(again(images()), fresh(images()))


def test_trained_parameters_keep_their_values_and_a_new_head_stays():
    model = wrapped("vit", gist.GistConfig(gist.BitFit())).train()
    model.reset_classifier(4)
    with torch.no_grad():
        for parameter in model.trainable_state_dict().values():
            parameter.add_(1)
    bias, head = model.backbone.blocks[0].norm1.bias.clone(), model.backbone.head
    vit = gist.unwrap(model)
    assert vit.head is head
    assert torch.equal(vit.blocks[0].norm1.bias, bias)
    assert all(p.requires_grad for p in vit.parameters())
    assert vit(images()).shape == (2, 4)


def test_hooks_of_others_stay():
    model = wrapped("vit")
    handle = model.backbone.blocks[0].register_forward_hook(lambda *_: None)
    vit = gist.unwrap(model)
    assert list(vit.blocks[0]._forward_hooks) == [handle.id]


def test_a_float32_head_of_a_half_precision_backbone_has_its_dtype_again():
    for cast in (False, True):
        model = gist.wrap(backbone().bfloat16())
        model.backbone.head.float()
        if cast:
            model.float()
        vit = gist.unwrap(model)
        dtype = torch.float32 if cast else torch.bfloat16
        assert {p.dtype for p in vit.parameters()} == {dtype}
        assert vit(images().to(dtype)).dtype == dtype


def test_an_unwrapped_model_says_so():
    model = wrapped("vit")
    gist.unwrap(model)
    for use in (lambda: model(images()), lambda: gist.unwrap(model), lambda: gist.merge(model)):
        with pytest.raises(RuntimeError, match=r"gist.unwrap has given this model's backbone back"):
            use()
    assert str(model).splitlines()[1] == "  unwrapped"


def test_a_copy_keeps_the_model():
    model = wrapped("vit").eval()
    expected = model(images())
    kept = copy.deepcopy(model)
    gist.unwrap(model)
    assert torch.equal(kept(images()), expected)


def test_peft_keeps_what_it_trains():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    adapted = peft.get_peft_model(backbone(), config).eval()
    before, expected = state(adapted), adapted(images())
    assert gist.unwrap(gist.wrap(adapted, gist.GistConfig(None))) is adapted
    assert state(adapted) == before
    assert torch.equal(adapted(images()), expected)
