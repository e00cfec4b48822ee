"""Adam spikes at a loss near zero
===============================

**What happens.** Adam divides each gradient by the root of its second moment, an average over 1 / (1 - beta2) steps.
On data that a network fits to the end, gradients go to zero, and the second moment follows. So steps stay as large as
the learning rate, while the minimum grows sharp. Once a step overshoots, the next gradient is larger, and the second
moment is too slow to follow: errors grow from step to step, until a step is large enough to kill units. Neither the
learning rate nor the data changed.

**How it looks.** A calm loss, near zero, that rises by about the same factor at each of some ten steps, and the
gradients with it. Then the dead fraction jumps within one to three steps, without a warning.

**The cure.** A larger ``eps``, here 1e-3: steps become smaller once the second moment is below its square. A lower
learning rate works too. A first moment (here beta1 is 0, as is usual in GANs) delays the spike, and ``amsgrad=True``
did not prevent it.

**Sources.** arXiv 2506.04805 for the spikes; Thilak et al. 2022, arXiv 2206.04817, "the slingshot mechanism".

Run it: ``python examples/causes/adam_spike.py [--picture FILE.png]``
"""

import torch
from common import Learner, Setup, adam, digits, mlp, run
from torch import nn

LEAST = 600  # steps; the spike comes after 200 to 500


def build(
    cured: bool, *, seed: int = 0, width: int = 64, layers: int = 5, lr: float = 0.009, steps: int = LEAST
) -> Setup:
    torch.manual_seed(seed)
    images, labels = (one[:64] for one in digits())
    optimizer = adam(lr, betas=(0.0, 0.995), eps=1e-3 if cured else 1e-15)
    learner = Learner(mlp(64, *[width] * layers, 10), optimizer, nn.functional.mse_loss)
    return Setup(learner, [(images, nn.functional.one_hot(labels, 10).float())] * max(steps, LEAST))


if __name__ == "__main__":
    run(build, __doc__)
