"""What may happen around a call: a wrapped model gives what the backbone or a call alone gives."""

from __future__ import annotations

import copy
import functools
import io
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from marks import slow_where
from models import FAMILIES, METHOD_CONFIGS, ROTARY, images, made, wrapped
from timm.layers import DropPath
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gist
from gist.methods import hooks
from gist.model.attach import carry_hooks

ROTARY_METHODS = (
    "adapter", "adaptformer", "repadapter", "convpass", "bitfit", "layernorm", "difffit", "full",
    "none", "adapter, parallel", "adapter, sequential",
)  # fmt: skip
CASES = [
    *((method, family) for family in FAMILIES for method in METHOD_CONFIGS),
    *((method, family) for family in ROTARY for method in ROTARY_METHODS),
]


def selected(method, family):
    """Whether make test runs the case: every method and every family, not every pair of them."""
    return family == "timm ViT-Ti" or method in ("adapter", "several")


def over(cases):
    slow = slow_where(lambda *case: not selected(*case), cases)
    return pytest.mark.parametrize(("method", "family"), slow)


every_case = over(CASES)
not_rotary = over([case for case in CASES if case[1] not in ROTARY])


def model_of(method, family, **config):
    """A wrapped model whose every method parameter matters, and images for it."""
    backbone, pixels = made(family)
    model = gist.wrap(
        backbone, gist.GistConfig(METHOD_CONFIGS[method], token_dropout=0.0, **config)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), pixels


def holds_nothing(model):
    """Whether neither a module nor this thread holds a tensor of a call."""
    held = [
        value
        for part in model.modules()
        for value in part.__dict__.values()
        if isinstance(value, torch.Tensor)
    ]
    return not held and not hooks._thread.handed_on and not hooks._thread.asked


@every_case
def test_threads_get_what_calls_in_sequence_get(method, family):
    model, pixels = model_of(method, family)
    inputs = [pixels + index for index in range(6)]
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    torch.set_num_threads(1)  # others would sum in another order
    sys.setswitchinterval(1e-5)
    try:
        with torch.no_grad():
            expected = [model(x) for x in inputs]
        got = [[None] * len(inputs) for _ in range(2)]

        def call(round_, index):
            with torch.no_grad():
                got[round_][index] = model(inputs[index])

        for round_ in range(len(got)):
            calls = [threading.Thread(target=call, args=(round_, i)) for i in range(len(inputs))]
            for thread in calls:
                thread.start()
            for thread in calls:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)
    for results in got:
        for result, alone in zip(results, expected, strict=True):
            assert torch.equal(result, alone)


@pytest.mark.parametrize("family", [*FAMILIES, *ROTARY])
@pytest.mark.parametrize("method", ["adapter", "adaptformer", "adapter, parallel"])
def test_threads_that_meet_within_a_block_keep_apart(method, family):
    model, pixels = model_of(method, family)
    inputs, results = [pixels, pixels + 1], [None, None]
    meeting = threading.Barrier(2, timeout=30)
    norm = model.family.parts(0).norms[1]
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def meet(*_):
        meeting.wait()

    norm.register_forward_hook(meet)

    def call(index):
        with torch.no_grad():
            results[index] = model(inputs[index])

    calls = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join()
    for result, alone in zip(results, expected, strict=True):
        torch.testing.assert_close(result, alone, rtol=1e-4, atol=1e-4)


@every_case
def test_a_call_that_fails_leaves_nothing_behind(method, family):
    model, pixels = model_of(method, family)
    expected = model(pixels)
    for part in (model.family.final_norm, list(model.family.blocks[1].modules())[-1]):

        def fail(*_):
            raise ArithmeticError

        handle = part.register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            model(pixels)
        assert holds_nothing(model)
        handle.remove()
        assert torch.equal(model(pixels), expected)


@every_case
def test_a_step_of_a_copy_is_that_of_the_model_and_leaves_it_alone(method, family):
    model, pixels = model_of(method, family)
    twin = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stepped = []
    for each in (twin, model):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(3)
        out = each.train()(pixels)
        (out.cls_logits.square().mean() + out.gist_logits.square().mean()).backward()
        if each is twin:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        if each is twin:
            assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        stepped.append(each.state_dict())
    assert any(not torch.equal(value, before[name]) for name, value in stepped[0].items())
    for name, value in stepped[0].items():
        assert torch.equal(value, stepped[1][name]), name


