"""Weight decay on BatchNorm's scale closes channels
=================================================

**What happens.** Behind conv, BatchNorm, ReLU a channel fires where gamma x z + beta > 0, with z standardised over
the n values of the batch, so that abs(z) < sqrt(n). Optimizers are often told to spare every parameter whose name
ends with "bias". That spares beta, and decays gamma. Once gamma < -beta / max abs(z), no input lifts the channel
above zero, and then neither gamma nor beta gets a gradient: beta stays negative, gamma goes on shrinking.

**How it looks.** Channels die one after the other, late, at about 1 / (learning rate x decay) steps; gamma of the
dead ones goes to zero, beta is negative. Accuracy stays: these are channels that the task does not need. (Network
slimming uses this to prune.) Raising the *convolution's* bias does not help: BatchNorm subtracts it again.

**The cure.** Decay parameters of two or more dimensions only. The decay is strong here to take seconds.

The order of layers was no cause on digits: at SGD rates from 0.1 to 1.0 at most 2 % of the channels died with conv,
BatchNorm, ReLU, and none with conv, ReLU, BatchNorm; without BatchNorm 42 % died at 0.5. But behind a rectifier,
BatchNorm hides a dead channel, whose output becomes the constant beta.

**Sources.** The bound is Samuelson's inequality; Liu et al. 2017, arXiv 1708.06519, for slimming by gamma.

Run it: ``python examples/causes/batchnorm_decay.py [--picture FILE.png]``
"""

from typing import Any

import torch
from common import Learner, Setup, digits, rows, run
from torch import nn


def build(
    cured: bool,
    *,
    seed: int = 0,
    width: int = 16,
    depth: int = 3,
    lr: float = 0.1,
    steps: int = 300,
    decay: float = 0.2,
) -> Setup:
    torch.manual_seed(seed)
    images, labels = digits()
    net = cnn(width, depth)
    decayed = [p for name, p in net.named_parameters() if (p.ndim > 1 if cured else not name.endswith("bias"))]
    spared = [p for p in net.parameters() if all(p is not other for other in decayed)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": decay}, {"params": spared}]
    learner = Learner(net, lambda _: torch.optim.SGD(groups, lr, momentum=0.9))
    return Setup(learner, rows(images.view(-1, 1, 8, 8), labels, steps=steps, seed=seed))


def cnn(width: int, depth: int) -> nn.Sequential:
    net = nn.Sequential()
    for number in range(1, depth + 1):
        inputs, stride = (1, 1) if number == 1 else (width, 2)
        net.add_module(f"conv{number}", nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False))
        net.add_module(f"bn{number}", nn.BatchNorm2d(width))
        net.add_module(f"act{number}", nn.ReLU())
    for name, layer in (("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", nn.Linear(width, 10))):
        net.add_module(name, layer)
    return net


if __name__ == "__main__":
    run(build, __doc__)
