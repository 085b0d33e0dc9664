"""A training step, forward and backward, of a ViT with adapters and a Gist token.

The floor is the matmuls and attentions that every exact step needs. They are timed by themselves,
once by the fastest library that this package uses and once by PyTorch's own operators. bf16 and
fp16 mean autocast, over float32 weights.

Models of other libraries, those with rotary positions and text models are compared with their
library's own forward, which adapters in plain operators and the token join by hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import gist
import gist_kernels as gk
from bench.loss import released as released_loss
from bench.machine import Linear, linear_of
from bench.measure import Call, Case, mismatch

SIZES = {
    "cpu": (("vit_small_patch16_224", 8), ("vit_base_patch16_224", 4)),
    "cuda": (
        ("vit_base_patch16_224", 32),
        ("vit_base_patch16_224", 256),
        ("vit_small_patch16_224", 32),
        ("vit_small_patch16_224", 256),
    ),
}
OTHERS = {
    "cpu": (
        ("vit_small_patch16_dinov3", 8),
        ("transformers ViT-B/16", 8),
        ("transformers BERT-base", 16),
    ),
    "cuda": (
        ("vit_small_patch16_dinov3", 32),
        ("transformers ViT-B/16", 32),
        ("transformers BERT-base", 32),
    ),
}
CLASSES = 100
LEAST_WORDS, WORDS = 8, 64
CONFIG = gist.GistConfig(method=gist.Adapter(rank=4, scale=0.1), token_dropout=0.0)


class Released(nn.Module):
    """The published structure in plain operators: adapters, if any, are modules beside each
    sublayer, the Gist token joins by concatenation, and every token goes through every block."""

    def __init__(self, backbone: VisionTransformer, model: gist.GistModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.token = nn.Parameter(model.token.weight.detach().clone())
        self.adapters = nn.ModuleList()
        for adapter in model.method or ():
            copy = nn.Sequential(
                nn.Linear(backbone.embed_dim, adapter.down.out_features),
                nn.GELU(),
                nn.Linear(adapter.down.out_features, backbone.embed_dim),
            )
            copy[0].load_state_dict(adapter.down.state_dict())
            copy[2].load_state_dict(adapter.up.state_dict())
            self.adapters.append(copy)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        backbone = self.backbone
        patches = backbone.patch_embed(images)
        first = backbone.cls_token.expand(len(images), -1, -1)
        x = torch.cat((first, patches), dim=1) + backbone.pos_embed
        x = torch.cat((x[:, :1], self.token.expand(len(images), -1, -1), x[:, 1:]), dim=1)
        for index, block in enumerate(backbone.blocks):
            for sublayer, norm in ((block.attn, block.norm1), (block.mlp, block.norm2)):
                update = sublayer(norm(x))
                if self.adapters:
                    update = update + 0.1 * self.adapters[index](x)
                x = x + update
        x = backbone.norm(x)
        return backbone.head(x[:, 0]), backbone.head(x[:, 1])


def absent(device: torch.device) -> dict[str, str]:
    return {}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, images in SIZES[device.type]:
        torch.compiler.reset()
        yield _case(name, images, dtype, device)
    for name, images in OTHERS[device.type]:
        if name.startswith("transformers") and find_spec("transformers") is None:
            continue
        torch.compiler.reset()
        yield _library_case(name, images, dtype, device)


def _step(
    model: nn.Module, inputs: dict[str, torch.Tensor], loss: Call, dtype: torch.dtype
) -> Call:
    trained = [p for p in model.parameters() if p.requires_grad]
    half = dtype in (torch.bfloat16, torch.float16)

    def run() -> object:
        with torch.autocast(trained[0].device.type, dtype, enabled=half):
            value = loss(model(**inputs))
        return torch.autograd.grad(value, trained)

    return run


def _backbone(name: str) -> nn.Module:
    if not name.startswith("transformers"):
        return timm.create_model(name, num_classes=CLASSES)
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    model: nn.Module
    if "BERT" in name:
        dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(num_labels=CLASSES, **dry))
    else:
        model = ViTForImageClassification(ViTConfig(num_labels=CLASSES))
    return model


def _inputs(name: str, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Images of 224 pixels, or texts of 8 to 64 words, padded on the right."""
    if "BERT" not in name:
        return {"images": torch.randn(batch, 3, 224, 224, device=device)}
    lengths = torch.randint(LEAST_WORDS, WORDS + 1, (batch, 1), device=device)
    words = torch.randint(1000, 30_000, (batch, WORDS), device=device)
    mask = (torch.arange(WORDS, device=device) < lengths).long()
    return {"input_ids": words * mask, "attention_mask": mask}


