"""Weight decay on biases takes away what keeps units above zero
=============================================================

**What happens.** A bias may be all that keeps a unit above zero: here each bias starts at minus the mean of w x,
which centres units with inputs far from zero. The optimizer's groups were swapped, so that the decay meant for the
weights acts on the biases. They shrink, w x stays, and half of the units end below zero for all inputs. Decay of
weights and biases *together* does not do this: it shrinks w x + b and keeps its sign.

**How it looks.** All alive at first; then a slow rise over as many steps as 1 / (learning rate x decay), while biases
shrink towards zero.

**The cure.** Decay weights only: biases hold no capacity worth regularising. Here 300 steps with learning rate x
decay = 0.01 stand for the 30,000 that it takes at 1e-4. The few that are dead after the cure died in training: with
data this far from zero a small learning rate is already high.

With *centred* digits this decay killed none (``offset=0.0``).

**Sources.** He et al. 2019, "Bag of tricks", arXiv 1812.01187, section 3.1 (no bias decay); Dohare et al. 2024,
Nature 632, 768, for decay that raises the number of dead units.

Run it: ``python examples/causes/bias_decay.py [--picture FILE.png]``
"""

from typing import Any

import torch
from common import Learner, Setup, digits, mlp, rows, run
from torch import Tensor, nn


def build(
    cured: bool,
    *,
    seed: int = 0,
    width: int = 64,
    depth: int = 2,
    lr: float = 3e-3,
    steps: int = 300,
    offset: float = 5.0,
) -> Setup:
    torch.manual_seed(seed)
    images, labels = digits()
    net = mlp(64, *[width] * depth, 10)
    centre_(net, images + offset)
    weights = [one for one in net.parameters() if one.ndim > 1]
    biases = [one for one in net.parameters() if one.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": biases, "weight_decay": 0.0 if cured else 0.01 / lr},
    ]
    learner = Learner(net, lambda _: torch.optim.SGD(groups, lr))
    return Setup(learner, rows(images + offset, labels, steps=steps, seed=seed))


@torch.no_grad()
def centre_(net: nn.Sequential, x: Tensor) -> None:
    """Set the biases in front of rectifiers so that units are zero on average."""
    for layer, follower in zip(net, list(net)[1:], strict=False):
        if isinstance(follower, nn.ReLU):
            layer.bias -= layer(x).mean(0)
        x = layer(x)


if __name__ == "__main__":
    run(build, __doc__)
