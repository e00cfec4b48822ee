"""ELU units do not die, but saturate, with next to no gradient
============================================================

**What happens.** Below zero the derivative of ELU is exp(z): 5 % at -3, 0.005 % at -10. A learning rate that is too
high moves units far below zero, exactly as it does with ReLU (``high_learning_rate.py``). There they put out -1
whatever the input. In theory they come back; in the time of a training they do not.

**How it looks.** No unit is called dead, for none is, and none is dormant by ReDo's score either: -1 is no small
output. The report's ``peak`` shows it: here a unit counts as saturated if its largest input of a window stayed below
-3, where the derivative is less than 5 % for all data. Smooth activations are watched when they are named:
``include=["elu"]``.

**The cure.** The same as for ReLU: a lower learning rate, clipping, normalisation. An ELU does not end the cause.

**Source.** Clevert et al. 2015, arXiv 1511.07289, for ELU and its saturation.

Run it: ``python examples/causes/elu_coma.py [--picture FILE.png]``
"""

import torch
from common import Learner, Setup, digits, mlp, rows, run, sgd
from torch import nn

from lightning_deadrelu import LivenessReport


def saturated(report: LivenessReport) -> float:
    return sum(int((site.peak < -3).sum()) for site in report.sites) / sum(site.units for site in report.sites)


def build(cured: bool, *, seed: int = 0, width: int = 64, depth: int = 3, lr: float = 0.2, steps: int = 300) -> Setup:
    torch.manual_seed(seed)
    learner = Learner(mlp(64, *[width] * depth, 10, activation=nn.ELU), sgd(lr / 10 if cured else lr))
    batches = rows(*digits(), steps=steps, seed=seed)
    return Setup(learner, batches, monitor={"include": ["elu"]}, share=saturated, label="saturated units")


if __name__ == "__main__":
    run(build, __doc__)
