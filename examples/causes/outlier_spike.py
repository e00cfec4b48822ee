"""A single bad batch is enough to kill units
==========================================

**What happens.** One corrupt batch (here: in centimetres instead of metres, and wrongly labelled) has a gradient many
times larger than usual. One step along it moves the weights so far that the next steps, on good batches, are too
large as well, and momentum keeps pushing the same way; see ``high_learning_rate.py``. The loss recovers, the units do
not.

**How it looks.** A flat curve up to the bad batch, and a rise right after it, here in the second layer; a spike in
the loss and in the gradient's norm at that batch.

**The cure.** Clip the gradient's norm: ``Trainer(gradient_clip_val=1.0)``. Then one batch has no more weight than
another. Then look at the batch itself: decoding errors, a missing normalisation, a wrong unit.

**Source.** Pascanu et al. 2013, arXiv 1211.5063, for clipping.

Run it: ``python examples/causes/outlier_spike.py [--picture FILE.png]``
"""

import torch
from common import Learner, Setup, digits, mlp, rows, run, sgd


def build(cured: bool, *, seed: int = 0, width: int = 64, depth: int = 2, lr: float = 0.02, steps: int = 300) -> Setup:
    torch.manual_seed(seed)
    learner = Learner(mlp(64, *[width] * depth, 10), sgd(lr))
    batches = rows(*digits(), steps=steps, seed=seed)
    images, labels = batches[steps // 2]
    batches[steps // 2] = images * 100, (labels + 1) % 10
    return Setup(learner, batches, {"gradient_clip_val": 1.0} if cured else {})


if __name__ == "__main__":
    run(build, __doc__)
