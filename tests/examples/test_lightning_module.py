"""The example for Lightning: it trains, resumes, evaluates, and saves what was trained."""

from __future__ import annotations

import runpy

import pytest
import timm
import torch
from torch.utils.data import DataLoader
from training import model, stripes

import gist

lightning = pytest.importorskip("lightning")

from examples import lightning_module  # noqa: E402
from examples.lightning_module import GistModule  # noqa: E402

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def trainer_of(folder, epochs=2):
    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    return lightning.Trainer(max_epochs=epochs, callbacks=[keep], default_root_dir=folder, **QUIET)


def module_of():
    return GistModule(model(config=gist.GistConfig(token_dropout=0.0)), lr=2e-2)


def train(trainer, module, resume=None):
    loaders = DataLoader(stripes(30, 1), 10), DataLoader(stripes(31, 2), 31)
    trainer.fit(module, *loaders, ckpt_path=resume)
    return module


@pytest.mark.filterwarnings("ignore")  # Lightning's, about few workers and small epochs
def test_it_trains_evaluates_and_resumes_to_the_same_bits(tmp_path):
    trainer = trainer_of(tmp_path)
    module = train(trainer, module_of())
    found, before = module.model.trainable_state_dict(), model().trainable_state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in found.items())
    assert trainer.callback_metrics["val_accuracy"] > 0.8
    module.eval()
    images, labels = stripes(31, 2).tensors
    accuracy = (module.model(images).argmax(1) == labels).float().mean()
    assert trainer.callback_metrics["val_accuracy"] == pytest.approx(accuracy)

    first = tmp_path / "epoch=0.ckpt"
    saved = torch.load(first, weights_only=False)["state_dict"]
    assert saved.keys() == {f"model.{name}" for name in found}
    resumed = train(trainer_of(tmp_path / "again"), module_of(), first)
    for name, value in resumed.model.trainable_state_dict().items():
        assert torch.equal(value, found[name]), name


@pytest.mark.filterwarnings("ignore")
def test_as_a_script_it_saves_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def small(name, **options):
        torch.manual_seed(0)
        return create(name, embed_dim=48, depth=2, num_heads=3, **options)

    monkeypatch.setattr(timm, "create_model", small)
    runpy.run_path(lightning_module.__file__, run_name="__main__")
    backbone = small("vit_tiny_patch16_224", img_size=32, num_classes=10)
    head = backbone.head.weight.clone()
    loaded = gist.load(backbone, "my-adapter")
    assert loaded.token is not None
    assert not torch.equal(loaded.get_classifier().weight, head)
