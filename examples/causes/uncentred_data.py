"""Inputs far from zero kill half of the first layer
=================================================

**What happens.** With inputs whose mean is large against their spread (a temperature in Kelvin, white paper as 255),
the pre-activation w x is nearly the same number for all inputs: w times the mean. Its sign is random at
initialisation. If it is positive, the unit fires on everything and is linear; if negative, it fires on nothing. Half
of the layer dies, the other half is linear, and the same happens to the layers behind, whose inputs are never
centred, because they are the outputs of rectifiers.

**How it looks.** A high dead fraction at the first verdict with as high an always-on fraction beside it, worst in the
first layer; more die when the biases start to move. Accuracy suffers.

**The cure.** Subtract the mean of the training data, and divide by its standard deviation. In the middle of a
network: a normalisation layer.

**Source.** LeCun et al. 1998, "Efficient BackProp", section 4.3. For inputs symmetric about zero and no bias the
chance that a unit is silent on n points is 2^-n; sparse autoencoders die of the same: arXiv 2605.31518.

Run it: ``python examples/causes/uncentred_data.py [--picture FILE.png]``
"""

import torch
from common import Learner, Setup, adam, digits, mlp, rows, run


def build(
    cured: bool,
    *,
    seed: int = 0,
    width: int = 64,
    depth: int = 2,
    lr: float = 1e-3,
    steps: int = 300,
    offset: float = 5.0,
) -> Setup:
    torch.manual_seed(seed)
    images, labels = digits()
    data = images if cured else images + offset
    return Setup(Learner(mlp(64, *[width] * depth, 10), adam(lr)), rows(data, labels, steps=steps, seed=seed))


if __name__ == "__main__":
    run(build, __doc__)