@every_case
def test_a_pickled_model_gives_the_same(method, family):
    model, pixels = model_of(method, family)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    expected = model(pixels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the copy must not read the original's
    assert torch.equal(copied(pixels), expected)


def replicated(model):
    """What ``torch.nn.parallel.replicate`` makes, on the same device."""
    modules = list(model.modules())
    twins = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
                continue
            value = parameter.clone()  # where DataParallel broadcasts
            object.__setattr__(twin, name, value)
    return twins[model]


@every_case
def test_a_replica_uses_its_own_parameters(method, family):
    model, pixels = model_of(method, family)
    expected = model(pixels)
    replica = replicated(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(replica(pixels), expected)


def counted(module, counts, name):
    """Count the calls of a module by a hook; returns what takes it off again."""
    return module.register_forward_hook(lambda *_: counts.update([name])).remove


def patched(module, counts, name):
    """Count the calls of a module by a ``forward`` of its own; returns what takes it off again."""
    own = module.forward

    def forward(*args, **kwargs):
        counts.update([name])
        return own(*args, **kwargs)

    module.forward = forward
    return lambda: delattr(module, "forward")


# The classifier that gist.wrap has put on a backbone, whose own call does not run it.
CLASSIFIED_BY_GIST = {"transformers DINOv3": ["classifier"]}


@functools.cache
def calls_on_backbone(family, watch):
    """How often a call of a backbone runs each of its modules, by name, 0 included."""
    backbone, pixels = made(family)
    counts = Counter({name: 0 for name, _ in backbone.named_modules()})
    for name, module in backbone.eval().named_modules():
        watch(module, counts, name)
    backbone(pixels)
    assert counts[""] == 1
    counts.update(CLASSIFIED_BY_GIST.get(family, ()))
    return counts


@pytest.mark.parametrize("watch", [counted, patched])
@every_case
@torch.no_grad()
def test_what_hangs_on_a_module_runs_as_often_as_on_the_backbone(method, family, watch):
    model, pixels = model_of(method, family)
    logits = model(pixels)
    for name, expected in calls_on_backbone(family, watch).items():
        counts: Counter[str] = Counter()
        take_off = watch(model.backbone.get_submodule(name), counts, name)
        torch.testing.assert_close(model(pixels), logits, rtol=1e-4, atol=1e-4)
        take_off()
        assert counts[name] == expected, name
    assert torch.equal(model(pixels), logits)


@pytest.mark.parametrize("family", [*FAMILIES, *ROTARY])
def test_hooks_of_all_modules_run_as_often_as_on_the_backbone(family):
    backbone, pixels = made(family)
    model = gist.wrap(copy.deepcopy(backbone), gist.GistConfig(None, gist=False)).eval()
    seen: dict[str, list[str]] = {"backbone": [], "model": []}

    def watch(name):
        return nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen[name].append(type(module).__name__)
        )

    for name, call in (("backbone", backbone.eval()), ("model", model)):
        handle = watch(name)
        try:
            call(pixels)
        finally:
            handle.remove()
    assert seen["backbone"]
    classifier = ["Linear"] * len(CLASSIFIED_BY_GIST.get(family, ()))
    assert seen["model"] == [*seen["backbone"], *classifier, "GistModel"]


def operators(call):
    """The operators that a call runs, by a TorchDispatchMode."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Watching():
        call()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_that_watch_operators_see_the_backbones(family):
    backbone, pixels = made(family)
    model = gist.wrap(copy.deepcopy(backbone), gist.GistConfig(None, gist=False)).eval()
    backbone.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as own:
        backbone(pixels)
    with FlopCounterMode(display=False) as ours:
        model(pixels)
    assert ours.get_total_flops() == own.get_total_flops() > 0
    with torch.no_grad():
        assert operators(lambda: model(pixels)) == operators(lambda: backbone(pixels))


def test_no_operator_of_gists_own_is_seen_by_modes_that_watch():
    model = wrapped().train()
    seen = operators(lambda: model(images()))
    assert "aten.addmm.default" in seen
    assert not [name for name in seen if not name.startswith("aten.")]


@pytest.mark.parametrize(
    "method",
    ["adapter", "adapter, parallel", "adaptformer", "lora", "ssf", "fact", "difffit"],
)
def test_what_hangs_on_a_methods_module_has_the_same_effect_in_fused_blocks(method):
    model, pixels = model_of(method, "timm ViT-Ti")
    plain = model(pixels)
    for module in model.method.modules():
        handle = module.register_forward_hook(lambda module, args, output: 3 * output)
        fused = model(pixels)
        handle.remove()
        by_own = model.backbone.norm.register_forward_hook(lambda *_: None)
        handle = module.register_forward_hook(lambda module, args, output: 3 * output)
        torch.testing.assert_close(fused, model(pixels), rtol=1e-4, atol=1e-4)
        assert torch.equal(fused, plain) == isinstance(module, nn.ModuleList | nn.ModuleDict)
        handle.remove()
        by_own.remove()


@every_case
def test_a_backward_pass_that_runs_blocks_again_leaves_nothing_behind(method, family):
    model, pixels = model_of(method, family)
    model.set_grad_checkpointing()
    model.train()(pixels).gist_logits.square().sum().backward()
    assert holds_nothing(model)


def test_a_model_compiled_in_place_stays_fused_and_a_compiled_backbone_runs_by_its_call():
    model = wrapped().eval()
    said = gist.explain(model)
    assert "fused" in said
    model.compile(backend="eager")
    assert gist.explain(model) == said
    model.backbone.compile(backend="eager")
    assert "own forward, for it was compiled in place" in gist.explain(model)


@pytest.mark.parametrize("family", [*FAMILIES, *ROTARY])
def test_a_hook_that_changes_an_output_has_the_effect_it_has_on_the_backbone(family):
    backbone, pixels = made(family)
    model = gist.wrap(copy.deepcopy(backbone), gist.GistConfig(None, gist=False)).eval()
    backbone.eval()

    def doubled(module, args, output):
        return output * 2 if isinstance(output, torch.Tensor) else None

    for name, module in backbone.named_modules():
        hooked = module, model.backbone.get_submodule(name)
        handles = [each.register_forward_hook(doubled) for each in hooked]
        expected = logits_of(backbone(pixels), getattr(backbone, "classifier", None))
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-4)
        for handle in handles:
            handle.remove()


def logits_of(output, classifier):
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else classifier(output.pooler_output)


@every_case
def test_an_empty_batch_gives_empty_logits_where_the_backbone_does(method, family):
    backbone, pixels = made(family)
    own_error = None
    try:
        backbone(pixels[:0])
    except RuntimeError as error:
        assert "timm ViT" not in family
        own_error = str(error)[:30]
    model, pixels = model_of(method, family)
    for training in (False, True):
        model.train(training)
        if own_error is not None and "fused" not in gist.explain(model):
            with pytest.raises(RuntimeError, match=own_error):
                model(pixels[:0])
            continue
        out = model(pixels[:0])
        logits = [out.cls_logits, out.gist_logits] if training else [out]
        assert all(each.shape == (0, model.num_classes) for each in logits)
        sum(each.sum() for each in logits).backward()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@every_case
def test_meta_tensors_give_shapes(method, family):
    model, pixels = model_of(method, family)
    model = model.to("meta")
    assert model(pixels.to("meta")).shape == (2, model.num_classes)
    assert model.train()(pixels.to("meta")).gist_logits.shape == (2, model.num_classes)


@every_case
def test_a_trace_is_right_at_another_batch_size(method, family):
    model, pixels = model_of(method, family)
    traced = torch.jit.trace(model, pixels, check_trace=False)
    other = torch.cat((pixels, pixels[:1] + 1))
    torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)


# accelerate gives timm's Eva itself other logits, and does not bring back what the pooling head of
# transformers' SigLIP reads.
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
@not_rotary
def test_offloaded_parameters_are_brought_back_for_a_call(method, family, when):
    accelerate = pytest.importorskip("accelerate")
    if family == "transformers SigLIP":
        pytest.skip("accelerate can't offload it")
    model, pixels = model_of(method, family)
    expected = model(pixels)
    device = torch.device("cpu")
    if when == "before wrapping":
        values = model.trainable_state_dict()
        backbone = gist.unwrap(copy.deepcopy(model))
        accelerate.cpu_offload(backbone, execution_device=device)
        again = gist.wrap(backbone, model.config)
        offloaded = {id(p) for p in again.parameters() if p.is_meta}
        for name, parameter in again.named_parameters():
            if name in values and id(parameter) not in offloaded:
                parameter.data.copy_(values[name])
        model = again.eval()
    else:
        accelerate.cpu_offload(model, execution_device=device)
        assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-4)


# timm's Eva reads the weight of its packed layer, which a quantised one does not have.
@not_rotary
def test_linears_quantised_dynamically_keep_the_logits(method, family):
    model, pixels = model_of(method, family)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected, logits = model(pixels), quantised(pixels)
    assert type(quantised.backbone.get_submodule(_a_linear(model))) is not nn.Linear
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < 0.1  # each of some ten layers rounds to 8 bits


def _a_linear(model):
    return next(n for n, m in model.backbone.named_modules() if type(m) is nn.Linear)


# ---- fused only where every part is what the kernels assume -------------------------------------


class Subclass(torch.Tensor):
    """A tensor that computes as usual, but is of a class of its own."""


def weight_of(cls):
    def change(block):
        layer = block.mlp.fc1
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(cls), requires_grad=False)

    return change


def attribute(path, name, value):
    def change(block):
        owner, new = block.get_submodule(path), copy.deepcopy(value)
        if isinstance(new, nn.Module):
            carry_hooks(getattr(owner, name), new.train(owner.training))
        setattr(owner, name, new)

    return change


def parametrised(block):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(block.mlp.fc2, "weight", Doubled())


class Negated(nn.Dropout):
    def forward(self, x):
        return -x


CHANGES = {
    "a weight of a tensor subclass": weight_of(Subclass),
    "a parametrised weight": parametrised,
    "a weight-normed layer": lambda block: torch.nn.utils.weight_norm(block.attn.proj),
    "a spectrally normed layer": lambda block: torch.nn.utils.spectral_norm(block.mlp.fc1),
    "another dropout": attribute("mlp", "drop1", Negated(0.0)),
    "another projection dropout": attribute("attn", "proj_drop", Negated(0.0)),
    "another layer scale": attribute("", "ls1", Negated(0.0)),
    "another drop-path": attribute("", "drop_path2", Negated(0.0)),
    "a drop-path that drops": attribute("", "drop_path2", DropPath(0.5)),
    "another attention norm": attribute("attn", "norm", nn.LayerNorm(48)),
    "a norm without weights": lambda block: (
        setattr(block.norm1, "weight", None), setattr(block.norm1, "bias", None)
    ),
    "a norm with eps 0": attribute("norm2", "eps", 0.0),
    "another scale": attribute("attn", "scale", 0.5),
    "another scale of unfused attention": lambda block: (
        setattr(block.attn, "scale", 0.5), setattr(block.attn, "fused_attn", False)
    ),
    "other heads": lambda block: (
        setattr(block.attn, "num_heads", 4), setattr(block.attn, "head_dim", 12)
    ),
    "a compiled part": lambda block: setattr(
        block.mlp, "_compiled_call_impl", lambda x: -nn.Module._call_impl(block.mlp, x)
    ),
    "a replaced forward": lambda block: setattr(block.attn, "forward", lambda x, **_: -x),
    "the block's own forward": lambda block: setattr(block, "forward", lambda x, **_: -x),
    "a part more": lambda block: block.add_module("more", nn.Linear(2, 2)),
}  # fmt: skip


STILL_FUSED = (
    "a drop-path that drops", "a norm without weights", "another scale",
    "another scale of unfused attention", "other heads", "a part more",
)  # fmt: skip


@pytest.mark.parametrize("method", ["adapter", "lora", "ssf", "none"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_called_fused_gives_what_its_own_forward_gives(
    change, training, method, monkeypatch
):
    config = gist.GistConfig(METHOD_CONFIGS[method], token_dropout=0.0)
    model, twin = (wrapped("vit", config).train(training) for _ in range(2))
    for each in (model, twin):
        torch.manual_seed(4)
        CHANGES[change](each.backbone.blocks[1])
    said = gist.explain(model)
    torch.manual_seed(0)
    logits = model(images())
    monkeypatch.setattr("gist.fusion.backbone.refusal", lambda *_: gist.methods.Refusal("asked"))
    torch.manual_seed(0)
    torch.testing.assert_close(logits, twin(images()), rtol=1e-4, atol=1e-4)
    assert "fused" in said  # the other blocks, at least
    assert ("block 1: the block's own forward" in said) == (change not in STILL_FUSED)


def test_a_class_whose_forward_was_replaced_is_not_fused(monkeypatch):
    model = wrapped().eval()
    own = type(model.backbone.blocks[0].attn).forward
    monkeypatch.setattr(
        type(model.backbone.blocks[0].attn), "forward", lambda self, x, *a, **k: -own(self, x)
    )
    said = gist.explain(model)
    assert "the block's own forward, for its Attention has a forward of its own" in said


def test_weights_of_several_dtypes_are_not_fused():
    model = wrapped().double().eval()
    model.backbone.blocks[1].mlp.fc1.float()
    said = gist.explain(model).splitlines()[1]
    assert said.startswith("block 1: the block's own forward, for its matrices are of several")


def test_parameters_of_a_subclass_are_read_by_the_methods_own_forward():
    model = wrapped().eval()
    expected = model(images())
    for part in model.method:
        part.up.weight = nn.Parameter(part.up.weight.detach().as_subclass(Subclass))
    assert "blocks 0 to 2: the block's own forward, for its adapter's" in gist.explain(model)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)


def test_hooks_outside_of_the_blocks_see_all_tokens_of_the_backbone_alone():
    model = wrapped().train()
    seen = []
    model.backbone.norm.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    plain = model.backbone.num_prefix_tokens + model.backbone.patch_embed.num_patches
    out = model(images())
    assert seen == [plain]
    assert "blocks 0 to 2: the backbone's own forward, for it carries hooks" in gist.explain(model)
    assert not torch.equal(out.cls_logits, out.gist_logits)


def test_a_call_of_the_backbone_includes_the_gist_token_where_nobody_asks():
    model = wrapped("average_pooled").eval()
    tokens = model.backbone.forward_features(images())
    assert tokens.shape[1] == model.backbone.patch_embed.num_patches + 2 + 1
    assert SimpleNamespace(**hooks._thread.__dict__).asked == {}
