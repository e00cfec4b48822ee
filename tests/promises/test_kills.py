"""Promise 7 at random points: see the benchmark of the same name, of which this is a small part."""

import kills
import pytest
from expected import MESSAGES


@pytest.mark.slow
@pytest.mark.filterwarnings(*(f"ignore:{message}" for message in MESSAGES))  # in the processes that are killed, too
def test_killed_or_interrupted_anywhere_a_run_goes_on_as_if_nothing_had_been():
    for tally in kills.run(3, 3, steps=40, seed=1).values():
        assert (tally.points, tally.equal, tally.left) == (3, 3, 0), tally.wrong
