"""A model elsewhere: torch.export, ONNX run by onnxruntime, TorchScript, and pickle."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from models import FAMILIES, images, made, wrapped

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


@pytest.mark.parametrize("method", [gist.Adapter(), gist.VPT(num_tokens=2)])
@pytest.mark.parametrize("family", [name for name in FAMILIES if "transformers" in name])
def test_transformers_models_are_exported_with_the_added_tokens(family, method):
    backbone, pixels = made(family)
    model = gist.wrap(backbone, gist.GistConfig(method)).eval()
    program = torch.export.export(model, (pixels,), dynamic_shapes=({0: BATCH},))
    more = torch.cat((pixels, pixels.flip(3)))
    torch.testing.assert_close(program.module()(more), model(more), rtol=0, atol=5e-6)


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


# ---- TorchScript -------------------------------------------------------------------------------

METHODS = [
    gist.Adapter(), gist.AdaptFormer(), gist.LoRA(), gist.VPT(num_tokens=2), gist.SSF(),
    gist.FacT(), gist.RepAdapter(), gist.BitFit(), gist.Convpass(), gist.DiffFit(), None,
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_torchscript_gives_the_same_logits_of_any_batch(method, tmp_path):
    model = wrapped("registers", gist.GistConfig(method)).eval()
    expected = [model(images(batch)) for batch in (1, 2, 5)]
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    scripted = torch.jit.load(tmp_path / "model.pt")
    for batch, logits in zip((1, 2, 5), expected, strict=True):
        torch.testing.assert_close(scripted(images(batch)), logits, rtol=0, atol=5e-6)
        assert torch.equal(model(images(batch)), logits)


def test_torchscript_raises_where_its_graph_does_not_hold():
    model = wrapped("vit")
    with pytest.raises(RuntimeError, match="in evaluation mode"):
        torch.jit.script(model.train())
    scripted = torch.jit.script(model.eval())
    with pytest.raises(torch.jit.Error, match="of another image size"):
        scripted(images(size=40))
    with pytest.raises(torch.jit.Error, match="of evaluation mode"):
        scripted.train()(images())


# ---- pickle ------------------------------------------------------------------------------------

FRESH = """
import pathlib, sys, torch
for folder in pathlib.Path(sys.argv[1]).iterdir():
    model = torch.load(folder / "model.pt", weights_only=False)
    pixels, expected, layers, both = torch.load(folder / "expected.pt")
    assert torch.equal(model(pixels), expected)
    found = model.forward_intermediates(pixels, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, layers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.train()(pixels), both, strict=True))
    import gist
    gist.save(model, folder)
    backbone = gist.unwrap(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
"""


def test_whole_models_are_read_in_a_fresh_process(tmp_path):
    methods = [
        gist.AdaptFormer(dropout=0.0),
        *METHODS[2:5],
        gist.FacT(dropout=0.0),
        gist.RepAdapter(dropout=0.0),
        gist.Convpass(dropout=0.0),
        gist.DiffFit(),
    ]
    for number, method in enumerate([*methods, (gist.LoRA(), gist.BitFit())]):
        model = wrapped("dinov2", gist.GistConfig(method, token_dropout=0.0)).eval()
        logits = model(images())
        assert torch.equal(pickle.loads(pickle.dumps(model))(images()), logits)
        (tmp_path / str(number)).mkdir()
        torch.save(model, tmp_path / str(number) / "model.pt")
        layers = model.forward_intermediates(images(), intermediates_only=True)
        expected = (images(), logits, layers, tuple(model.train()(images())))
        torch.save(expected, tmp_path / str(number) / "expected.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True)
