"""What tries other libraries notices what is wrong: shown on a network of our own."""

from dataclasses import replace
from pathlib import Path

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
    name, *row = cells(library, found)
    assert name.startswith("torch 2.")
    assert row[:-1] == ["MLP", "14 in 2", "2 of 2", "2 of 2"], found
    assert row[-1] == str(len(found["crossed"]) or "")
    wrong = {"broken": ["it is not watched"], "inexact": ["a", "b"], "other_weights": ["c"], "loud": ["d"]}
    told = "14 in 2; it is not watched; 2 masks inexact; 1 tensors not bit-identical; 1 warnings too many"
    assert cells(library, found | wrong)[2] == told
    assert cells(library, {"error": "a\nValueError: b\n"})[2:] == ["no: ValueError: b", "", "", ""]


def test_the_table_of_the_documentation_has_the_columns_that_are_printed():
    page = (Path(__file__).parents[2] / "docs/everywhere/libraries.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(COLUMNS)} |" in page.splitlines()


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
