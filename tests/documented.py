"""Run the code of a page, as a reader would who has a model and batches."""

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def code_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Run all blocks in one namespace, in the order of the page, and return it."""
    data = DataLoader(torch.randn(64, 4), batch_size=16)
    known: dict[str, Any] = {"model": Net(), "train_loader": data, "network": Net(), "batches": list(data)}
    for block in code_of(page):
        exec(compile(block, str(page), "exec"), known)
    return known
