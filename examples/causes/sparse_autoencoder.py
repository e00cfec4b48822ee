"""Latents of a sparse autoencoder die when its inputs are not centred
===================================================================

**What happens.** A sparse autoencoder pays for each active latent (L1). While the decoder's bias has not yet learnt
the mean of the inputs, *all* latents that point in its direction reconstruct it together, far too strongly. The error
and the penalty push all of them down at once, with full Adam steps, and most go below zero for every input before the
bias has learnt. A silent latent gets neither penalty nor gradient.

**How it looks.** The dead fraction rises steeply in the first hundred steps, and stays.

**The cure.** Subtract the mean (or start the decoder's bias there, and subtract it before the encoder). For latents
that die later: resampling, such as ``remedy="reset"``, or an auxiliary loss on dead latents.

**Sources.** arXiv 2605.31518 (death is predicted by mean / spread of the inputs); Bricken et al. 2023 for resampling;
Gao et al. 2024, arXiv 2406.04093, for the auxiliary loss.

Run it: ``python examples/causes/sparse_autoencoder.py [--picture FILE.png]``
"""

import torch
from common import Setup, adam, digits, rows, run
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class SparseAutoencoder(LightningModule):
    def __init__(self, latents: int, penalty: float, lr: float) -> None:
        super().__init__()
        self.encoder, self.act, self.decoder = nn.Linear(64, latents), nn.ReLU(), nn.Linear(latents, 64)
        self.penalty, self.lr = penalty, lr
        with torch.no_grad():
            self.decoder.weight /= self.decoder.weight.norm(dim=0)
            self.encoder.weight.copy_(self.decoder.weight.T)
        nn.init.zeros_(self.encoder.bias)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.encoder(x))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        latents = self(batch[0])
        error = (self.decoder(latents) - batch[0]).square().sum(1)
        loss: Tensor = (error + self.penalty * (latents * self.decoder.weight.norm(dim=0)).sum(1)).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.lr)(self.parameters())


def build(cured: bool, *, seed: int = 0, width: int = 256, lr: float = 0.01, steps: int = 300) -> Setup:
    torch.manual_seed(seed)
    images, _ = digits(raw=True)
    data = images - images.mean(0) if cured else images
    model = SparseAutoencoder(width, penalty=0.1, lr=lr)
    return Setup(model, rows(data, steps=steps, seed=seed, size=128), label="dead latents")


if __name__ == "__main__":
    run(build, __doc__)
