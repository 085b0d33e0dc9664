"""Wrapped models in the loop of timm's train.py: a training, its checkpoints, its evaluation."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from models import images, transformers_vit
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler, accuracy
from torch import nn
from training import in_processes

import gist
import gist.timm_task
from gist.timm_task import GistTask

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def wrapped(seed=0, **config):
    torch.manual_seed(seed)
    config = {"token_dropout": 0.0, **config}
    return gist.wrap(VisionTransformer(**SIZES, num_classes=7), gist.GistConfig(**config))


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(2):
        yield torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6)


class Script:
    """What timm's train.py makes and does, in its order."""

    def __init__(self, folder: Path, resume: Path | None = None):
        self.task = GistTask(wrapped(), verbose=False)
        self.optimizer = create_optimizer_v2(
            self.task.get_trainable_module(), "adamw", lr=1e-2, weight_decay=0.05
        )
        self.scaler = NativeScaler(device="cpu")
        self.start = 0
        if resume is not None:
            self.start = resume_task_checkpoint(self.task, resume, self.optimizer, self.scaler)
        self.task.setup_ema(decay=0.5)
        if resume is not None:
            load_task_ema_checkpoint(self.task, resume)
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, num_epochs=3, warmup_epochs=1, warmup_lr=1e-3, updates_per_epoch=2,
            step_on_epochs=False,
        )  # fmt: skip
        self.scheduler.step_update(2 * self.start)
        self.saver = CheckpointSaver(
            self.task.get_trainable_module(), self.optimizer, amp_scaler=self.scaler,
            checkpoint_dir=str(folder), recovery_dir=str(folder), task=self.task,
        )  # fmt: skip

    def train(self):
        for epoch in range(self.start, self.epochs):
            self.task.get_trainable_module().train()
            for step, (pixels, target) in enumerate(batches(epoch), start=2 * epoch + 1):
                self.optimizer.zero_grad()
                self.scaler(
                    self.task(pixels, target)["loss"], self.optimizer, clip_grad=1.0,
                    parameters=self.task.get_clip_parameters(),
                )  # fmt: skip
                self.task.update_ema(step=step)
                self.scheduler.step_update(step)
            self.saver.save_checkpoint(epoch, metric=self.validate(self.task.get_eval_model()))
        return self.task

    @torch.inference_mode()
    def validate(self, model):
        pixels, target = next(batches(0))
        return accuracy(model.eval()(pixels), target, topk=(1,))[0].item()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    script = Script(folder)
    return script.train(), folder, script


def parameters(task, ema=False):
    module = task.get_trainable_module(ema=ema)
    return (module.module if ema else module).trainable_state_dict()


def test_the_loop_trains_and_evaluates(finished):
    task, _, script = finished
    before = wrapped().trainable_state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in parameters(task).items())
    # Six images' classes are learnt by heart.
    assert script.validate(task.get_eval_model()) > script.validate(wrapped()) + 30
    averaged = parameters(task, ema=True)
    assert all(not torch.equal(value, averaged[n]) for n, value in parameters(task).items())
    assert script.validate(task.get_eval_model(ema=True)) > 50


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_training_ends_with_the_same_bits(finished, epoch, tmp_path):
    whole, folder, _ = finished
    resumed = Script(tmp_path, folder / f"checkpoint-{epoch}.pth.tar")
    assert resumed.start == epoch + 1
    resumed.train()
    for ema in (False, True):
        expected = parameters(whole, ema)
        for name, value in parameters(resumed.task, ema).items():
            assert torch.equal(value, expected[name]), name


def test_a_checkpoint_holds_the_adapter_alone(finished):
    task, folder, _ = finished
    file = folder / "last.pth.tar"
    state = torch.load(file, weights_only=True)
    names = parameters(task).keys()
    assert state["state_dict"].keys() == state["state_dict_ema"].keys() == names
    frozen = sum(p.nbytes for p in task.model.parameters() if not p.requires_grad)
    assert state["task_state"].keys() == state["task_state_ema"].keys() == {"fingerprint"}
    # Optimizer and average: four copies of what is trained.
    assert file.stat().st_size < 0.8 * frozen + 60_000


def test_a_checkpoint_of_another_backbone_is_refused_before_it_is_loaded(finished):
    _, folder, _ = finished
    other = GistTask(wrapped(seed=1), verbose=False)
    before = {name: value.clone() for name, value in parameters(other).items()}
    with pytest.raises(ValueError, match="backbone does not match"):
        resume_task_checkpoint(other, folder / "last.pth.tar")
    assert all(torch.equal(value, before[name]) for name, value in parameters(other).items())


