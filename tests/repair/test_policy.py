"""When a remedy acts, whether it helped, and which comes next."""

import math
from dataclasses import dataclass, replace

import torch
from views import site

from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.remedies import Edits, Remedy
from lightning_deadrelu.repair.event import Event, Loss
from lightning_deadrelu.repair.policy import EscalationPolicy, PolicyState
from lightning_deadrelu.statistics import LivenessReport


@dataclass(frozen=True, kw_only=True)
class First(Remedy):
    cooldown: int = 2

    def propose(self, view, generator):
        return Edits()


@dataclass(frozen=True, kw_only=True)
class Second(First):
    pass


@dataclass(frozen=True, kw_only=True)
class Exact(First):
    @property
    def is_exact(self):
        return True


@dataclass(frozen=True, kw_only=True)
class WithFrozen(First):
    @property
    def treats_frozen(self):
        return True


def report(*sites, step=0):
    return LivenessReport(tuple(sites), step)


def ladder(*rungs, threshold=0.1, min_samples=299):
    return EscalationPolicy(rungs or (First(),), threshold, min_samples)


def run(it, verdicts, loss=None):
    """Give one verdict after the other, edit what is asked for at once, and list what happened."""
    told = []
    for step, verdict in enumerate(verdicts):
        now = report(*verdict, step=step) if isinstance(verdict, tuple) else report(verdict, step=step)
        requests, events = it.decide(now, loss[step] if loss else None)
        told += [(event.step, event.action) for event in events]
        for request in requests:
            before = now[request.site].dead_fraction
            told.append((step, it.edited(request, request.units, before, loss[step] if loss else None, step).action))
    return told


def test_only_what_is_strictly_above_the_threshold_is_treated():
    assert ladder().decide(report(site(dead=[1])))[0] == []
    (request,), _ = ladder().decide(report(site(dead=[1, 4])))
    assert request.site == "fc"
    assert request.units.nonzero().flatten().tolist() == [1, 4]
    assert ladder(threshold=0).decide(report(site(dead=[1])))[0]
    assert not ladder(threshold=0).decide(report(site()))[0]


def test_an_edit_asks_for_the_evidence_of_a_verdict_or_for_more():
    assert not ladder().decide(report(site(dead=range(5), age=298)))[0]
    assert ladder().decide(report(site(dead=range(5), age=299)))[0]
    assert not ladder(First(evidence=2990)).decide(report(site(dead=range(5), age=2989)))[0]
    assert ladder(First(evidence=2990)).decide(report(site(dead=range(5), age=2990)))[0]


def test_frozen_layers_and_smooth_sites_are_left_alone():
    assert not ladder().decide(report(site(dead=range(5), trainable=False)))[0]
    assert not ladder().decide(report(replace(site(dead=range(5)), smooth=True)))[0]


def test_patience_counts_verdicts_in_a_row():
    bad, good = site(dead=range(5)), site()
    assert run(ladder(First(patience=3)), [bad, bad, good, bad, bad, bad]) == [(5, "edited")]


def test_it_acts_between_start_and_stop():
    bad = site(dead=range(5))
    it = ladder(First(start_step=2, stop_step=4, cooldown=1, attempts=None))
    assert [told for told in run(it, [bad] * 8) if told[1] == "edited"] == [(2, "edited"), (3, "edited")]


def test_a_site_rests_for_the_cooldown_and_is_then_judged():
    bad = site(dead=range(5))
    told = run(ladder(First(cooldown=3, attempts=None)), [bad] * 7)
    assert told == [(0, "edited"), (3, "failed"), (3, "edited"), (6, "failed"), (6, "edited")]


def test_a_revived_site_is_said_to_be_and_may_be_treated_again():
    bad, good = site(dead=range(5)), site()
    told = run(ladder(), [bad, good, good, good, bad, bad, bad])
    assert told == [(0, "edited"), (2, "revived"), (4, "edited"), (6, "failed"), (6, "edited")]


def test_units_that_die_again_at_once_are_not_revived_for_ever():
    bad, good = site(dead=range(5)), site()
    verdicts = [bad, good, good] * 6
    told = run(ladder(First(attempts=3)), verdicts)
    assert told[-1][1] == "given up"
    assert [action for _, action in told].count("edited") <= 5


def test_units_that_die_again_much_later_start_anew():
    bad, good = site(dead=range(5)), site()
    told = run(ladder(First(attempts=2)), ([bad] + [good] * 15) * 6)
    assert [action for _, action in told] == ["edited", "revived"] * 6


def test_a_site_that_does_not_run_is_not_judged():
    bad = site(dead=range(5))
    idle = replace(site(), elements=0, samples=0)
    assert run(ladder(), [bad, idle, idle, idle, bad]) == [(0, "edited"), (4, "failed"), (4, "edited")]


