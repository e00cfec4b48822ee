"""Warnings bear the line of the user's code that led to them."""

import pytest
from lightning.pytorch import Trainer
from toys import Net, bare, batches

from lightning_deadrelu import DeadReLUMonitor


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_warnings_of_a_fit_bear_the_line_that_called_it():
    told = iter([None, None])  # a mask for two batches, and a StopIteration at the third
    trainer = Trainer(**bare(callbacks=[DeadReLUMonitor(every_n_steps=1, mask=lambda batch: next(told))]))
    with pytest.warns(UserWarning, match="dead_relu") as caught:
        trainer.fit(Net(), batches(6))
    ours = [one for one in caught if str(one.message).startswith("dead_relu")]
    assert ["no logger" in str(one.message) for one in ours] == [True, False]
    assert "the monitor failed" in str(ours[1].message)
    assert {one.filename for one in ours} == {__file__}
