"""Usual networks with usual settings, on which there is nothing to find: MLPs to a GAN, all on digits, 200 steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import gan_generator
import torch
from batchnorm_decay import cnn
from common import Learner, Setup, adam, digits, mlp, rows, sgd
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 200
IMAGES, LABELS = digits()


def adamw(lr: float, decay: float = 0.01):
    return lambda parameters: torch.optim.AdamW(parameters, lr, weight_decay=decay)


class Scheduled(Learner):
    """Linear warm-up over a tenth of the steps, then a cosine."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=STEPS // 10)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - STEPS // 10)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [STEPS // 10])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def setup(model: LightningModule, seed: int, shape: tuple[int, ...] = (64,), clip: float | None = None) -> Setup:
    batches = rows(IMAGES.reshape(-1, *shape), LABELS, steps=STEPS, seed=seed)
    return Setup(model, batches, {"gradient_clip_val": clip} if clip else {})


class Residual(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down, self.relu = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + self.down(x))


class Transformer(nn.Module):
    """Rows as tokens, pre-norm blocks, mean over tokens."""

    def __init__(self, activation: str, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) * 0.02)
        options = {"activation": activation, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 4 * width, **options) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class VAE(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 128, 64, 16), mlp(8, 64, 128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        mean, log_variance = self(batch[0]).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return ((self.decoder(code) - batch[0]).square().sum(1) / 2 + divergence).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Siamese(LightningModule):
    """Two views of each image, told apart from those of others (NT-Xent)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 128, 128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=1)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        first, second = (self(batch[0] + 0.3 * torch.randn_like(batch[0])) for _ in range(2))
        return F.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(8, 64, nonlinearity="relu", batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def kaiming(net: nn.Module) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


def regularised(net: nn.Sequential) -> nn.Sequential:
    """Put dropout behind each rectifier."""
    dropped = [[layer, nn.Dropout(0.3)] if isinstance(layer, nn.ReLU) else [layer] for layer in net]
    return nn.Sequential(*(layer for pair in dropped for layer in pair))


def resnet() -> nn.Sequential:
    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def gan(seed: int) -> Setup:
    """A DCGAN in small: BatchNorm and ReLU in the generator, LeakyReLU in the discriminator, Adam at 2e-4."""
    return gan_generator.build(True, seed=seed, lr=2e-4, steps=STEPS)


SETUPS: Mapping[str, Callable[[int], Setup]] = {
    "MLP, He, Adam": lambda seed: setup(Learner(kaiming(mlp(64, 128, 128, 10)), adam(1e-3)), seed),
    "MLP, dropout, AdamW": lambda seed: setup(Learner(regularised(mlp(64, 128, 128, 10)), adamw(1e-3)), seed),
    "MLP, SGD, warm-up, cosine": lambda seed: setup(Scheduled(mlp(64, 128, 128, 10), sgd(0.05)), seed),
    "CNN with BatchNorm, SGD": lambda seed: setup(
        Scheduled(cnn(16, 3), sgd(0.1, weight_decay=5e-4)), seed, shape=(1, 8, 8)
    ),
    "ResNet, SGD": lambda seed: setup(Scheduled(resnet(), sgd(0.1, weight_decay=5e-4)), seed, shape=(1, 8, 8)),
    "OPT-like, AdamW": lambda seed: setup(Scheduled(Transformer("relu"), adamw(1e-3, 0.1)), seed, (8, 8), clip=1.0),
    "BERT-like, AdamW": lambda seed: setup(Scheduled(Transformer("gelu"), adamw(1e-3)), seed, (8, 8), clip=1.0),
    "VAE, Adam": lambda seed: setup(VAE(), seed),
    "siamese, Adam": lambda seed: setup(Siamese(), seed),
    "RNN, Adam, clipped": lambda seed: setup(Learner(Recurrent(), adam(1e-3)), seed, shape=(8, 8), clip=1.0),
    "GAN as DCGAN, Adam": gan,
}
