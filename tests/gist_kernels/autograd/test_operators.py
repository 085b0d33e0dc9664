"""Sublayers, adapter and attention as PyTorch operators: compiled, exported, checkpointed."""

from __future__ import annotations

from functools import partial

import backends
import pytest
import torch
from marks import slow_where
from sublayer_cases import DROPPED, arguments, normal, rotation_of, update
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import gist_kernels as gk


@pytest.fixture(autouse=True, params=backends.serving("sublayers"))
def served_by(request):
    name, asked = request.param, map(str, request.node.callspec.params.values())
    if name == "triton" and not any(each.startswith(("mlp", "adapter")) for each in asked):
        pytest.skip("its attention takes half types; a trace in float32 has PyTorch's operators")
    with gk.use_backend(name), torch.device(backends.device_of(name)):
        yield name


class Case:
    """A call of an operation, as a function of x and of all that may be trained."""

    def __init__(self, operation, trees, frozen=(), **options):
        flat, self.spec = tree_flatten(trees)
        ids = {id(t) for t in tree_flatten(frozen)[0]}
        self.flat = [
            t.clone().requires_grad_() if isinstance(t, torch.Tensor) and id(t) not in ids else t
            for t in flat
        ]
        self.leaves = [t for t in self.flat if isinstance(t, torch.Tensor) and t.requires_grad]
        self.operation = partial(operation, **options)

    def __call__(self, *leaves):
        given = iter(leaves)
        flat = [next(given) if any(t is leaf for leaf in self.leaves) else t for t in self.flat]
        return self.operation(*tree_unflatten(flat, self.spec))

    def results(self, call=None):
        """Value and every gradient."""
        out = (call or self)(*self.leaves)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, upstream)]


def case(name, dtype=torch.float32, **shape):
    x, norm, attention, mlp, adapter = arguments(dtype, **shape)
    changed = partial(update, dtype=dtype, device=x.device, rank=3, scale=True)
    scale, dropped = normal(48, dtype=dtype), DROPPED.to(x)
    rotation = rotation_of((2, 15), 16, half=False, heads=3, device=x.device)
    turned = attention._replace(rotation=rotation)
    plain = [
        (attention.qkv_weight, attention.proj_weight, rotation),
        (mlp.fc1_weight, mlp.fc2_weight, scale),
    ]
    tuned = attention._replace(
        qkv_update=changed(144, 48), proj_update=changed(48, 48), layer_scale=scale
    )
    tuned_mlp = mlp._replace(
        fc1_update=changed(80, 48), fc2_update=changed(48, 80), layer_scale=scale
    )
    gated = arguments(dtype, gated=True, device=x.device, **shape)[3]
    tuned_gated = gated._replace(
        fc1_update=changed(160, 48), fc2_update=changed(48, 80), layer_scale=scale
    )
    normed = gated._replace(norm=gk.NormWeights(normal(80, dtype=dtype), None, 1e-5))
    plain.append(normed.norm.weight)
    plain.append((gated.fc1_weight, gated.fc2_weight))
    attended = partial(Case, gk.adapter_attention, frozen=plain)
    perceived = partial(Case, gk.adapter_mlp, frozen=plain)
    return {
        "attention": lambda: attended((x, norm, attention, adapter)),
        "first block": lambda: attended((x, norm, attention, adapter), grad_tokens=(1, 1)),
        "no adapter": lambda: attended((x, norm, attention), drop_path=dropped),
        "updates": lambda: attended((x, norm, tuned, adapter)),
        "few": lambda: attended((x, norm, attention, adapter), num_queries=2),
        "few, updates": lambda: attended((x, norm, tuned), num_queries=1, drop_path=dropped),
        "rotated": lambda: attended((x, norm, turned, adapter)),
        "rotated first block": lambda: attended((x, norm, turned), grad_tokens=(1, 3)),
        "rotated few": lambda: attended((x, norm, turned, adapter), num_queries=4),
        "rotated prefix": lambda: Case(
            gk.prefix_attention,
            (normal(2, 19, 144, dtype=dtype),),
            num_heads=3,
            num_queries=4,
            rotation=rotation._replace(half=True),
        ),
        "mlp": lambda: perceived((x, norm, mlp, adapter)),
        "mlp, no adapter": lambda: perceived((x, norm, mlp), drop_path=dropped),
        "mlp, updates": lambda: perceived((x, norm, tuned_mlp, adapter)),
        "mlp, gated": lambda: perceived((x, norm, gated, adapter)),
        "mlp, gated, normed": lambda: perceived((x, norm, normed, adapter)),
        "mlp, gated, updates": lambda: perceived((x, norm, tuned_gated), drop_path=dropped),
        "adapter": lambda: Case(
            lambda x, r, *w: gk.adapter(x, *w, residual=r), (x, 2 * x, *adapter[:4])
        ),
        "adapter onto x": lambda: Case(
            lambda x, *w: gk.adapter(x, *w, residual=x, scale=0.7), (x, *adapter[:4])
        ),
        "prefix": lambda: Case(
            gk.prefix_attention, (normal(2, 19, 144, dtype=dtype),), num_heads=3
        ),
        "prefix of few": lambda: Case(
            gk.prefix_attention, (normal(2, 19, 144, dtype=dtype),), num_heads=3, num_queries=2
        ),
        "padded prefix": lambda: Case(
            gk.prefix_attention,
            (normal(2, 19, 144, dtype=dtype),),
            num_heads=3,
            num_queries=9,
            rotation=rotation,
            lengths=torch.tensor([19, 7]),
        ),
    }[name]()