def test_the_freshly_dead_cost_no_attempt():
    """An edit waits until enough units have the evidence, rather than treat the first of them again and again."""
    dead = site(dead=range(5))
    first = replace(dead, age=torch.where(torch.arange(10) == 0, 5000, dead.age.clamp(max=300)))
    assert run(ladder(First(evidence=2990)), [first, first, dead]) == [(2, "edited")]


def test_harm_is_noticed_while_a_term_is_in_flight():
    it, bad, high = ladder(First(attempts=1)), report(site(dead=range(5))), Loss(30.0, 1.0)
    (request,), _ = it.decide(bad, Loss(1.0, 0.1))
    it.edited(request, request.units, 0.5, Loss(1.0, 0.1), 0)
    _, events = it.decide(bad, high, busy={"fc"})
    assert [event.action for event in events] == ["harmed", "given up"]


def test_half_of_the_treated_units_have_to_fire():
    treated = site(dead=range(4))
    assert run(ladder(), [treated, treated, site(dead=[0, 1])])[1] == (2, "revived")
    assert run(ladder(), [treated, treated, site(dead=[0, 1, 2])])[1] == (2, "failed")


def test_units_that_fire_on_next_to_nothing_are_not_revived():
    treated = site(dead=range(4))
    rare = replace(site(), rare=torch.arange(10) < 4)
    assert run(ladder(), [treated, treated, rare])[1] == (2, "failed")
    selected = [replace(one, kind="topk") for one in (treated, treated, rare)]
    assert run(ladder(), selected)[1] == (2, "revived")  # it is usual there


def test_units_that_became_frozen_are_not_revived():
    treated = site(dead=range(4))
    assert run(ladder(), [treated, treated, site(frozen=range(4))])[1] == (2, "failed")


def test_the_next_remedy_takes_over_and_behind_the_last_the_site_is_given_up():
    bad = site(dead=range(5))
    it = ladder(First(attempts=2, cooldown=1), Second(attempts=1, cooldown=1))
    told = run(it, [bad] * 6)
    assert told == [
        (0, "edited"), (1, "failed"), (1, "edited"), (2, "failed"), (2, "escalated"), (2, "edited"),
        (3, "failed"), (3, "given up"),
    ]  # fmt: skip
    assert it.state.edits == [2, 1]


def test_a_refused_remedy_gives_way_to_the_next_once():
    it, bad = ladder(First(), Second()), report(site(dead=range(5)))
    (request,), _ = it.decide(bad)
    told = it.refused(request, "feeds two layers", 0)
    assert [(event.action, event.remedy) for event in told] == [("refused", "First"), ("escalated", "First")]
    (request,), _ = it.decide(bad)
    assert request.index == 1
    assert [event.action for event in it.refused(request, "no", 1)] == ["refused", "given up"]
    assert it.decide(bad) == ([], [])


def test_a_jump_of_the_loss_is_noticed_and_the_remedy_not_repeated():
    bad, calm, high = site(dead=range(5)), Loss(1.0, 0.1), Loss(30.0, 1.0)
    it = ladder(First(attempts=1), Second())
    told = run(it, [bad, bad, bad], [calm, high, high])
    assert told == [(0, "edited"), (1, "harmed"), (1, "escalated"), (1, "edited")]


def test_a_remedy_that_may_fail_for_ever_may_not_do_harm_for_ever():
    bad = site(dead=range(5))
    it = ladder(First(attempts=None))
    told = run(it, [bad] * 6, [Loss(30.0**number, 0.1) for number in range(6)])
    assert told == [
        (0, "edited"), (1, "harmed"), (1, "edited"), (2, "harmed"), (2, "edited"), (3, "harmed"), (3, "given up"),
    ]  # fmt: skip


def test_one_jump_of_the_loss_convicts_nobody():
    bad, good, calm, high = site(dead=range(5)), site(), Loss(1.0, 0.1), Loss(30.0, 1.0)
    told = run(ladder(First(cooldown=1)), [bad, bad, bad, good], [calm, high, high, high])
    assert told == [(0, "edited"), (1, "harmed"), (1, "edited"), (2, "failed"), (2, "edited"), (3, "revived")]


def test_a_loss_that_was_no_number_before_convicts_nobody():
    assert not Loss(math.nan, 1.0).jumped_to(Loss(5.0, 1.0))
    assert Loss(1.0, 0.1).jumped_to(Loss(math.nan, 0.1))


