"""A wrapped model in Lightning. As a script, it trains a tiny one on random images."""

from __future__ import annotations

from typing import Any

import lightning
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import gist


class GistModule(lightning.LightningModule):
    """Trains what gist.wrap left trainable. Checkpoints hold that only, not the backbone."""

    def __init__(self, model: gist.GistModel, loss: gist.GistLoss | None = None, lr: float = 1e-3):
        super().__init__()
        self.model, self.loss, self.lr = model, loss or gist.GistLoss(), lr
        self.strict_loading = False  # checkpoints lack the backbone

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images, labels = batch
        loss = self.loss(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        images, labels = batch
        logits = self.model(images)  # in evaluation mode, the class token's
        self.log("val_loss", self.loss(logits, labels), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer_v2(self.model, "adamw", lr=self.lr, weight_decay=1e-4)
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {f"model.{name}" for name in self.model.trainable_state_dict()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}


if __name__ == "__main__":
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    module = GistModule(gist.wrap(backbone))
    data = TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64) % 10)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, log_every_n_steps=1)
    trainer.fit(module, DataLoader(data, 16, shuffle=True), DataLoader(data, 16))
    gist.save(module.model, "my-adapter")  # which gist.load puts onto a fresh backbone
