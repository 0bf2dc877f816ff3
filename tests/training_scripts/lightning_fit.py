"""Lightning's ``Trainer.fit`` with ``gradient_clip_val`` and accumulated gradients."""

import argparse

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
        self.head = torch.nn.Linear(16, 1)

    def training_step(self, batch):
        inputs, targets = batch
        return (self.head(self.body(inputs)) - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

lightning.seed_everything(options.seed, verbose=False)
data = TensorDataset(torch.randn(128, 4), torch.randn(128, 1))
model = Regression()
trainer = lightning.Trainer(
    max_epochs=3,
    gradient_clip_val=0.5,
    accumulate_grad_batches=2,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(data, batch_size=8))
torch.save({"weights": model.state_dict(), "updates": trainer.global_step}, options.out)