def test_the_number_of_edits_in_a_run_is_capped_over_all_sites():
    both = site(dead=range(5)), site(dead=range(5), name="fc2")
    it = ladder(First(max_edits=3, cooldown=1, attempts=None))
    edits = [told for told in run(it, [both] * 5) if told[1] == "edited"]
    assert len(edits) >= 3
    assert not it.may_act(0, 9)


def test_the_number_of_edits_of_a_site_is_capped():
    both = site(dead=range(5)), site(dead=range(5), name="fc2")
    told = run(ladder(First(max_edits_per_site=2, cooldown=1, attempts=None)), [both] * 5)
    assert [step for step, action in told if action == "edited"] == [0, 0, 1, 1]


def test_what_changes_the_output_by_nothing_is_not_blamed_for_a_loss_that_rose():
    bad, calm, high = site(dead=range(5)), Loss(1.0, 0.1), Loss(30.0, 1.0)
    told = run(ladder(Exact(attempts=1)), [bad, bad, site()], [calm, high, high])
    assert told == [(0, "edited"), (2, "revived")]


def reviewed(it, verdicts, of_use, least=()):
    """Give one verdict after the other, with shares where they are asked for; only some units matter."""
    told = []
    for step, verdict in enumerate(verdicts):
        shares = torch.tensor([float(unit in of_use or unit in least) for unit in range(verdict.units)])
        measured = dict.fromkeys(it.in_review, shares)
        requests, events = it.decide(report(verdict, step=step), shares=measured)
        told += events
        told += [it.edited(request, request.units, 0.2, None, step) for request in requests]
    return told


def test_units_that_came_back_have_to_matter_a_fair_time_later():
    for of_use, wanted, useful in ((range(2, 10), "useless", ()), (range(1, 10), "useful", (1,))):
        told = reviewed(ladder(), [site(dead=[0, 1]), *[site()] * 9], of_use)
        assert [(one.step, one.action) for one in told] == [(0, "edited"), (2, "revived"), (7, wanted)]
        assert told[-1].useful == useful
        assert told[-1].units == (0, 1)


def test_a_review_goes_on_where_it_was_saved():
    verdicts = [site(dead=[0, 1]), *[site()] * 9]
    whole, half, resumed = ladder(), ladder(), ladder()
    told = reviewed(whole, verdicts, range(2, 10))
    first = reviewed(half, verdicts[:5], range(2, 10))
    resumed.restore(decode(PolicyState, encode(half.state)))
    rest = [event._replace(step=event.step + 5) for event in reviewed(resumed, verdicts[5:], range(2, 10))]
    assert [(one.step, one.action, one.units) for one in first + rest] == [(e.step, e.action, e.units) for e in told]
    assert told[-1].action == "useless"


def test_units_that_fire_and_never_matter_cost_attempts_and_no_more_than_these():
    verdicts = [one for _ in range(40) for one in (site(dead=[0, 1]), *[site()] * 15)]  # far between: no relapse
    for attempts in (1, 3):
        told = reviewed(ladder(First(attempts=attempts), Second(attempts=attempts)), verdicts, range(2, 10))
        actions = [one.action for one in told if one.action not in ("edited", "revived")]
        assert actions == ["useless"] * attempts + ["escalated"] + ["useless"] * attempts + ["given up"]
        assert sum(one.action == "edited" for one in told) == 2 * attempts
    told = reviewed(ladder(First(attempts=2)), verdicts, range(10))
    assert {one.action for one in told} == {"edited", "revived", "useful"}


def test_nothing_is_said_of_units_that_died_again_and_time_begins_anew_for_what_is_edited_again():
    died = [site(dead=[0, 1]), *[site()] * 2, *[site(dead=[0, 1], age=5)] * 6]
    assert [one.action for one in reviewed(ladder(), died, range(10))] == ["edited", "revived"]
    again = [site(dead=[0, 1]), *[site()] * 2, site(dead=[0]), *[site()] * 12]
    told = reviewed(ladder(threshold=0.0), again, [1, *range(2, 10)])
    assert [one.reason for one in told if one.action == "useful"] == [
        "1 of 1 repaired units matter to the loss, 5 windows later"
    ]


@dataclass(frozen=True, kw_only=True)
class WithBlind(Exact):
    treats_blind = 0.05


