import io

import pytest
import torch
from counting import calls_of
from torch import nn
from toys import mlp

from lightning_deadrelu.attribution import Tracer, plain
from lightning_deadrelu.attribution.connectivity import Connectivity
from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.observe.probe import Probe


class Tied(nn.Module):
    """Uses one weight twice, reads units out of sight and in a norm, and rectifies one part twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x):
        hidden = self.norm(self.first(x)).relu()
        odd = hidden.cumsum(1) + (self.first.weight @ hidden.T).T.relu()
        return self.second(hidden + odd).relu()


class Attending(nn.Module):
    """Mixes units over samples by scores; a frozen layer reads them too, and no loss hears of it."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.idle = nn.Linear(4, 2).requires_grad_(False)

    def forward(self, x):
        hidden = (x @ x.T).softmax(-1) @ self.first(x).relu()
        self.idle(hidden)
        return self.head(hidden)


MODELS = {
    "a chain": (mlp(), (5, 4)),
    "convolutions": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)), (2, 3, 6, 6)),
    "tied weights": (Tied(), (5, 4)),
    "scores and an idle reader": (Attending(), (5, 4)),
}


def traced(model, shape):
    tracer, probe = Tracer(model), Probe(model, lambda *call: None)
    probe.router.subscribe_calls(tracer)
    with probe:
        model(torch.randn(shape)).sum().backward()
    return tracer


@pytest.mark.parametrize("name", MODELS)
def test_what_is_known_outlasts_a_checkpoint(name):
    model, shape = MODELS[name]
    tracer, again = traced(model, shape), Tracer(model)
    torch.save(encode(tracer.state), buffer := io.BytesIO())
    buffer.seek(0)
    again.restore(decode(Connectivity, torch.load(buffer, weights_only=True)))
    expected, found = tracer.attributions(), again.attributions()
    assert {site: plain(one) for site, one in found.items()} == {site: plain(one) for site, one in expected.items()}
    assert found
    assert (again.known.used, again.known.order) == (tracer.known.used, tracer.known.order)
    assert again.sole_readers().keys() == tracer.sole_readers().keys()
    assert all(again.known.other_readers(name) == tracer.known.other_readers(name) for name in tracer.known.used)


@pytest.mark.parametrize("ask", [Tracer.attributions, Tracer.sole_readers])
def test_the_work_of_all_answers_grows_with_the_number_of_layers(ask):
    models = (
        nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(4, 4), nn.ReLU())))
        for layers in (1, 20, 40, 80)
    )
    _, few, some, many = (calls_of(lambda tracer=traced(model, (5, 4)): ask(tracer)) for model in models)
    assert many - some < 2.2 * (some - few)