def test_what_a_checkpoint_lacks_is_named(finished):
    state = finished[0].get_checkpoint_state()
    del state["state_dict"]["token.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "token.weight"'):
        GistTask(wrapped(), verbose=False).load_checkpoint_state(*state.values())


def test_a_checkpoint_of_timms_own_task_loads_too(finished, tmp_path):
    model = finished[0].model
    optimizer = create_optimizer_v2(model, "sgd")
    task = ClassificationTask(model, gist.GistLoss(), verbose=False)
    CheckpointSaver(model, optimizer, checkpoint_dir=tmp_path, task=task).save_checkpoint(0)
    fresh = GistTask(wrapped(seed=1), verbose=False)
    resume_task_checkpoint(fresh, tmp_path / "last.pth.tar")
    pixels = images()
    assert torch.equal(fresh.model.eval()(pixels), model.eval()(pixels))


def test_a_step_has_the_loss_its_terms_and_the_class_tokens_logits():
    model, pixels, target = wrapped(), images(), torch.tensor([2, 6])
    loss = gist.GistLoss(temperature=2.0)
    result = GistTask(model, loss, verbose=False)(pixels, target)
    value, terms = loss.with_terms(model(pixels), target)
    assert torch.equal(result["output"], model(pixels).cls_logits)
    assert torch.equal(result["loss"], value)
    assert {name: result[name] for name in terms._fields} == terms._asdict()
    model.eval()
    assert result.keys() > GistTask(model, loss, verbose=False)(pixels, target).keys()


def test_another_loss_is_taken_as_it_is():
    class Twice(gist.GistLoss):
        def forward(self, output, target):
            return 2 * super().forward(output, target)

    model, pixels, target = wrapped(), images(), torch.tensor([2, 6])
    result = GistTask(model, Twice(), verbose=False)(pixels, target)
    assert result.keys() == {"loss", "output"}
    assert torch.equal(result["loss"], 2 * gist.GistLoss()(model(pixels), target))
    of_logits = GistTask(wrapped(gist=False), nn.CrossEntropyLoss(), verbose=False)
    assert of_logits(pixels, target)["loss"].requires_grad


def test_timms_mixup_trains():
    pixels, target = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=7)(
        images(), torch.tensor([2, 6])
    )
    task = GistTask(wrapped(), verbose=False)
    result = task(pixels, target)
    assert torch.equal(result["loss"], gist.GistLoss()(task.model(pixels), target))


@pytest.mark.parametrize("separate", [False, True])
def test_clipped_are_the_trained_parameters_without_the_head_if_so_told(separate):
    model = wrapped(separate_head=separate)
    task, trained = GistTask(model, verbose=False), model.trainable_state_dict()
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in task.get_clip_parameters()} == trained.keys()
    body = {names[id(p)] for p in task.get_clip_parameters(exclude_head=True)}
    assert trained.keys() - body == {name for name in trained if "head" in name}
    assert len(trained) - len(body) == (4 if separate else 2)


def test_a_compiled_task_saves_the_same_names():
    task = GistTask(wrapped(), verbose=False)
    expected = task.get_checkpoint_state()
    task.compile(backend="eager")
    assert task.get_eval_model() is not task.model
    found = task.get_checkpoint_state()
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    task.load_checkpoint_state(*expected.values())


def test_other_models_and_losses_of_one_tokens_logits_are_refused():
    with pytest.raises(TypeError, match=r"model must be what gist.wrap returned; it is a Vision"):
        GistTask(VisionTransformer(**SIZES))
    for loss in (nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy()):
        with pytest.raises(TypeError, match=r"pass gist.GistLoss, such as"):
            GistTask(wrapped(), loss)


def test_the_evaluator_counts_the_class_tokens_logits():
    task = GistTask(gist.wrap(transformers_vit()), verbose=False)
    if not hasattr(task, "create_evaluator"):
        pytest.skip("timm before 1.0.31 has no evaluators")
    evaluator, pixels = task.create_evaluator(), images(batch=5)
    logits = task.get_eval_model().eval()(pixels)
    evaluator.update(logits, logits.argmax(1))
    assert evaluator.compute()["top1"] == 100


def one_step(folder: Path, rows: slice) -> None:
    task = GistTask(wrapped(), verbose=False)
    if torch.distributed.is_initialized():
        task.prepare_distributed()
    optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1)
    pixels, target = next(batches(0))
    task(pixels[rows], target[rows])["loss"].backward()
    optimizer.step()
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=str(folder), task=task
    )
    saver.save_checkpoint(0)


def in_two_processes(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    own = folder / str(rank)
    own.mkdir()
    one_step(own, slice(3 * rank, 3 * rank + 3))
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    assert in_processes(in_two_processes, tmp_path, count=2) == [0, 0]
    one_step(tmp_path, slice(None))
    states = [
        torch.load(file / "last.pth.tar", weights_only=True)["state_dict"]
        for file in (tmp_path, tmp_path / "0", tmp_path / "1")
    ]
    for name, value in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


def test_an_older_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.task", None)
    with pytest.raises(ImportError, match=r"gist.timm_task needs timm 1.0.27 or newer: pip insta"):
        importlib.reload(gist.timm_task)
