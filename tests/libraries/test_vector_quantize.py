"""The codebook of vector-quantize-pytorch, watched through a watchpoint on the indices that it returns."""

import pytest
import torch
from torch import nn

from lightning_deadrelu import Watchpoint, watch

library = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not among the tests' packages"
)
pytestmark = pytest.mark.slow
CODES, WINDOW = 64, 40


class Autoencoder(nn.Module):
    def __init__(self, least):
        super().__init__()
        self.up, self.down = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)), nn.Linear(16, 8)
        self.quantize = library.VectorQuantize(dim=16, codebook_size=CODES, threshold_ema_dead_code=least)
        self.codes = Watchpoint(CODES, indices=True)

    def forward(self, x):
        quantized, indices, loss = self.quantize(self.up(x)[:, None])
        self.chosen = self.codes(indices)
        return self.down(quantized[:, 0]), loss


def train(least, watched):
    """Train on five clusters; return the model, what was chosen in each batch, and the monitor."""
    torch.manual_seed(0)
    model, chosen, generator = Autoencoder(least), [], torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    centres = 3 * torch.randn(5, 8, generator=generator)
    monitor = watch(model, optimizer, every_n_steps=1, window=WINDOW, min_samples=2995) if watched else None

    def steps():
        for _ in range(10 * WINDOW):
            x = centres[torch.randint(5, (128,), generator=generator)] + 0.3 * torch.randn(128, 8, generator=generator)
            output, commitment = model(x)
            loss = (output - x).square().mean() + commitment.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            chosen.append(model.chosen.flatten())
            if monitor:
                monitor.step(loss)

    if monitor:
        with monitor:
            steps()
    else:
        steps()
    return model, chosen, monitor


@pytest.mark.parametrize(("least", "dies"), [(0, True), (2, False)])
def test_codes_are_counted_and_nothing_changes(least, dies):
    model, chosen, monitor = train(least, watched=True)
    plain, _, _ = train(least, watched=False)
    assert all(value.equal(plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert monitor.failure is None
    codes, last = monitor.report["codes"], torch.cat(chosen[-WINDOW:])
    assert codes.fired.tolist() == [int((last == code).sum()) for code in range(CODES)]
    batches = [(torch.arange(CODES)[:, None] == batch).any(1) for batch in chosen]
    ages = [next((n for n, one in enumerate(reversed(batches)) if one[code]), len(batches)) for code in range(CODES)]
    assert codes.dead.tolist() == [128 * batches_since >= 2995 for batches_since in ages]
    assert bool(codes.dead.any()) == dies
    small = int((model.quantize._codebook.cluster_size < 2).sum())
    print(f"{least}: {int(codes.dead.sum())} dead, perplexity {codes.perplexity:.1f}, {small} EMA sizes below 2")
