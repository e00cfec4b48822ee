"""A classifier of scikit-learn's digits and its data, trained and audited from the command line.

python examples/digits.py fit --config examples/cli.yaml
python examples/digits.py fit --trainer.max_epochs=2 --trainer.callbacks+=lightning_deadrelu.DeadReLUMonitor \
--trainer.callbacks.remedy=reset
python -m lightning_deadrelu audit examples/digits.py:Classifier --data examples/digits.py:held_out \
--checkpoint FILE.ckpt --fail-above 0.1
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

Data = DataLoader[tuple[Tensor, ...]]


class Classifier(LightningModule):
    """Three hidden layers; at this learning rate many of their units die.

    Args:
        lr: Learning rate of SGD with momentum 0.9.
        width: Units of each hidden layer.
    """

    def __init__(self, lr: float = 0.15, width: int = 64) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential()
        for number in range(1, 4):
            self.net.add_module(f"linear{number}", nn.Linear(64 if number == 1 else width, width))
            self.net.add_module(f"relu{number}", nn.ReLU())
        self.net.add_module("head", nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Digits(LightningDataModule):
    """The first 1,400 digits.

    Args:
        batch_size: Images per batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Data:
        return DataLoader(Subset(load(), range(1400)), self.batch_size, shuffle=True)


def load() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels).long())


def held_out() -> Data:
    """Load the digits that training does not see."""
    return DataLoader(Subset(load(), range(1400, 1797)), 100)


if __name__ == "__main__":
    LightningCLI(Classifier, Digits)
