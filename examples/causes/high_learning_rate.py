"""A learning rate that is too high moves units out of reach of all data
=====================================================================

**What happens.** A step moves a unit's weights by learning rate x gradient. When the step is larger than the unit's
own pre-activations, it can carry them below zero for every input at once. From then on the gradient is exactly zero,
and nothing brings the unit back. Momentum keeps pushing the same way after the gradient has stopped, and kills
further units.

**How it looks.** The dead fraction jumps within the first tens of steps, most in the layers that got the largest
gradients, and stays; the loss jumps or sits at that of guessing. The threshold is sharp: below it nearly nothing
dies.

**The cure.** A tenth of the learning rate here. In general: the largest rate at which the dead fraction stays flat,
reached by a warm-up; gradient clipping.

**Sources.** CS231n's notes (up to 40 % of a network "dead" at a high learning rate); Arnekvist et al. 2020, arXiv
2005.06365, for momentum.

Run it: ``python examples/causes/high_learning_rate.py [--picture FILE.png]``
"""

import torch
from common import Learner, Setup, digits, mlp, rows, run, sgd


def build(cured: bool, *, seed: int = 0, width: int = 64, depth: int = 3, lr: float = 0.4, steps: int = 300) -> Setup:
    torch.manual_seed(seed)
    net = mlp(64, *[width] * depth, 10)
    return Setup(Learner(net, sgd(lr / 10 if cured else lr)), rows(*digits(), steps=steps, seed=seed))


if __name__ == "__main__":
    run(build, __doc__)
