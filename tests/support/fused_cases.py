"""Backbones as fused sublayers, held to their own forward and to float64."""

from __future__ import annotations

import copy

import torch
from draws import geometric_mean
from models import images, wrapped

import gist
import gist_kernels
from gist_kernels.kernels.triton import DEVICE_TYPES

PLAIN_CONFIGS = {
    "gist": gist.GistConfig(gist.Adapter(rank=4, scale=0.7), token_dropout=0.0),
    "token alone": gist.GistConfig(None, token_dropout=0.0),
    "adapter alone": gist.GistConfig(gist.Adapter(rank=4, scale=0.7), gist=False),
    "head alone": gist.GistConfig(None, gist=False),
}
CONFIGS = PLAIN_CONFIGS | {
    "parallel adapters": gist.GistConfig(
        gist.Adapter(rank=4, scale=0.7, placement="parallel"), token_dropout=0.0
    ),
    "adaptformer": gist.GistConfig(gist.AdaptFormer(rank=8, dropout=0.0), token_dropout=0.0),
    "prompts": gist.GistConfig(gist.VPT(num_tokens=3), token_dropout=0.0),
    "lora": gist.GistConfig(
        gist.LoRA(rank=3, targets=("q", "v", "proj", "fc1", "fc2")), token_dropout=0.0
    ),
    "ssf": gist.GistConfig(gist.SSF(), token_dropout=0.0),
    "fact": gist.GistConfig(gist.FacT(rank=3, dropout=0.0), token_dropout=0.0),
    "fact, tk": gist.GistConfig(gist.FacT(form="tk", rank=3, dropout=0.0), token_dropout=0.0),
    "difffit": gist.GistConfig(gist.DiffFit(), token_dropout=0.0),
    "biases, norms, adapter, keys": gist.GistConfig(
        (gist.BitFit(), gist.LayerNormTuning(), gist.Adapter(rank=4), gist.LoRA(targets=("k",))),
        token_dropout=0.0,
    ),
    "shallow prompts, adapter, two tokens": gist.GistConfig(
        (gist.VPT(num_tokens=3, deep=False), gist.Adapter(rank=4)), token_dropout=0.0, num_tokens=2
    ),
}


def logits_of(model, pixels, seed=3):
    torch.manual_seed(seed)
    out = model(pixels)
    return out if isinstance(out, torch.Tensor) else torch.stack(out)


def gradients_of(model, logits):
    model.zero_grad()
    logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def results(model, pixels):
    logits = logits_of(model, pixels)
    return logits.detach(), gradients_of(model, logits)


def compare_with_own_forward(name, config, dtype, own_forward, backend="auto", device="cpu"):
    options = {"drop_path_rate": 0.5} if name == "drop_path" else {}
    kind = "vit" if name == "drop_path" else name
    model = wrapped(kind, CONFIGS[config], **options).to(device).train()
    exact = copy.deepcopy(model).double()
    # An interpreter takes seconds an image. Random updates of low rank make much of any rounding.
    count = 56 if "lora" in config else 14
    draws = (
        images(3).split(1) if DEVICE_TYPES[0] == "cpu" else images(count * 4).to(device).split(4)
    )
    autocast = dtype == "autocast"
    dtype = torch.float32 if autocast else dtype
    model.backbone.to(dtype)

    def results(model, pixels, autocast=autocast):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = logits_of(model, pixels)
        return out.detach(), gradients_of(model, out)

    with gist_kernels.use_backend(backend):
        fused = [results(model, pixels.to(dtype)) for pixels in draws]
        assert name == "qk_norm" or "fused" in gist.explain(model)
    own_forward()
    assert "fused" not in gist.explain(model)
    plain = [results(model, pixels.to(dtype)) for pixels in draws]
    if name == "drop_path":  # its draws differ between dtypes
        torch.testing.assert_close(fused[0][0], plain[0][0], rtol=0.05, atol=0.05)
        return
    truth = [results(exact, pixels.double(), autocast=False) for pixels in draws]

    def errors(found):
        """Relative, of the logits and of each parameter's gradient, (draws, tensors)."""
        pairs = (
            [(logits, true_logits), *((of[name].double(), true[name]) for name in true)]
            for (logits, of), (true_logits, true) in zip(found, truth, strict=True)
            if of.keys() == true.keys()
        )
        return torch.tensor([[(g - t).norm() / t.norm() for g, t in draw] for draw in pairs])

    # Either path rounds in a dozen chained places: which one is closer to the truth in a single
    # tensor or draw is luck, and only in all of them together a matter of the path. Geometric means
    # over draws, as a ReLU that one rounding flips would be most of any other.
    ours, general = errors(fused), errors(plain)
    assert len(ours) == len(general) == len(draws)
    ratios = ours.norm(dim=1) / general.norm(dim=1)
    assert geometric_mean(ratios) <= 1.5, ratios
    ulp = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    ours, general = (geometric_mean(found.clamp_min(0.1 * ulp)) for found in (ours, general))
    assert (ours <= 2 * general + 8 * ulp).all(), (ours, general)
