"""How much longer a step takes when it is observed, of models made of many small operations: the worst case.

    python tests/benchmarks/cost_small.py [--steps 40]

Plain and observed steps take turns, with SGD, on one thread; CPU time, the least and the median of each.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import OPTConfig, OPTModel, ResNetConfig, ResNetModel

from lightning_deadrelu.observe.watch import Watch


class Functional(nn.Module):
    """400 rectifiers, called as functions, each behind a layer of 16 units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(400))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x


def opt() -> OPTModel:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 8}
    return OPTModel(OPTConfig(**sizes, num_attention_heads=4, vocab_size=1000, activation_function="relu"))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "400 functional rectifiers, 16 units": lambda: (Functional(), torch.randn(8, 16)),
    "ResNet-50 with 8 channels": lambda: (
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8])),
        torch.randn(2, 3, 32, 32),
    ),
    "8 OPT blocks, d 32": lambda: (opt(), torch.randint(0, 1000, (2, 8))),
}


def longer(model: nn.Module, batch: Tensor, steps: int) -> tuple[float, float]:
    """Return an observed step's time over a plain one's: of the least of all, and of the medians."""
    watch, optimizer = Watch(model, window=10**6), torch.optim.SGD(model.parameters(), lr=0.01)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * (steps + 3)):
        observed = bool(number % 2)
        start = time.process_time()
        if observed:
            watch.liveness.observation = number
            watch.probe.arm()
        output = model(batch)
        watch.probe.disarm()
        (output if isinstance(output, Tensor) else output[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        taken[observed].append(time.process_time() - start)
    plain, seen = taken[False][3:], taken[True][3:]
    return min(seen) / min(plain), statistics.median(seen) / statistics.median(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    for name, build in MODELS.items():
        torch.manual_seed(0)
        least, median = longer(*build(), steps)
        print(f"{name}: {least:.2f} times as long, by the medians {median:.2f}")


if __name__ == "__main__":
    main()
