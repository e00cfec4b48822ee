"""A GAN's generator with plain ReLU dies all through training
===========================================================

**What happens.** The generator's only signal is the discriminator's gradient, whose direction changes all the time
and is shared by all samples of a batch: "darker", then "brighter". Adam makes full steps of each, however small the
gradient. They move all pre-activations of a unit together, and sooner or later all below zero. The target moves, so
this never ends.

**How it looks.** The dead fraction climbs all through training, most in the generator's first layer. No loss shows
it: both losses go up and down anyway.

**The cure.** BatchNorm before each rectifier of the generator, as in DCGAN: it subtracts what all samples of a batch
have in common. A LeakyReLU in the discriminator, as here in both runs, keeps gradients coming. A tenth of the
learning rate killed none either.

**Source.** Radford et al. 2015, arXiv 1511.06434 (DCGAN).

Run it: ``python examples/causes/gan_generator.py [--picture FILE.png]``
"""

from typing import Any

import torch
from common import Setup, digits, mlp, rows, run
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import softplus


class GAN(LightningModule):
    def __init__(self, generator: nn.Module, discriminator: nn.Module, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator, self.lr = generator, discriminator, lr

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        noise, real = batch
        fake = self(noise)
        first, second = self.optimizers()
        self.descend(second, softplus(-self.discriminator(real)) + softplus(self.discriminator(fake.detach())))
        self.descend(first, softplus(-self.discriminator(fake)))

    def descend(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss.mean())
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        players = self.generator, self.discriminator
        return [torch.optim.Adam(player.parameters(), self.lr, betas=(0.5, 0.999)) for player in players]


def build(cured: bool, *, seed: int = 0, width: int = 64, lr: float = 0.01, steps: int = 250) -> Setup:
    torch.manual_seed(seed)
    images, _ = digits(raw=True)
    normalised = (lambda: nn.Sequential(nn.BatchNorm1d(width), nn.ReLU())) if cured else nn.ReLU
    generator = mlp(16, width, width, 64, activation=normalised)
    discriminator = mlp(64, width, width, 1, activation=lambda: nn.LeakyReLU(0.2))
    noise = torch.randn(len(images), 16)
    batches = rows(noise, images * 2 - 1, steps=steps, seed=seed)
    return Setup(GAN(nn.Sequential(generator, nn.Tanh()), discriminator, lr), batches)


if __name__ == "__main__":
    run(build, __doc__)
