"""The formats of an export. Each writes a run's model into a folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch

import gist_kernels
from gist.backbones import hf_folder
from gist.backbones.create import input_size
from gist.data import Transforms
from gist.files import naming, to_json
from gist.model.merge import merge
from gist.model.wrapped import GistModel

OPSET = 18
EMBEDDED_BYTES = 2**30
"""Above this size an ONNX file's weights lie beside it: its format ends at 2 GiB."""

Write = Callable[[Path], None]


class Exported(NamedTuple):
    """What is written.

    Attributes:
        model: the run's, on the CPU, in evaluation mode.
        name: the backbone's, as the run's config has it.
        transforms: the run's.
        classes: names, in the order of the logits.
    """

    model: GistModel
    name: str
    transforms: Transforms
    classes: Sequence[str]


class Format(NamedTuple):
    """One format.

    Attributes:
        title: what the model becomes.
        packages: what has to be installed to run it, as pip takes it.
        about: Markdown that describes the files.
        prepare: returns what writes the model into a folder. It raises for a model that can't have
            this format, and for a missing package.
    """

    title: str
    packages: str
    about: str
    prepare: Callable[[Exported], Write]


# ---- torch.export and ONNX ---------------------------------------------------------------------


def _program(exported: Exported) -> torch.export.ExportedProgram:
    """The graph of PyTorch's own operators from images (batch, 3, S, S) to logits."""
    size = exported.transforms.img_size
    images = torch.zeros(2, 3, size, size)  # a batch of 1 would become a constant
    reference: Any = gist_kernels.use_backend("reference")
    with torch.no_grad(), reference:
        return torch.export.export(
            exported.model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )


def _prepare_exported(exported: Exported) -> Write:
    return partial(_write_exported, exported)


def _write_exported(exported: Exported, folder: Path) -> None:
    # In memory first: on a full disk, PyTorch's own writer raises an error without a reason.
    buffer = io.BytesIO()
    torch.export.save(_program(exported), buffer)
    with naming(folder / "model.pt2"):
        (folder / "model.pt2").write_bytes(buffer.getbuffer())


def _prepare_onnx(exported: Exported) -> Write:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--format onnx needs {error.name}: pip install 'gist-kernels[export]'"
        ) from error
    return partial(_write_onnx, exported)


def _write_onnx(exported: Exported, folder: Path) -> None:
    program = torch.onnx.export(
        _program(exported),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    parameters = sum(p.nbytes for p in exported.model.parameters())
    with naming(folder / "model.onnx"):
        program.save(folder / "model.onnx", external_data=parameters > EMBEDDED_BYTES)


# ---- timm --------------------------------------------------------------------------------------


def _prepare_timm(exported: Exported) -> Write:
    """Merge the model; a ValueError tells why it can't be a checkpoint of timm."""
    if exported.name.startswith(hf_folder.PREFIX):
        raise ValueError(
            "--format timm is for timm's backbones; gist merge writes a folder of transformers"
        )
    try:
        merged = merge(exported.model)
    except ValueError as error:
        raise ValueError(
            f"--format timm needs a model that merges into a plain backbone: {error}. Formats onnx "
            "and exported take every method"
        ) from error
    with torch.device("meta"):
        plain = timm.create_model(_architecture(exported.name), **_arguments(merged))
    own, known = merged.state_dict(), plain.state_dict()
    strange = [n for n, t in own.items() if n not in known or known[n].shape != t.shape]
    if strange or len(own) != len(known):
        raise ValueError(
            f"--format timm: merging gave the backbone parameters that timm's {exported.name} "
            f"lacks, such as {strange[:2]}; formats onnx and exported take every method"
        )
    return partial(_write_timm, exported, merged)


def _architecture(name: str) -> str:
    return name.partition(".")[0]


def _arguments(merged: Any) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that make the merged model."""
    arguments = {"num_classes": merged.num_classes, "img_size": input_size(merged)}
    if hasattr(merged, "num_reg_tokens"):  # the Gist token may have become one of them
        arguments["reg_tokens"] = merged.num_reg_tokens
    return arguments


def _write_timm(exported: Exported, merged: Any, folder: Path) -> None:
    arguments = _arguments(merged)
    evaluation = exported.transforms.evaluation
    own = merged.pretrained_cfg
    config = {
        "architecture": _architecture(exported.name),
        "num_classes": arguments.pop("num_classes"),
        "num_features": merged.num_features,
        "label_names": list(exported.classes),
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "gist",
            "custom_load": False,
            "fixed_input_size": own.get("fixed_input_size", True),
            **{key: own[key] for key in ("first_conv", "classifier") if key in own},
            **evaluation,
            "num_classes": merged.num_classes,
        },
    }
    for name, content in (
        ("model.safetensors", safetensors.torch.save(merged.state_dict())),
        ("config.json", to_json(config)),
    ):
        with naming(folder / name):
            (folder / name).write_bytes(content)


FORMATS = {
    "onnx": Format(
        "ONNX",
        "onnxruntime numpy pillow",
        f"`model.onnx` has opset {OPSET}.",
        _prepare_onnx,
    ),
    "exported": Format(
        "a program of torch.export",
        "torch numpy pillow",
        f"`model.pt2` was saved by PyTorch {torch.__version__}: an older one may not load it. "
        'In Python: `torch.export.load("model.pt2").module()`.',
        _prepare_exported,
    ),
    "timm": Format(
        "a checkpoint of timm",
        "timm numpy pillow",
        "`model.safetensors` and `config.json` have the layout of timm's models on Hugging Face's "
        f"hub, written for timm {timm.__version__}. The method is merged into the weights. "
        'In Python: `timm.create_model("local-dir:FOLDER", pretrained=True)`.',
        _prepare_timm,
    ),
}
