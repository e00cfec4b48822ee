"""What an autopsy says of layers, and how it prints."""

import json

import torch
from torch import nn

from lightning_deadrelu import autopsy


def trained(steps=400, dead=((3, 100), (2, 250)), make=torch.optim.AdamW, **options):
    """Train a net; kill so many units of its first layer so many steps before the end."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = make(net.parameters(), 1e-3, **options)
    for step in range(steps):
        first = 0
        for units, age in dead:
            if step == steps - age:
                net[0].bias.data[first : first + units] = -100.0
            first += units
        optimizer.zero_grad()
        (net(torch.randn(16, 8)) - torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
    return net, optimizer


def test_it_says_who_has_had_no_gradient_and_for_how_long():
    found = autopsy(*trained())
    first, last = found.layers
    assert (first.name, first.units, last.name, last.units) == ("0", 32, "2", 4)
    assert first.without_gradient.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert not last.without_gradient.any()
    torch.testing.assert_close(
        first.ages[:5].double(), torch.tensor([100.0] * 3 + [250.0] * 2).double(), atol=8, rtol=0
    )
    assert sorted(found.ages.tolist()) == sorted(first.ages[:5].tolist())


def test_it_prints_a_table_and_a_histogram_in_80_columns():
    text = str(autopsy(*trained()))
    lines = text.splitlines()
    assert lines[0] == "5 of 36 units have had no gradient for long, by the optimizer's momentum."
    assert max(map(len, lines)) <= 80
    assert "Steps since the last gradient, an estimate:" in lines
    bars = [line for line in lines[lines.index("Units by these steps:") :] if "█" in line]
    assert [line.split()[-1] for line in bars] == ["3", "2"]
    assert bars[0].count("█") > bars[1].count("█") > 0


def test_long_names_fit():
    net, optimizer = trained()
    for depth in range(8):
        net = nn.Sequential() if net is None else nn.ModuleDict({f"a_module_with_a_long_name_{depth}": net})
    assert max(map(len, str(autopsy(net, optimizer)).splitlines())) <= 80


def test_a_healthy_net_takes_one_line():
    assert str(autopsy(*trained(100, ()))) == "0 of 36 units have had no gradient for long."


def test_without_a_momentum_that_tells_it_says_what_it_takes():
    found = autopsy(*trained(20, (), torch.optim.Adam, weight_decay=0.1))
    assert found.layers == ()
    assert str(found).startswith("No layer can be dated: that takes the state of Adam")


def test_it_becomes_json():
    plain = json.loads(json.dumps(autopsy(*trained()).to_dict()))
    assert plain["layers"][0]["ages"][5:] == [0] * 27
    assert plain["layers"][0]["ages"][0] > 90
