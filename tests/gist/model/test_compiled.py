"""Wrapped models under torch.compile: the fused sublayers, without a graph break."""

from __future__ import annotations

import pytest
import torch
from marks import slow_where
from models import images, wrapped

import gist
import gist_kernels as gk

TARGET = torch.tensor([1, 4])
METHODS = {
    "adapter": gist.Adapter(scale=0.7),
    "adapter, parallel": gist.Adapter(placement="parallel"),
    "adaptformer": gist.AdaptFormer(dropout=0.0),
    "lora": gist.LoRA(rank=2, targets=("q", "v", "fc1")),
    "ssf": gist.SSF(),
    "bitfit": gist.BitFit(),
    "difffit": gist.DiffFit(),
    "vpt": gist.VPT(num_tokens=2),
    "none": None,
}


@pytest.fixture(autouse=True)
def by_kernels():
    """Where no kernels serve, there are no operators to look for."""
    if gk.backend.serving("sublayers", "cpu", torch.float32) == "reference":
        pytest.skip("no backend serves the sublayers here")


def model_of(method, *, use_gist=True, **options):
    config = gist.GistConfig(method, gist=use_gist, token_dropout=0.0)
    return wrapped("dinov2", config, **({"depth": 2} | options))


def compiled(model, backend="eager"):
    """The model, compiled without a graph break, and each graph's number of fused sublayers."""
    graphs = []

    def note(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        graphs.append(sum("_adapter_attention" in n or "_adapter_mlp" in n for n in names))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=note), graphs


def results(model, call, autocast=False, batch=2):
    """Logits, and in training every gradient."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(images(batch))
        loss = gist.GistLoss()(out, TARGET.repeat(batch)[:batch]) if model.training else None
    logits = list(out) if isinstance(out, tuple) else [out]
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [] if loss is None else torch.autograd.grad(loss, parameters)
    return [t.detach() for t in logits], gradients


def check(model, call, **options):
    torch.testing.assert_close(
        results(model, call, **options), results(model, model, **options), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", slow_where(lambda name: name != "adapter", METHODS))
def test_compiled_runs_fused_and_gives_what_eager_gives(name):
    model = model_of(METHODS[name])
    call, graphs = compiled(model, "aot_eager")
    for training in (True, False):
        model.train(training)
        check(model, call)
    assert graphs == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter", "lora", "ssf"])
def test_compiled_runs_fused_under_autocast_without_a_token(name):
    model = model_of(METHODS[name], use_gist=False).train()
    call, graphs = compiled(model, "aot_eager")
    check(model, call, autocast=True)
    assert graphs == [4]


@pytest.mark.slow
def test_compiled_factors_run_fused_in_float32():
    """Under autocast, gradients of the factors that layers share differ by bf16 rounding."""
    model = model_of(gist.FacT(rank=3, dropout=0.0)).train()
    call, graphs = compiled(model, "aot_eager")
    check(model, call)
    assert graphs == [4]


@pytest.mark.slow
def test_one_graph_takes_batches_of_any_size():
    model = model_of(gist.Adapter()).train()
    call, graphs = compiled(model)
    for batch in (2, 3, 5, 4):
        check(model, call, batch=batch)
    assert graphs == [4, 4]


@pytest.mark.slow
def test_drop_path_and_token_dropout_draw_what_eager_draws():
    config = gist.GistConfig(gist.Adapter(), token_dropout=0.3)
    model = wrapped("vit", config, depth=2, drop_path_rate=0.4).train()
    call, graphs = compiled(model)
    check(model, call)
    assert graphs == [4]


@pytest.mark.slow
def test_hooks_of_others_run_whenever_they_are_added():
    model = model_of(gist.Adapter()).train()
    call, graphs = compiled(model)
    check(model, call)
    block, embedding = model.backbone.blocks[1], model.backbone.patch_embed
    for part in (block.mlp.fc1, embedding):
        before = results(model, call)
        handle = part.register_forward_hook(lambda module, args, output: 1.5 * output)
        check(model, call)
        assert not torch.equal(results(model, call)[0][0], before[0][0])
        handle.remove()
        check(model, call)
    assert graphs == [4, 2, 0]


@pytest.mark.slow
def test_what_is_trained_may_change():
    model = model_of(gist.Adapter()).train()
    call, graphs = compiled(model)
    check(model, call)
    weight, up = model.backbone.blocks[0].mlp.fc1.weight, model.method[1].up.weight
    weight.requires_grad_(True)  # the fused sublayer has no gradient of it
    check(model, call)
    weight.requires_grad_(False)
    up.requires_grad_(False)
    check(model, call)
    assert graphs == [4, 2, 4]


@pytest.mark.slow
def test_a_replaced_part_is_seen():
    model = model_of(gist.Adapter()).eval()
    call, graphs = compiled(model)
    check(model, call)
    mlp = model.backbone.blocks[0].mlp
    mlp.act = torch.nn.SiLU()
    check(model, call)
    mlp.forward = lambda x: -x
    check(model, call)
    norm = model.backbone.norm
    model.backbone.forward_features = lambda x, **_: norm(x.reshape(len(x), -1, 48))
    check(model, call)
    assert graphs == [4, 4, 2, 0]


@pytest.mark.slow
def test_checkpointed_blocks_stay_fused():
    model = model_of(gist.Adapter()).train()
    expected = results(model, model)
    model.backbone.set_grad_checkpointing(True)
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(model, call), expected, rtol=1e-5, atol=1e-5)


def test_explain_says_the_same_of_a_compiled_model():
    model = model_of(gist.Adapter())
    said = gist.explain(torch.compile(model))
    assert said == gist.explain(model)
    assert said.startswith("blocks 0 to 1: fused sublayers")
