"""What became of each site: the facts of a run, and the rows that tell them."""

from dataclasses import replace

import pytest
import torch

from lightning_deadrelu import LivenessReport, UnitLiveness
from lightning_deadrelu.repair.event import Event
from lightning_deadrelu.report.raster import Raster
from lightning_deadrelu.report.site_summary import column_of, conclude, rows_of, shortened, summarize, worst_first

UNITS = 20


def verdict(dead, name="act"):
    """Judge a site of 20 units, of which the first so many are dead."""
    liveness = UnitLiveness({name: UNITS})
    rows = torch.ones(400, UNITS)
    rows[::2] = -1
    rows[:, :dead] = -1
    liveness.update(rows)
    return liveness.report().sites[0]


def run(*counts, events=()):
    """Summarize a run of one site with so many dead units in each window, which ends at steps 9, 19, ..."""
    raster = Raster()
    for window, count in enumerate(counts):
        report = LivenessReport((verdict(count),), 10 * window + 9)
        raster.add(report)
    return report, raster, summarize(report, raster, events)


def edited(*units):
    return Event(15, "act", "edited", "Reset", units)


@pytest.mark.parametrize(
    ("counts", "worst", "since", "died_at", "verdict"),
    [
        ((0, 0), 0.0, None, None, "healthy"),
        ((0, 1, 1), 0.05, 19, 19, "a few dead"),
        ((0, 2, 10, 10), 0.5, 29, 29, "many dead"),
        ((0, 4, 6, 6), 0.3, 19, 19, "many dead"),
        ((20, 20), 1.0, 9, 9, "dead"),
        ((0, 10, 0), 0.5, None, 19, "recovered"),
        ((0, 1, 0), 0.05, None, 19, "healthy"),
    ],
)
def test_the_facts_of_a_run(counts, worst, since, died_at, verdict):
    (one,) = run(*counts)[2]
    assert (one.worst, one.since, one.died_at, one.verdict) == (pytest.approx(worst), since, died_at, verdict)
    assert (one.repaired, one.fire_again) == (0, 0)


def test_repaired_units_that_fire_again_are_counted_once():
    (one,) = run(0, 5, 1, events=[edited(0, 1, 2), edited(0, 4)])[2]
    assert (one.repaired, one.fire_again) == (4, 3)  # unit 0 is dead still
    assert one.row()["fire_again"] == 3
    (healed,) = run(0, 5, 0, events=[edited(0)])[2]
    assert healed.verdict == "repaired"


def test_a_dry_run_repairs_nothing():
    (one,) = run(0, 5, 5, events=[edited(0)._replace(action="would edit")])[2]
    assert one.repaired == 0


@pytest.mark.parametrize(
    ("events", "counts", "sentence"),
    [
        ((), (0, 0), "None of 20 units is dead."),
        ((), (0, 5), "5 of 20 units are dead (25.0%), all in `act`, since step 19."),
        ((), (10, 5), "5 of 20 units are dead (25.0%), all in `act`, since step 9, down from 50.0% at step 9."),
        ((edited(0),), (1, 0), "None of 20 units is dead, down from 5.0% at step 9; 1 was repaired, and fires again."),
        ((edited(0, 1, 2),), (3, 1), "1 of 20 units is dead (5.0%), in `act`, since step 9, down from 15.0% at step 9;"
         " 3 were repaired, and 2 fire again."),
    ],
)  # fmt: skip
def test_the_sentence_above_a_run(events, counts, sentence):
    report, raster, summaries = run(*counts, events=events)
    assert conclude(report, raster, summaries) == sentence


def many(*counts):
    """Summarize an audit of a site for each number of dead units."""
    report = LivenessReport(tuple(verdict(count, f"act{number}") for number, count in enumerate(counts)))
    return summarize(report, Raster(), ())


def test_healthy_neighbours_of_many_layers_share_a_row():
    summaries = many(0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0)
    groups = shortened(summaries)
    assert [len(group) for group in groups] == [2, 1, 7, 1, 3]
    assert [one.site.name for group in groups for one in group] == [f"act{number}" for number in range(14)]
    rows = rows_of(groups)
    assert [row["site"] for row in rows[:3]] == ["... 2 layers, healthy", "act2", "... 7 layers, healthy"]
    assert [row["units"] for row in rows] == [40, 20, 140, 20, 60]


def test_of_many_sick_layers_the_worst_twenty_have_a_row():
    summaries = many(*[1] * 5, *[2] * 20)
    rows = rows_of(shortened(summaries))
    assert len(rows) == 21
    assert rows[0]["site"] == "... 5 layers, at most 5.0% dead"


def test_few_layers_have_a_row_each():
    assert len(shortened(many(*[0] * 12))) == 12


def test_the_worst_layer_comes_first():
    sick, well = (run(0, count)[2][0] for count in (5, 0))
    late = replace(sick.site, name="late")
    assert [one.site.name for one in worst_first([well, sick._replace(site=late)])] == ["late", "act"]


def test_a_step_lies_in_the_window_that_ends_with_it_or_after():
    steps = [9, 19, 29]
    for step in range(40):
        slow = next((column for column, last in enumerate(steps) if step <= last), 2)
        assert column_of(step, steps) == slow