NAMES = (
    "attention", "first block", "no adapter", "updates", "few", "few, updates", "mlp",
    "mlp, no adapter", "mlp, updates", "mlp, gated", "mlp, gated, normed",
    "mlp, gated, updates", "adapter", "adapter onto x", "prefix", "prefix of few",
    "rotated", "rotated first block", "rotated few", "rotated prefix", "padded prefix",
)  # fmt: skip


class Recording(TorchDispatchMode):
    """Notes the calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gist_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return [func._opname for func, _ in self.calls]


def compiled(call, **options):
    """Compiled without a graph break, and the names of our operators in its graphs."""
    names = []

    def note(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        names.append([target for target in targets if target.startswith("gist_kernels.")])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend=note, **options), names


@pytest.mark.parametrize(
    "name",
    [
        *("first block", "updates", "few", "few, updates", "mlp, updates", "mlp, gated"),
        *("mlp, gated, normed", "mlp, gated, updates", "adapter", "adapter onto x"),
        *("prefix of few", "rotated", "rotated first block", "rotated few", "rotated prefix"),
        "padded prefix",
    ],
)
def test_opcheck(name):
    each = case(name)
    with Recording() as seen:
        each.results()
    (forward, values), (backward, given) = seen.calls
    assert backward._opname == f"{forward._opname}_backward"
    torch.library.opcheck(forward, values)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
    torch.library.opcheck(backward, tuple(detached), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", slow_where(lambda name: name not in ("few, updates", "mlp, gated"), NAMES)
)
def test_compiled_is_eager_to_the_bit(name, dtype, served_by):
    each = case(name, dtype)
    call, names = compiled(each)
    expected = each.results()
    for found, truth in zip(each.results(call), expected, strict=True):
        assert torch.equal(found, truth)
    (targets,) = names
    assert [target.partition(f"{served_by}_")[1] for target in targets] == [f"{served_by}_"]


@pytest.mark.slow
def test_compiled_under_autocast_is_eager_to_the_bit():
    for name in ("attention", "few", "mlp", "mlp, gated", "mlp, gated, normed"):
        each = case(name)
        device = each.leaves[0].device.type

        def mixed(*leaves, each=each, device=device):
            with torch.autocast(device, torch.bfloat16):
                return each(*leaves)

        call, names = compiled(mixed)
        for found, truth in zip(each.results(call), each.results(mixed), strict=True):
            assert torch.equal(found, truth)
        assert len(names[0]) == 1


@pytest.mark.parametrize(
    "name",
    slow_where(
        lambda name: name != "attention",
        ["attention", "first block", "few", "mlp", "mlp, gated", "adapter", "prefix", "rotated"],
    ),
)
def test_one_graph_takes_batches_of_any_size(name):
    each = case(name)
    operation, x = each.operation, each.flat[0].detach()
    rest = each.flat[1:]

    def of(x):
        if name == "adapter":
            return gk.adapter(x, *rest[1:], residual=2 * x)
        return operation(*tree_unflatten([x, *rest], each.spec))

    call, names = compiled(of, dynamic=None)
    for batch in (2, 3, 5):
        inputs = torch.randn(batch, *x.shape[1:]).to(x).requires_grad_()
        expected = torch.autograd.grad(of(inputs).square().sum(), inputs)
        assert torch.equal(call(inputs), of(inputs))
        assert torch.equal(torch.autograd.grad(call(inputs).square().sum(), inputs)[0], expected[0])
    assert len(names) == 2  # of the first size, and of any


@pytest.mark.slow
@pytest.mark.parametrize("which", ["x", "one weight", "nothing"])
def test_only_gradients_that_are_needed_are_asked_for(which):
    for name in ("attention", "first block", "few", "mlp", "mlp, gated", "adapter onto x"):
        each = case(name)
        kept = {"x": each.leaves[:1], "one weight": each.leaves[-1:], "nothing": []}[which]
        for leaf in each.leaves:
            leaf.requires_grad_(any(leaf is one for one in kept))
        call, _ = compiled(each)
        out, expected = call(*each.leaves), each(*each.leaves)
        assert torch.equal(out, expected)
        assert out.requires_grad == bool(kept)
        if kept:
            found = torch.autograd.grad(out.square().sum(), kept)
            truth = torch.autograd.grad(expected.square().sum(), kept)
            assert torch.equal(found[0], truth[0])


@pytest.mark.slow
def test_attention_that_no_kernel_serves_is_composed_of_operators_of_pytorch(served_by):
    if served_by == "triton":
        pytest.skip("it takes no float64")
    for name in ("attention", "few", "prefix", "rotated", "rotated prefix", "padded prefix"):
        each = case(name, torch.float64)
        call, names = compiled(each)
        for found, truth in zip(each.results(call), each.results(), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)
        assert names == [[]]


def test_selective_checkpointing_finds_operators_by_name(served_by):
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    adapter.up_weight.requires_grad_()
    x.requires_grad_()
    saved = getattr(torch.ops.gist_kernels, f"{served_by}_adapter_attention").default

    def block(x):
        x = gk.adapter_attention(x, norm, attention, adapter)
        return gk.adapter_mlp(x, norm, mlp, adapter)

    def policy(ctx, operator, *args, **kwargs):
        keep = operator is saved
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(x):
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    leaves = x, adapter.up_weight
    expected = torch.autograd.grad(block(x).square().sum(), leaves)
    with Recording() as seen:
        found = torch.autograd.grad(checkpointed(x).square().sum(), leaves)
    for gradient, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, truth)
    again = [f"{served_by}_adapter_{name}" for name in ("mlp", "mlp_backward")]
    assert seen.names.count(f"{served_by}_adapter_attention") == 1
    assert [seen.names.count(name) for name in again] == [2, 1]


def test_an_exported_program_holds_the_operators(served_by):
    class Block(torch.nn.Module):
        def forward(self, x):
            return gk.adapter_mlp(gk.adapter_attention(x, *weights), norm, mlp)

    x, norm, attention, mlp, adapter = arguments(torch.float32)
    weights = norm, attention, adapter
    batch = torch.export.Dim("batch")
    program = torch.export.export(Block(), (x,), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes]
    for name in ("attention", "mlp"):
        assert f"gist_kernels.{served_by}_adapter_{name}.default" in names
    other = torch.randn(5, *x.shape[1:]).to(x)
    assert torch.equal(program.module()(other), Block()(other))


def test_onnx_gets_operators_of_pytorch(monkeypatch):
    """A runtime without this package runs it."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for name in ("attention", "few", "mlp", "adapter", "prefix"):
        each = case(name)

        class Call(torch.nn.Module):
            def forward(self, *leaves, each=each):
                return each(*leaves)

        leaves = tuple(leaf.detach() for leaf in each.leaves)
        program = torch.export.export(Call(), leaves)
        assert not any("gist_kernels" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(*leaves), each(*leaves), rtol=1e-4, atol=1e-4)


