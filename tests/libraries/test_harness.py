"""What tries other libraries notices what is wrong: shown on a network of our own."""

from dataclasses import replace

import pytest
import torch
from libraries import harness
from libraries.harness import SETTINGS, Library, Listening, Plant, Recording, differences, trained
from libraries.run import COLUMNS, cells
from lightning.pytorch import Trainer
from torch import nn
from toys import Net, batches

from lightning_deadrelu import LivenessReport

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*`isinstance"),
]


def train(steps, options):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
    Trainer(max_epochs=1, **options).fit(Net(net), batches(steps, 40))


def runs():
    recording, monitor = Recording(), Listening(**SETTINGS)
    trained(train, Plant("net.0.bias"), recording)
    trained(train, Plant("net.0.bias"), monitor)
    return recording, monitor


def test_a_network_in_which_all_is_well_has_a_row_that_says_so():
    library = Library("torch", "MLP", train, "net.0.bias", "net.1")
    found = harness.examine(library)
    row = dict(zip(COLUMNS, cells(library, found), strict=True))
    assert row.pop("library").startswith("torch 2.")
    assert row.pop("quiet").startswith("yes"), found["loud"]
    assert list(row.values()) == ["MLP", "yes: 14 units in 2", "yes", "yes", "2 of 2", "2 of 2"]


def test_a_verdict_of_which_one_unit_is_wrong_is_named():
    recording, monitor = runs()
    assert differences(recording, monitor) == []
    seen, report = monitor.verdicts[-1]
    site = report["net.3"]
    lie = replace(site, dead=site.dead ^ (torch.arange(6) == 5))
    monitor.verdicts[-1] = seen, LivenessReport((report["net.1"], lie), report.step)
    assert differences(recording, monitor) == [f"`dead` of `net.3` at batch {seen}"]


def test_a_call_that_no_site_stands_for_is_counted():
    recording, monitor = runs()
    monitor.batches[-1].pop()
    assert harness.unseen(recording, monitor) == {"relu": 1}


def test_weights_that_differ_by_one_bit_are_named():
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    assert harness.other(weights, {"a": torch.ones(2), "b": torch.tensor([1.0, 1.0000001])}) == ["b"]
