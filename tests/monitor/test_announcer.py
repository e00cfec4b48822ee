from dataclasses import replace

import torch
from histories import site_of
from loops import Loop, net

from lightning_deadrelu import LivenessReport
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem import DeathEvent
from lightning_deadrelu.monitor.announcer import Announcer
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.repair.event import Event


def announcing(**known):
    loop = Loop(net(), [], **known)
    return Announcer(Settings(threshold=0.1), loop), loop


def report_of(name):
    return LivenessReport((site_of(name, torch.arange(8) < 3),), step=7)


def test_a_site_of_any_name_is_warned_of_once():
    announcer, loop = announcing(averages="EMAWeightAveraging")
    announcer.tell_event(Event(3, "act", "edited", "Reset"))
    assert announcer.tell_crossed(report_of("copies")) == ["copies"]
    assert announcer.tell_crossed(report_of("copies")) == []
    announcer.tell_event(Event(4, "act", "edited", "Reset"))
    assert ["EMAWeightAveraging" in text for text in loop.said] == [False, True, False, False]
    assert loop.said[2].startswith("more than 10% dead at step 7: `copies` (3 of 8 units)")


def test_averaged_copies_are_spoken_of_also_where_a_site_is_called_so():
    announcer, loop = announcing(averages="EMAWeightAveraging")
    announcer.tell_crossed(report_of("copies"))
    announcer.tell_event(Event(3, "act", "edited", "Reset"))
    assert loop.said[-1] == "averaged copies of the weights (EMAWeightAveraging) are left alone."


def test_deaths_are_told_live_only_where_their_cause_is_known():
    announcer, loop = announcing()
    cause = Finding(cause="c", where="act", measured="seen", confidence="likely", edit="lr=1", source="a paper")
    unknown = DeathEvent("shock", "unknown", ("act",), (80,), 0, 9, "for no cause that was seen")
    announcer.tell_deaths([unknown, replace(unknown, cause="c", finding=cause, measured="as seen")])
    assert loop.said == ["80 units of `act` died between steps 0 and 9, as seen."]


def test_what_needs_an_act_says_which():
    announcer, loop = announcing()
    announcer.tell_event(Event(3, "act", "refused", "Reset", reason="it is sharded"))
    assert loop.said == [
        "step 3: Reset refused `act`: it is sharded. `monitor.attribution` shows what is known of all sites."
    ]
    announcer.tell_findings((), ValueError("a bug"))
    assert loop.said[-1] == "the check-up failed; watching goes on. ValueError('a bug')"
