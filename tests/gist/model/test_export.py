"""The evaluation model as a graph: torch.export, and ONNX run by onnxruntime."""

from __future__ import annotations

import pytest
import torch
from models import images, wrapped

import gist

BATCH = torch.export.Dim("batch")


@pytest.mark.parametrize(
    "method", [gist.Adapter(), gist.LoRA(), gist.VPT(num_tokens=2), gist.SSF()]
)
def test_exported_programs_give_the_same_logits(method):
    model = wrapped("dinov2", gist.GistConfig(method)).eval()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: BATCH},))
    for batch in (1, 5):
        expected = model(images(batch))
        torch.testing.assert_close(program.module()(images(batch)), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", [gist.Adapter(), (gist.LoRA(), gist.VPT(num_tokens=2))])
def test_onnx_gives_the_same_logits(method, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = wrapped("registers", gist.GistConfig(method)).eval()
    torch.onnx.export(
        model, (images(),), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: BATCH},)
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 5):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images(batch).numpy()})
        expected = model(images(batch))
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)
