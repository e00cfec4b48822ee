"""Units can be born dead: the output's bias, set in all layers
============================================================

**What happens.** For rare classes the *last* bias is often initialised to -log((1 - p) / p), so that the network
starts with the right prior: -2.2 for p = 0.1. Written as a loop over all layers, the same line puts every hidden unit
far below zero. Here an eighth of the first layer never fires, and the others fire rarely; the second layer, which
reads them, is dead from the first batch, every unit of it.

**How it looks.** The first verdict is as bad as the last: ``born_dead`` in the report, a flat curve, and a loss that
never moves.

**The cure.** He's initialisation with biases at zero; the prior in the last layer alone. In deep and narrow networks,
symmetric weights are enough to kill: one of 10 layers is constant at initialisation with probability 0.58 at width 3,
0.13 at width 5, and less than 0.01 at width 10.

**Sources.** Lin et al. 2017, arXiv 1708.02002, section 4.1, for the prior; Lu et al. 2019, arXiv 1903.06733, for
depth.

Run it: ``python examples/causes/bad_initialisation.py [--picture FILE.png]``
"""

import torch
from common import Learner, Setup, adam, digits, mlp, rows, run
from torch import nn


def build(cured: bool, *, seed: int = 0, width: int = 64, depth: int = 3, lr: float = 1e-3, steps: int = 300) -> Setup:
    torch.manual_seed(seed)
    net = mlp(64, *[width] * depth, 10)
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.constant_(layer.bias, -2.2 if layer is linear[-1] or not cured else 0.0)
    return Setup(Learner(net, adam(lr)), rows(*digits(), steps=steps, seed=seed))


if __name__ == "__main__":
    run(build, __doc__)