def _library_case(name: str, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    ours = gist.wrap(_backbone(name), CONFIG).to(device).train()
    plain = copy.deepcopy(ours)
    for block in plain.family.blocks:  # which then runs by its own forward
        block.register_forward_hook(_nothing)
    assert "own forward" not in gist.explain(ours)
    assert "fused sublayers" not in gist.explain(plain)
    inputs = _inputs(name, batch, device)
    target = torch.randint(CLASSES, (batch,), device=device)
    loss = gist.GistLoss()
    half = dtype in (torch.bfloat16, torch.float16)

    def by_ours(out: gist.GistOutput) -> object:
        return loss(out, target)

    def by_released(out: gist.GistOutput) -> object:
        return released_loss(*out, target)

    def compiled(model: nn.Module) -> nn.Module:
        found: nn.Module = torch.compile(model, dynamic=False)
        return found

    def by_operators(call: Call) -> Call:
        def run() -> object:
            with gk.use_backend("reference"):  # the adapters, which hooks call
                return call()

        return run

    def parity() -> str | None:
        with torch.no_grad():
            exact = plain(**inputs)
            with torch.autocast(device.type, dtype, enabled=half):
                found, theirs = ours(**inputs), plain(**inputs)
        names = ("cls_logits", "gist_logits")
        return mismatch(
            dict(zip(names, zip(found, exact, theirs, strict=True), strict=True)), relative=1e-4
        )

    with torch.no_grad():
        tokens = ours.forward_features(**inputs).shape[1]
    return Case(
        sizes={"B": batch, "D": ours.embed_dim, "N": tokens},
        dtype=dtype,
        calls={
            "ours": _step(ours, inputs, by_ours, dtype),
            "ours, torch.compile": _step(compiled(ours), inputs, by_ours, dtype),
            "own forward": by_operators(_step(plain, inputs, by_released, dtype)),
            "own forward, torch.compile": by_operators(
                _step(compiled(plain), inputs, by_released, dtype)
            ),
        },
        parity=parity,
        graphs=("ours", "ours, torch.compile", "own forward", "own forward, torch.compile"),
    )


def _nothing(*_: object) -> None:
    return None


def _case(name: str, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    half = dtype in (torch.bfloat16, torch.float16)
    of_weights = torch.float32 if half else dtype

    def backbone() -> VisionTransformer:
        model = timm.create_model(name, num_classes=CLASSES).to(device, of_weights)
        model.load_state_dict(weights)
        return model.requires_grad_(False)

    weights = timm.create_model(name, num_classes=CLASSES).state_dict()
    ours = gist.wrap(backbone(), CONFIG).train()
    token_only = gist.wrap(backbone(), gist.GistConfig(method=None, token_dropout=0.0)).train()
    plain, plain_token = (
        Released(backbone(), model).to(device, of_weights) for model in (ours, token_only)
    )
    for model in (plain, plain_token):
        model.backbone.head.requires_grad_(True)
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=of_weights)
    target = torch.randint(CLASSES, (batch,), device=device)
    loss = gist.GistLoss()

    def step(model: nn.Module, loss: Call) -> Call:
        return _step(model, {"images": images}, loss, dtype)

    calls = {
        "ours": step(ours, lambda out: loss(out, target)),
        "ours, torch.compile": step(
            torch.compile(ours, dynamic=False), lambda out: loss(out, target)
        ),
        "released": step(plain, lambda out: released_loss(*out, target)),
        "released, torch.compile": step(
            torch.compile(plain, dynamic=False), lambda out: released_loss(*out, target)
        ),
        "released, token alone": step(plain_token, lambda out: released_loss(*out, target)),
        "ours, token alone": step(token_only, lambda out: loss(out, target)),
        "products alone": _products(plain.backbone, batch, dtype, device, linear_of(device)),
        "products alone, PyTorch's": _products(plain.backbone, batch, dtype, device, F.linear),
    }

    def parity() -> str | None:
        with torch.no_grad():
            with torch.autocast(device.type, dtype, enabled=half):
                found, theirs = ours(images), plain(images)
            exact = plain(images)
        names = ("cls_logits", "gist_logits")
        return mismatch(
            dict(zip(names, zip(found, exact, theirs, strict=True), strict=True)), relative=1e-4
        )

    return Case(
        sizes={"B": batch, "D": plain.backbone.embed_dim, "N": 198},
        dtype=dtype,
        calls=calls,
        parity=parity,
        floors={"ours": ("products alone", 1.0), "ours, token alone": ("products alone", 1.0)},
        graphs=("ours", "ours, torch.compile", "released", "released, torch.compile"),
        own=("products alone",),
    )


def _products(
    backbone: VisionTransformer,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    linear: Linear,
) -> Call:
    """The matrix products and attentions that no exact step can do without, on preallocated
    inputs: of the last block only what the two read tokens need, of the first no gradient of the
    patches, of a frozen weight none at all."""
    depth, width = len(backbone.blocks), backbone.embed_dim
    heads = backbone.blocks[0].attn.num_heads
    hidden = backbone.blocks[0].mlp.fc1.out_features
    tokens = backbone.patch_embed.num_patches + 2

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def attention(queries: int) -> Call:
        qkv, grad = tensor(batch, tokens, 3 * width), tensor(batch, queries, width)
        qkv.requires_grad_()

        def run() -> None:
            with torch.enable_grad(), gk.use_backend("reference" if linear is F.linear else "auto"):
                out = gk.prefix_attention(qkv, heads, num_queries=queries)
            torch.autograd.grad(out, qkv, grad)

        return run

    def product(rows: int, inputs: int, outputs: int, *, backward: bool = True) -> Call:
        """Forward, and the gradient of the input."""
        x, weight, grad = tensor(rows, inputs), tensor(outputs, inputs), tensor(rows, outputs)

        def run() -> None:
            linear(x, weight, None)
            if backward:
                linear(grad, weight.t(), None)

        return run

    def mlp_and_projection(rows: int) -> list[Call]:
        sizes = ((width, width), (width, hidden), (hidden, width))
        return [product(rows, inputs, outputs) for inputs, outputs in sizes]

    every, read = batch * tokens, batch * 2
    patch = backbone.patch_embed.proj.weight[0].numel()
    calls = [product(every, patch, width, backward=False)]
    calls += [product(every, width, 3 * width, backward=False), attention(tokens)]
    calls += mlp_and_projection(every)
    between = [product(every, width, 3 * width), attention(tokens), *mlp_and_projection(every)]
    calls += (depth - 2) * between
    calls += [product(every, width, 2 * width), product(read, width, width), attention(2)]
    calls += mlp_and_projection(read)

    @torch.no_grad()
    def run() -> None:
        for call in calls:
            call()

    return run
