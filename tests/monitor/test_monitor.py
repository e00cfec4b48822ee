import copy
import io

import pytest
import torch
from loops import looped, net, train
from toys import Loader, Net, Verdicts, assert_same, fit, reports_of, run_of

from lightning_deadrelu import LivenessReport
from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.monitor.host import Misuse
from lightning_deadrelu.monitor.state import MonitorState
from lightning_deadrelu.report.raster import State

BATCHES = list(torch.randn(30, 6, 4, generator=torch.Generator().manual_seed(3)))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(monitor, **settings):
    """Go on from what a monitor saves, with a copy of its model."""
    state = through_a_file(monitor.state())
    other, loop = looped(copy.deepcopy(monitor.watch.probe.model), **settings)
    other.start(state)
    return other, loop


def plain(value):
    """Values that are equal if two states are, NaN included."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), str(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else str(value)


# -- a loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remedy", [None, "reset"])
def test_a_plain_loop_gives_the_verdicts_and_edits_of_the_callback(remedy):
    model = Net(net(), lr=1e-3, optimizer=torch.optim.SGD)
    callback = Verdicts(every_n_steps=1, window=4, min_samples=1, remedy=remedy)
    model.training_step = lambda batch, batch_idx: model(batch).square().mean()
    fit(model, Loader(BATCHES[:20]), callback)
    monitor, loop = looped(Net(net()), remedy=remedy)
    monitor.start()
    reports = train(monitor, loop, BATCHES[:20])
    assert_same(list(map(LivenessReport.to_dict, reports)), reports_of(callback))
    assert [event.action for event in monitor.repair.events] == [event.action for event in callback.events]
    assert_same(loop.model.state_dict(), model.state_dict())


def test_what_is_told_at_the_end():
    monitor, loop = looped(net())
    monitor.start()
    train(monitor, loop, BATCHES[:6])
    report = monitor.last_verdict()
    monitor.conclude()
    assert report.step == 5
    assert [run.report for run in loop.concluded] == [report]
    assert loop.score == report.dead_fraction == 3 / 8
    assert monitor.last_verdict() is None  # nothing was observed since
    assert not monitor.running


def test_a_failure_ends_the_watch_and_not_the_loop(monkeypatch):
    monitor, loop = looped(net())
    monitor.start()
    monkeypatch.setattr(monitor.repair, "note_loss", lambda loss: 1 / 0)
    with pytest.warns(UserWarning, match=r"(?s)watches no longer.*ZeroDivisionError"):
        assert train(monitor, loop, BATCHES) == []
    assert isinstance(monitor.guard.failure, ZeroDivisionError)
    assert decode(MonitorState, monitor.state()).run is None


def test_a_pattern_that_matches_nothing_is_refused_in_the_words_of_the_loop():
    monitor, loop = looped(net(), include=["relu7"])
    monitor.start()
    with pytest.raises(Misuse, match=r"relu7.*matches no activation"):
        train(monitor, loop, BATCHES)


# -- provisional verdicts ----------------------------------------------------------------------------------


def newly_dead(report):
    return sum(int(site.newly_dead.sum()) for site in report.sites)


@pytest.mark.parametrize("goes_on", [False, True], ids=["uninterrupted", "resumed"])
def test_a_death_is_told_once_also_if_the_window_was_looked_at_before_its_end(goes_on):
    monitor, loop = looped(net())
    monitor.start()
    train(monitor, loop, BATCHES[:2])
    look = monitor.provisional_verdict()
    if goes_on:
        monitor, loop = resumed(monitor)
    first, second = train(monitor, loop, BATCHES[2:8])
    assert [newly_dead(report) for report in (look, first, second)] == [3, 0, 0]
    assert list(monitor.run_report.history.curves["newly_dead_units"]) == [3, 0]  # of whole windows
    assert first["act"].dead.tolist() == look["act"].dead.tolist()


def test_who_comes_back_after_a_look_is_told_as_revived():
    monitor, loop = looped(net())
    monitor.start()
    train(monitor, loop, BATCHES[:2])
    monitor.provisional_verdict()
    with torch.no_grad():
        loop.model[0].bias[0] = 5.0
    (report,) = train(monitor, loop, BATCHES[2:4])
    assert report["act"].revived.tolist() == [True] + [False] * 7


def test_a_run_that_goes_on_tells_the_open_window_as_if_it_had_not_ended():
    whole, loop = looped(net())
    whole.start()
    expected = train(whole, loop, BATCHES[:4])[0]
    ended, loop = looped(net())
    ended.start()
    train(ended, loop, BATCHES[:2])
    ended.last_verdict()
    ended.conclude()
    later, loop = resumed(ended)
    assert_same(train(later, loop, BATCHES[2:4])[0].to_dict(), expected.to_dict())


def test_edits_before_a_look_are_told_once_and_stay_in_the_history():
    monitor, loop = looped(net())
    monitor.start()
    train(monitor, loop, BATCHES[:2])
    monitor.repair.edited = {"act": [1]}
    monitor.provisional_verdict()
    monitor.repair.edited["act"].append(2)
    train(monitor, loop, BATCHES[2:3])
    monitor.last_verdict()
    monitor.conclude()
    later, other = resumed(monitor)
    train(later, other, BATCHES[3:4])
    assert [one["edited"] for one in (*loop.published, *other.published)] == [1, 1, 1]  # the last look is taken anew
    states = later.run_report.history.sites["act"].states[:, 0]
    assert (states == State.REPAIRED).nonzero().flatten().tolist() == [1, 2]


# -- resume ------------------------------------------------------------------------------------------------


def test_findings_outlive_a_checkpoint_and_are_not_looked_for_again():
    model = net(units=32)
    torch.nn.init.constant_(model[0].bias, -10.0)
    monitor, loop = looped(model, checkup=True)
    monitor.start()
    train(monitor, loop, [torch.cat(BATCHES), *BATCHES[:2]])
    found = monitor.progress.findings
    assert "negative_bias" in [finding.cause for finding in found]
    later, loop = resumed(monitor, checkup=True)
    train(later, loop, BATCHES[3:6])
    assert later.run_report.findings == found
    assert not any("check-up" in text for text in loop.said)


def test_a_run_saved_before_the_first_observation_ends_looks_for_findings_later():
    monitor, loop = looped(net(), checkup=True)
    monitor.start()
    later, loop = resumed(monitor, checkup=True)
    train(later, loop, BATCHES[:1])
    assert later.progress.checked
    assert any("the check-up found" in text for text in loop.said)


EVERYTHING = {"remedy": ["bias_warming", "reset", "leaky", "gelu"], "gradient_evidence": True, "checkup": True}


def test_every_state_of_a_run_makes_the_round_trip():
    monitor, loop = looped(net(), **EVERYTHING)
    monitor.start()
    for batch in BATCHES:
        state = monitor.state()
        again = encode(decode(MonitorState, through_a_file(state)))
        assert plain(again) == plain(state)
        train(monitor, loop, [batch])
    run = run_of(monitor.state())
    assert run.repair.events
    assert run.evidence is not None
    assert run.progress.checked