def test_operators_refuse_second_derivatives():
    for name in ("attention", "few", "mlp", "adapter", "prefix"):
        each = case(name)
        torch._dynamo.reset()
        call = torch.compile(each, fullgraph=True, backend="eager")
        (first,) = torch.autograd.grad(
            call(*each.leaves).square().sum(), each.leaves[:1], create_graph=True
        )
        with pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'):
            first.sum().backward()


def test_tensors_without_memory_get_the_right_shapes():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name in NAMES:
            each = case(name)
            fakes = [mode.from_tensor(leaf.detach()) for leaf in each.leaves]
            out = each(*fakes)
            assert type(out) is FakeTensor
            assert out.shape[0] == 2


def test_other_kinds_of_tensors_keep_operators_of_pytorch():
    class Named(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen += func is torch.nn.functional.layer_norm
            return super().__torch_function__(func, types, args, kwargs)

    x, norm, attention, mlp, adapter = arguments(torch.float32)
    with Recording() as seen:
        gk.adapter_mlp(x.as_subclass(Named), norm, mlp, adapter)
        gk.adapter_attention(x.as_subclass(Named), norm, attention, adapter)
    assert seen.names == []
    assert Named.seen == 2


def test_the_counter_of_flops_sees_the_matmuls():
    for name in ("attention", "mlp"):
        each, totals = case(name), []
        for backend in ("auto", "reference"):
            with gk.use_backend(backend), FlopCounterMode(display=False) as counter:
                each.results()
            totals.append(counter.get_total_flops())
        assert totals[0] == totals[1] > 0


def test_a_compiled_transform_gives_the_gradient():
    x, norm, _, mlp, adapter = arguments(torch.float32)

    def loss_of(x):
        return gk.adapter_mlp(x, norm, mlp, adapter).square().sum()

    call, _ = compiled(torch.func.grad(loss_of))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(leaf), leaf)
    torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-4)
