"""What log the units, against a slow loop that keeps every window's."""

from itertools import pairwise

import pytest
import torch
from toys import mlp

from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.explain.postmortem.incoming_weights import (
    Incoming,
    IncomingWeights,
    IncomingWeightsState,
    incoming_of,
)
from lightning_deadrelu.model.sites import Site

HOST = torch.device("cpu")
WIDTHS, WINDOWS = (5, 3, 4), 6


def site(number):
    return Site(f"relu{number}", False, "relu", (f"{number}.bias", f"{number}.weight"), WIDTHS[number], traced=True)


def layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(2, width, bias=number != 1) for number, width in enumerate(WIDTHS)))


def biases_of(layer):
    return torch.full((len(layer.weight),), torch.nan) if layer.bias is None else layer.bias.detach().clone()


def moved(net):
    with torch.no_grad():
        for p in net.parameters():
            p += torch.randn(p.shape)


@pytest.mark.parametrize("interrupted", [False, True])
def test_biases_and_weights_are_those_of_the_window_in_which_a_unit_last_fired(interrupted):
    net, log, sites = layers(), IncomingWeights(), [site(0), site(1)]
    met, starts, logs, fired = [0, 0, WINDOWS // 2], [], [], []
    for window in range(WINDOWS):
        if window == met[2]:
            sites.append(site(2))
        sources = incoming_of(sites, net)
        log.meet(sites, sources)
        logs.append([biases_of(layer) for layer in net])
        starts.append([layer.weight.detach().square().mean() for layer in net])
        moved(net)
        with torch.inference_mode(window % 2 == 0):
            weights = log.read(sites, sources, HOST)
        if interrupted:
            saved, log = encode(log.state), IncomingWeights()
            log.restore(decode(IncomingWeightsState, saved))
        ends = torch.tensor([0, *(one.units for one in sites)]).cumsum(0).tolist()
        places = [slice(*pair) for pair in pairwise(ends)]
        alive = torch.rand(ends[-1]) < 0.4
        fired.append(alive)
        log.close(alive, places, sources, weights, step=10 * window + 9)
    asked = [torch.randperm(one.units)[: one.units // 2 + 1] for one in sites]
    for number, (first, alive, now) in enumerate(log.biases(places, sources, asked)):
        last = [
            max((w for w in range(met[number], WINDOWS) if fired[w][unit]), default=met[number])
            for unit in range(*ends[number : number + 2])
        ]
        lived, units = torch.stack([logs[w][number][u] for u, w in enumerate(last)]), asked[number]
        torch.testing.assert_close(first, logs[met[number]][number], equal_nan=True)
        torch.testing.assert_close(alive, lived[units], equal_nan=True)
        torch.testing.assert_close(now, biases_of(net[number])[units], equal_nan=True)
        steps = torch.tensor([10 * w + 3 for w in last])
        squares = torch.stack([starts[w][number] for w in last])
        torch.testing.assert_close(log.squares(number, steps, float(weights[0, 0, number])), squares)


def test_of_a_large_layer_a_sample_is_read():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1
    sites, sources = [Site("relu", False, "relu", (), 512)], [Incoming(512, weight=weight)]
    now = IncomingWeights().read(sites, sources, HOST)[1, :, 0]
    torch.testing.assert_close(now, torch.tensor([0.05, -0.1]), rtol=0.1, atol=0.01)


def test_a_site_that_nothing_feeds():
    log, sites = IncomingWeights(), [Site("relu", False, "relu", (), 2)]
    assert log.read(sites, incoming_of(sites, mlp()), HOST).isnan().all()
    assert torch.cat(log.biases([slice(0, 2)], [Incoming(2)], [torch.arange(2)])[0]).isnan().all()
