"""A loss in bfloat16 makes Adam spike
===================================

**What happens.** Where a classifier is nearly sure, the gradient of a cross-entropy is the difference between 1 and a
number close to it. In bfloat16, of three digits, that difference is zero or a whole rounding step, and the gradients
of the classes do not add up to zero any more. What is left is noise, which comes seldom and is large beside Adam's
faded second moment: each time it comes, the steps are many times as large as usual.

**How it looks.** A loss next to zero, with sudden spikes of a hundredfold and more; the dead fraction rises by a step
at each of them. In float32, the same network on the same data has none.

**The cure.** The loss in float32: ``cross_entropy(logits.float(), labels)``. Autocast does that by itself
(``precision="bf16-mixed"``); ``"bf16-true"`` and logits that were cast by hand do not.

**Sources.** arXiv 2605.06152 for rounding in the softmax; arXiv 2506.04805 for Adam's spikes.

Run it: ``python examples/causes/low_precision.py [--picture FILE.png]``
"""

import torch
from common import Learner, Setup, adam, digits, mlp, run
from torch import Tensor, nn

LEAST = 400  # steps


def rounded(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.bfloat16(), labels)


def build(
    cured: bool, *, seed: int = 0, width: int = 128, layers: int = 5, lr: float = 0.0075, steps: int = LEAST
) -> Setup:
    torch.manual_seed(seed)
    net, optimizer = mlp(64, *[width] * layers, 10), adam(lr, betas=(0.0, 0.99), eps=1e-15)
    batch = tuple(one[:64] for one in digits())
    return Setup(
        Learner(net, optimizer, nn.functional.cross_entropy if cured else rounded), [batch] * max(steps, LEAST)
    )


if __name__ == "__main__":
    run(build, __doc__)
