"""Promise 9 at the door: what cannot work is refused before training, with what was written, why, and a mend."""

import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn
from toys import EVERYTHING, Net, bare, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor, find_dead_units


def refused(*monitors, model=None, steps=1, **options):
    """Fit, and return the refusal; it comes before the second training batch."""
    model = model or Net()
    with pytest.raises(MisconfigurationException) as refusal:
        fit(model, batches(12), *monitors, **options)
    assert len(model.losses) <= steps
    return str(refusal.value)


class Pixels(Net):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 6), nn.ReLU()))

    def forward(self, x):
        return self.net(x.view(-1, 1, 2, 2))


@pytest.mark.parametrize("dim", [2, 7, -3])
def test_a_dimension_out_of_range_is_refused_at_the_first_batch(dim):
    told = refused(DeadReLUMonitor(unit_dims={"net.1": dim}))
    assert told == (
        f"DeadReLUMonitor: `unit_dims={{'net.1': {dim}}}`: the input of `net.1` has shape (5, 8), and so dimensions"
        " from -2 to 1. Try `unit_dims={'net.1': 1}`."
    )


def test_a_dimension_that_only_some_inputs_have_is_refused_for_the_others():
    told = refused(DeadReLUMonitor(unit_dims={"net.*": -3}), model=Pixels())
    assert "`unit_dims={'net.*': -3}`: the input of `net.4` has shape (5, 6)" in told


def test_a_model_of_one_rectifier_that_has_not_the_dimension_is_refused_as_early():
    assert "from -2 to 1" in refused(
        DeadReLUMonitor(unit_dims={"*": 4}), model=Net(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    )


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_dimensions_in_range_are_taken(dim):
    fit(Net(), batches(4), monitor := DeadReLUMonitor(unit_dims={"net.1": dim}, **EVERYTHING))
    assert monitor.report["net.1"].units == (8 if dim in (1, -1) else 5)


def test_a_folder_that_cannot_be_written_is_refused_at_fit_start(tmp_path):
    (tmp_path / "notes.txt").touch()
    for folder in ("notes.txt", "notes.txt/reports"):
        told = refused(DeadReLUMonitor(report_dir=str(tmp_path / folder)), steps=0)
        assert f"report_dir='{tmp_path / folder}')`: the report is written when training ends, and" in told
        assert f"`{tmp_path / 'notes.txt'}` is a file. Try `report_dir=" in told


def test_a_folder_without_permission_is_refused_at_fit_start(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # who runs the tests may be allowed everything
    told = refused(DeadReLUMonitor(report_dir=tmp_path / "a" / "b"), steps=0)
    assert f"`{tmp_path}` may not be written into" in told


def test_a_folder_that_is_not_there_yet_is_made_at_the_end(tmp_path):
    fit(Net(), batches(4), DeadReLUMonitor(report_dir=str(tmp_path / "a" / "b"), **EVERYTHING))
    assert (tmp_path / "a" / "b" / "report.html").exists()


class Other(DeadReLUMonitor):
    """Has another key in checkpoints, so that Lightning does not refuse it beside a plain one."""


def test_two_monitors_of_one_name_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DeadReLUMonitor`"):
        Trainer(**bare(callbacks=[DeadReLUMonitor(), DeadReLUMonitor()]))
    told = refused(DeadReLUMonitor(), Other(), steps=0)
    assert told == (
        "`DeadReLUMonitor(name='dead_relu')` is there 2 times, and all would log under the same keys. Give each a name"
        ' of its own, such as `name="dead_relu_2"`.'
    )
    fit(Net(), batches(2), DeadReLUMonitor(), Other(name="dead_relu_2"))


@pytest.mark.parametrize("name", ["a/b", "", "a b", "1st", None])
def test_a_name_that_makes_no_key_is_refused_at_once(name):
    with pytest.raises(MisconfigurationException, match=r"it takes letters, digits and underscores\. Try `name="):
        DeadReLUMonitor(name=name)


@pytest.mark.parametrize("kinds", [("GELU",), ("SiLU", "ELU")])
def test_a_model_of_smooth_activations_is_told_what_can_be_watched(kinds):
    layers = [layer for kind in kinds for layer in (nn.Linear(4, 4), getattr(nn, kind)())]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(Net(nn.Sequential(*layers, nn.Linear(4, 1))), batches(1), DeadReLUMonitor())
    (told,) = (str(one.message) for one in record if "no rectifier ran" in str(one.message))
    names = sorted(kind.lower() for kind in kinds)
    assert told.endswith(f"of which no unit can be dead; to have them watched for dormancy, try `include={names}`.")
    fit(Net(nn.Sequential(*layers, nn.Linear(4, 1))), batches(1), monitor := DeadReLUMonitor(include=names))
    assert len(monitor.report.sites) == len(kinds)


X = torch.rand(3, 4)
WRONG = {
    "swapped": (([X], mlp()), r"`find_dead_units\(list, Sequential\)`.*Swap them: `find_dead_units\(model, batches\)`"),
    "swapped loader": ((batches(2), mlp()), r"`find_dead_units\(DataLoader, Sequential\)`.*Swap them"),
    "no model": (("resnet", [X]), r"the first argument is the model, and this is none. Pass an `nn.Module`"),
    "a tensor": ((mlp(), X), r"this is one batch, and would be taken apart. Try `find_dead_units\(model, \[batch\]\)`"),
    "a mapping": ((mlp(), {"x": X}), "this is one batch"),
    "a number": ((mlp(), 3), "the second argument holds no batches. Pass a `DataLoader`, or a list of batches"),
    "two models": ((mlp(), mlp()), "the second argument holds no batches"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_in_wrong_places_are_refused(case):
    arguments, why = WRONG[case]
    with pytest.raises(TypeError, match=why):
        find_dead_units(*arguments)