def test_a_layer_without_dead_units_is_asked_about_where_it_leaves_samples_out_and_rests_then():
    it, blind = ladder(WithBlind(cooldown=1)), replace(site(), blind_fraction=0.3)
    assert it.decide(report(replace(site(), blind_fraction=0.05), step=5))[0] == []
    assert it.decide(report(replace(site(dead=range(10)), blind_fraction=1.0), step=8))[0][0].blind is False
    it = ladder(WithBlind(cooldown=1))
    (asked,), _ = it.decide(report(blind, step=10))
    assert (asked.blind, asked.units.tolist()) == (True, [True] * 10)
    assert it.decide(report(blind, step=60))[0] == []  # nothing came of it: a while later it is asked again
    (asked,), _ = it.decide(report(blind, step=70))
    it.edited(asked, asked.units & (torch.arange(10) == 3), 0.0, Loss(1.0, 0.1), 71)
    steps = [step for step in range(80, 1000, 10) if it.decide(report(blind, step=step), Loss(1.0, 0.1))[0]]
    assert steps[0] == 680
    assert ladder(First()).decide(report(blind, step=10))[0] == []


def test_what_frees_units_may_be_blamed_for_the_loss():
    it, blind = ladder(WithBlind(cooldown=5)), replace(site(), blind_fraction=0.3)
    (asked,), _ = it.decide(report(blind), Loss(1.0, 0.01))
    it.edited(asked, asked.units, 0.0, Loss(1.0, 0.01), 1)
    assert [event.action for event in it.decide(report(blind, step=10), Loss(9.0, 0.01))[1]] == ["harmed"]


def test_a_dry_run_rests_as_if_it_had_acted_and_fails_nobody():
    bad = site(dead=range(5))
    told = run(ladder(First(dry_run=True, attempts=1)), [bad] * 5)
    assert told == [(0, "would edit"), (2, "would edit"), (4, "would edit")]


def test_a_busy_site_waits():
    it, bad = ladder(), report(site(dead=range(5)))
    assert it.decide(bad, busy={"fc"}) == ([], [])
    assert it.decide(bad)[0]


def test_frozen_units_are_treated_along_with_dead_ones():
    both = report(site(dead=range(5), frozen=[7]))
    (request,), _ = ladder(WithFrozen()).decide(both)
    assert request.units.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 7]
    (request,), _ = ladder().decide(both)
    assert request.units.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert not ladder(WithFrozen()).decide(report(site(frozen=range(9))))[0]


def test_units_are_treated_early_whose_silence_is_improbable():
    assert ladder(First(significance=0.05)).decide(report(site(dead=range(5), age=30, usual_rate=0.5)))[0]


def test_progress_survives_saving_in_plain_values(tmp_path):
    bad = site(dead=range(5))
    verdicts = [bad] * 9
    rungs = First(attempts=2, cooldown=2), Second(attempts=1)
    whole, half = ladder(*rungs), ladder(*rungs)
    told = run(whole, verdicts)
    first = run(half, verdicts[:3])
    torch.save(encode(half.state), tmp_path / "state")
    resumed = ladder(*rungs)
    resumed.restore(decode(PolicyState, torch.load(tmp_path / "state", weights_only=True)))
    rest = [(step + 3, action) for step, action in run(resumed, verdicts[3:])]
    assert first + rest == told
    assert resumed.state.edits == whole.state.edits


def test_a_shorter_list_of_remedies_after_a_resume_leaves_a_site_alone_that_is_past_it():
    bad, good = site(dead=range(5)), site()
    half, resumed = ladder(First(cooldown=1, attempts=1), Second(cooldown=1)), ladder(First(cooldown=1, attempts=1))
    told = run(half, [bad, bad, good])
    assert [action for _, action in told] == ["edited", "failed", "escalated", "edited", "revived"]
    resumed.restore(decode(PolicyState, encode(half.state)))
    for step in range(10):
        assert resumed.decide(report(good, step=step), shares={"fc": torch.ones(10)}) == ([], [])


def test_an_event_reads_as_a_sentence():
    event = Event(7, "fc", "edited", "Reset", (1, 2), "30.0% dead, above the threshold 10.0%")
    assert str(event) == "step 7: Reset repaired `fc` (2 units): 30.0% dead, above the threshold 10.0%"


def test_nothing_is_asked_while_the_loss_is_no_number_and_an_event_says_so():
    it, bad = ladder(First(cooldown=1, attempts=None)), report(site(dead=range(5)))
    requests, (event,) = it.decide(bad, Loss(math.nan, math.nan))
    assert (requests, event.action, event.site) == ([], "stopped", "")
    assert it.decide(bad, Loss(math.inf, 0.0)) == ([], [])  # said once
    requests, events = it.decide(bad, Loss(1.0, 0.1))
    assert len(requests) == 1
    assert events == []


def test_an_event_counts_its_units():
    one, two = (Event(30, "act", "edited", "Reset", units, reason="dead") for units in ((4,), (4, 6)))
    assert str(one) == "step 30: Reset repaired `act` (1 unit): dead"
    assert str(two) == "step 30: Reset repaired `act` (2 units): dead"
