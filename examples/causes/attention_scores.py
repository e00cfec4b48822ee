"""ReLU attention without a division by length loses its heads
===========================================================

**What happens.** A head's score for a token is relu(w t + b), and its output the *sum* of score x value over all
tokens. Without a softmax the sum grows with the number of tokens, and so does the gradient of w, to which all tokens
contribute. After one step too large the score is zero for every token of every input, and neither w nor the head's
values get a gradient again.

**How it looks.** Each head is one unit here, so the curve rises in steps of 1 / heads, often to 100 %. Then the
network's output is constant, and the loss that of guessing.

**The cure.** Divide the scores by the length of the sequence. With a softmax over rectified scores no head died on
digits, at SGD rates of 0.1 and 0.5: there a push common to all tokens cancels.

**Source.** Wortsman et al. 2023, arXiv 2309.08586, for the division by length.

Run it: ``python examples/causes/attention_scores.py [--picture FILE.png]``
"""

import torch
from common import Learner, Setup, digits, rows, run, sgd
from torch import Tensor, nn


class Attention(nn.Module):
    """The rows of an image are tokens; each head scores them by itself, and sums their values."""

    def __init__(self, heads: int, width: int, divisor: float) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) / 2)
        self.score, self.act = nn.Linear(width, heads), nn.ReLU()
        self.value, self.head = nn.Linear(width, width), nn.Linear(heads * width, 10)
        self.divisor = divisor

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.tanh(self.embed(images) + self.place)
        scores = self.act(self.score(tokens)) / self.divisor
        return self.head((scores.mT @ self.value(tokens)).flatten(1))  # type: ignore[no-any-return]


def build(cured: bool, *, seed: int = 0, width: int = 32, heads: int = 16, lr: float = 0.2, steps: int = 300) -> Setup:
    torch.manual_seed(seed)
    images, labels = digits()
    net = Attention(heads, width, 8 if cured else 1)
    return Setup(Learner(net, sgd(lr)), rows(images.view(-1, 8, 8), labels, steps=steps, seed=seed), label="dead heads")


if __name__ == "__main__":
    run(build, __doc__)
