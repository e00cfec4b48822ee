"""Promise 11: what is said is said once."""

import warnings

import pytest
from torch import nn
from toys import EVERYTHING, Log, Net, batches, fit

from lightning_deadrelu import DeadReLUMonitor

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the Trainer has no logger", "ignore:.*get no gradient", "ignore:.*no rectifier ran"
)


def test_a_model_without_rectifiers_is_trained_and_told_once():
    log, model, monitor = (
        Log(),
        Net(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))),
        DeadReLUMonitor(**EVERYTHING),
    )
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(model, batches(9), monitor, logger=log)
    assert sum("no rectifier ran in the observed batches" in str(warning.message) for warning in record) == 1
    assert log.verdicts() == []
    assert len(model.losses) == 9
    assert monitor.report.dead_fraction == 0.0


def test_dead_sites_are_told_once():
    with pytest.warns(UserWarning, match="and get no gradient") as record:
        fit(Net(), batches(12), DeadReLUMonitor(**EVERYTHING))
    told = [str(warning.message) for warning in record if "get no gradient" in str(warning.message)]
    assert sum("`net.1`" in text for text in told) == 1
    assert "dead at step 3: `net.1` (3 of 8 units)" in told[0]
