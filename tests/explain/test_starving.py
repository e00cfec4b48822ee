"""Which units Muon starves: against the updates that it makes, and by what is said of them."""

import pytest
import torch
from loops import looped
from torch import nn

from lightning_deadrelu import find_dead_units
from lightning_deadrelu.explain.starving import muon_rows, starving, update_sizes


def stepped(rows=24, columns=6, steps=3, **options):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(rows, columns))
    muon = torch.optim.Muon([weight], **{"lr": 0.1, "weight_decay": 0.0, "nesterov": False, **options})
    scale = torch.logspace(-3, 0, rows)[:, None]
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = scale * torch.randn(rows, columns)
        muon.step()
    return weight, muon, (weight - before).detach().norm(dim=1)


def test_sizes_are_those_of_the_updates_that_muon_makes():
    weight, muon, made = stepped()
    sizes = update_sizes([torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), muon], weight)
    torch.testing.assert_close(sizes, made / made.median(), rtol=0.05, atol=0.01)  # its own are of bfloat16
    assert sizes[0] < 0.1


def test_a_muon_that_keeps_its_coefficients_to_itself_has_the_usual_ones():
    """Others than torch's have `ns_steps` alone in their groups."""
    weight, muon, _ = stepped()
    known = update_sizes([muon], weight)
    del muon.param_groups[0]["ns_coefficients"], muon.param_groups[0]["eps"]
    torch.testing.assert_close(update_sizes([muon], weight), known)


@pytest.mark.parametrize("shape", [(6, 6), (6, 24)])
def test_of_matrices_that_are_not_tall_nothing_is_said(shape):
    weight, muon, _ = stepped(*shape)
    assert update_sizes([muon], weight) is None


def test_of_other_optimizers_and_before_the_first_step_nothing_is_said():
    weight = nn.Parameter(torch.randn(6, 2))
    weight.grad = torch.randn(6, 2)
    adam = torch.optim.AdamW([weight])
    adam.step()
    assert update_sizes([adam], weight) is None
    assert update_sizes([torch.optim.Muon([weight])], weight) is None


def report(dead=()):
    net = nn.Sequential(nn.Linear(2, 20), nn.ReLU())
    nn.init.constant_(net[0].bias, 5.0)
    net[0].bias.data[list(dead)] = -100.0
    return find_dead_units(net, [torch.rand(300, 2)])


def test_many_units_that_fire_and_are_hardly_updated_are_starved():
    sizes = torch.ones(20)
    sizes[:4] = 0.01
    finding = muon_rows(report()["1"], sizes)
    assert (finding.cause, finding.where, finding.confidence) == ("muon_rows", "1", "likely")
    assert "updates of 4 of 20 units (20%)" in finding.measured
    assert muon_rows(report(range(4))["1"], sizes) is None  # they are dead, and have no gradient
    sizes[1:4] = 1.0
    assert muon_rows(report()["1"], sizes) is None  # one alone


def test_without_muon_nothing_is_read():
    weight = nn.Parameter(torch.zeros(20, 2))
    assert starving(report(), {"1": weight}, [torch.optim.AdamW([weight])]) == []


def test_a_monitor_says_so_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 1))
    nn.init.constant_(model[0].bias, 5.0)
    with torch.no_grad():
        model[2].weight[:, :10] *= 1e-3  # their gradients are small
    monitor, loop = looped(model, checkup=True)
    biases = torch.optim.SGD([model[0].bias, *model[2].parameters()], 1e-6)
    loop.optimizers = [torch.optim.Muon([model[0].weight], 1e-4), biases]
    monitor.start()
    for step in range(12):
        batch = torch.randn(64, 4)
        monitor.begin_batch()
        monitor.note_batch(batch)
        loss = (model(batch) - batch.prod(1, keepdim=True)).square().mean()
        monitor.before_backward()
        for optimizer in loop.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in loop.optimizers:
            monitor.before_step(optimizer)
            optimizer.step()
        monitor.end_batch(loss.detach(), batch, step)
    found = [finding for finding in monitor.progress.findings if finding.cause == "muon_rows"]
    assert [finding.where for finding in found] == ["1"]
    assert " of 40 units (" in found[0].measured
    assert sum("muon_rows" in text for text in loop.said) == 1
    monitor.conclude()
