"""When tasks follow one another, units die task by task
=====================================================

**What happens.** Each new task (here: the same digits with other pixels permuted) is a shock to weights that fit the
one before: for some steps errors and gradients are large, and move units below zero, as in ``high_learning_rate.py``.
One shock kills few units, but few of these come back. So fewer are left after each task, and the network learns less
and less: loss of plasticity.

**How it looks.** A rise from task to task that does not show in any one of them. The first task, at the same learning
rate, kills next to nothing.

**The cure.** ``remedy="reset"`` redraws the incoming weights of dead units and sets the outgoing ones to zero. In the
literature leaky rectifiers alone do not restore plasticity, and L2 raises the number of dead units.

**Sources.** Dohare et al. 2024, Nature 632, 768; Sokar et al. 2023, arXiv 2302.12902 (ReDo).

Run it: ``python examples/causes/continual_learning.py [--picture FILE.png]``
"""

import torch
from common import Batches, Learner, Setup, digits, mlp, rows, run, sgd

from lightning_deadrelu import Reset

TASKS = 8


def build(cured: bool, *, seed: int = 0, width: int = 64, depth: int = 2, lr: float = 0.1, steps: int = 480) -> Setup:
    torch.manual_seed(seed)
    learner = Learner(mlp(64, *[width] * depth, 10), sgd(lr))
    remedy = Reset(evidence=300, cooldown=1, attempts=None) if cured else None
    return Setup(learner, tasks(steps // TASKS, seed), monitor={"threshold": 0.0, "remedy": remedy})


def tasks(steps: int, seed: int) -> Batches:
    images, labels = digits()
    batches: Batches = []
    for task in range(TASKS):
        permuted = images[:, torch.randperm(64)]
        batches += rows(permuted, labels, steps=steps, seed=TASKS * seed + task, size=32)
    return batches


if __name__ == "__main__":
    run(build, __doc__)
