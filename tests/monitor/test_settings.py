"""What the arguments of a monitor come to together."""

import pytest

from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.remedies import Reset


@pytest.mark.parametrize(
    ("settings", "all_rates"),
    [
        ({}, False),
        ({"remedy": "reset"}, False),
        ({"remedy": ["leaky", Reset(significance=0.01)]}, True),
        ({"all_rates": True}, True),
    ],
)
def test_rates_are_read_on_each_observation_where_a_remedy_goes_by_them(settings, all_rates):
    assert Settings(**settings).rules.all_rates == all_rates
