"""What is normal: dead, rare, always-on and dormant units in usual networks with usual settings, over their training.

    python tests/benchmarks/normal.py [--steps 1000] [--seeds 3]    about 10 minutes on one core

All train on scikit-learn's digits with batches of 64, and with the set-ups of healthy.py, in which the check-up and the
post-mortem find nothing; every step is observed, and a window is a tenth of the run. Shares are over all rectifiers
that are trained, in the mean over seeds, at a tenth, a half and the end of the run; the last column is the layer that
is worst at the end, in the mean over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "examples" / "causes"))
import healthy
from common import Learner, Recorder, Setup, adam, mlp, train
from healthy import IMAGES, LABELS, adamw

from lightning_deadrelu import LivenessReport

MEASURES = ("dead", "rare", "always_on", "dormant")
TOKENS = ((IMAGES - IMAGES.min()) / (IMAGES.max() - IMAGES.min()) * 16).round().long()


class UNet(nn.Module):
    """Two levels, with skip connections; tells ink from paper in a noisy picture."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers, nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU())

        self.down, self.bottom, self.up = block(1, width), block(width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.down(x + 0.5 * torch.randn_like(x))
        risen = F.interpolate(self.bottom(F.max_pool2d(skipped, 2)), scale_factor=2)
        return self.head(self.up(torch.cat([skipped, risen], 1)))


class GraphNet(nn.Module):
    """Pixels as nodes of a grid; two graph convolutions and a mean."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        near = torch.cdist(*[torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))] * 2) < 1.5
        self.register_buffer("adjacency", near / near.sum(1, keepdim=True))
        self.place = nn.Parameter(torch.randn(64, width) * 0.1)
        self.layers = nn.ModuleList([nn.Linear(1, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x[..., None]) + self.place
        for layer in self.layers[1:]:
            x = F.relu(self.adjacency @ layer(x))
        return self.head(x.mean(1))


class OPT(nn.Module):
    """transformers' OPT, made small, predicts the next pixel."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import OPTConfig, OPTForCausalLM

        size = {"hidden_size": 64, "ffn_dim": 256, "word_embed_proj_dim": 64, "num_attention_heads": 4}
        self.model = OPTForCausalLM(OPTConfig(vocab_size=32, num_hidden_layers=3, max_position_embeddings=64, **size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits[:, :-1].flatten(0, 1)


class T5(nn.Module):
    """transformers' T5 with its first activation, ReLU, made small: pixels in, a digit out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5ForConditionalGeneration

        size = {"d_model": 64, "d_ff": 256, "d_kv": 16, "num_heads": 4, "num_layers": 3}
        config = T5Config(vocab_size=32, decoder_start_token_id=0, pad_token_id=0, feed_forward_proj="relu", **size)
        self.model = T5ForConditionalGeneration(config)

    def forward(self, tokens: Tensor) -> Tensor:
        start = torch.zeros(len(tokens), 1, dtype=torch.long)
        return self.model(input_ids=tokens + 1, decoder_input_ids=start).logits[:, 0]


def ink(logits: Tensor, pixels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.flatten(1), (pixels.flatten(1) > 0).float())


def on(data: Sequence[Tensor], learner: Learner, seed: int) -> Setup:
    return Setup(learner, healthy.rows(*data, steps=healthy.STEPS, seed=seed), {"gradient_clip_val": 1.0})


def after_first(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits, tokens[:, 1:].flatten())


def squares(output: Tensor, wanted: Tensor) -> Tensor:
    return (output - wanted).square().sum(1).mean()


PICTURES = IMAGES.view(-1, 1, 8, 8)
SETUPS: Mapping[str, Callable[[int], Setup]] = {
    **{name: make for name, make in healthy.SETUPS.items() if name not in ("BERT-like, AdamW", "OPT-like, AdamW")},
    "autoencoder, Adam": lambda seed: on(
        [IMAGES, IMAGES], Learner(mlp(64, 128, 16, 128, 64), adam(1e-3), squares), seed
    ),
    "U-Net, AdamW": lambda seed: on([PICTURES, PICTURES], Learner(UNet(), adamw(1e-3), ink), seed),
    "GNN, Adam": lambda seed: on([IMAGES, LABELS], Learner(GraphNet(), adam(1e-3)), seed),
    "transformer with ReLU, AdamW": healthy.SETUPS["OPT-like, AdamW"],
    "OPT (transformers), AdamW": lambda seed: on([TOKENS, TOKENS], Learner(OPT(), adamw(1e-3), after_first), seed),
    "T5 (transformers), AdamW": lambda seed: on([TOKENS, LABELS], Learner(T5(), adamw(1e-3)), seed),
}


class Kept(Recorder):
    """Keeps each report."""

    def on_verdict(self, trainer, pl_module, report: LivenessReport) -> None:
        self.curve.append(report)


def reports_of(make: Callable[[int], Setup], seed: int, steps: int) -> list[LivenessReport]:
    torch.manual_seed(seed)
    kept: list[LivenessReport] = []
    setup = make(seed)
    share = lambda report: kept.append(report) or 0.0  # noqa: E731
    train(setup._replace(share=share), window=max(1, steps // 10))
    return kept


def percent(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f}" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of a set-up's name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    healthy.STEPS = args.steps
    print(
        "| set-up | units | "
        + " | ".join(f"{m} %, at 1/10, 1/2, end" for m in MEASURES)
        + " | worst layer at the end |"
    )
    print("| --- " * (len(MEASURES) + 3) + "|")
    for name, make in SETUPS.items():
        if args.only in name:
            runs = [reports_of(make, seed, args.steps) for seed in range(100, 100 + args.seeds)]
            print(f"| {name} | {runs[0][-1].units} | {' | '.join(map(str, cells(runs)))} | {worst(runs)} |", flush=True)


def cells(runs: Sequence[Sequence[LivenessReport]]) -> list[str]:
    return [
        ", ".join(percent([run[place(run, at)].fraction(measure) for run in runs]) for at in (0.1, 0.5, 1.0))
        for measure in MEASURES
    ]


def place(run: Sequence[LivenessReport], at: float) -> int:
    return max(0, round(at * len(run)) - 1)


def worst(runs: Sequence[Sequence[LivenessReport]]) -> str:
    shares = defaultdict(list)
    for run in runs:
        for site in run[-1].headline:
            shares[site.name].append(site.dead_fraction)
    name, values = max(shares.items(), key=lambda item: fmean(item[1]))
    return f"`{name}` {percent(values)} %" if fmean(values) else "none dead"


if __name__ == "__main__":
    main()
