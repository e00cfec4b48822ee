import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from histories import report, run, site
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.report.metrics import EVENTS, headline_metrics, metrics_of, site_metrics
from lightning_deadrelu.report.raster import (
    MOST_COLUMNS,
    MOST_ROWS,
    Raster,
    RasterState,
    SiteRaster,
    image_of,
    units_shown,
)
from lightning_deadrelu.statistics.unit_state import State, state_shares, states_of


def test_each_unit_is_in_the_most_telling_state():
    one = site(8, dead=[0], nonfinite=[0, 1], frozen=[2, 3], rare=[3, 4], always_on=[5], judged=[0, 1, 2, 3, 4, 5, 7])
    states = [State(value) for value in states_of(one).tolist()]
    names = ["DEAD", "NOT_FINITE", "FROZEN", "FROZEN", "RARE", "ALWAYS_ON", "NOT_JUDGED", "ALIVE"]
    assert [state.name for state in states] == names
    assert len({state.colour for state in State}) == len(State)


def test_smooth_sites_are_dormant_or_alive_and_without_data_not_judged():
    one = replace(site(3, dormant=[1], judged=[], rare=[0]), smooth=True)
    assert states_of(one).tolist() == [State.ALIVE, State.DORMANT, State.ALIVE]
    assert states_of(replace(one, samples=0)).tolist() == [State.NOT_JUDGED] * 3
    assert state_shares(replace(one, samples=0))[State.NOT_JUDGED] == 1  # in bars as in rasters


def test_a_column_per_window():
    raster = run(Raster(), [], [0], [0, 1])
    act = raster.sites["act"]
    assert (act.kind, act.units, act.steps) == ("relu", 8, (9, 19, 29))
    assert act.states.shape == (8, 3)
    assert act.states.dtype == torch.uint8
    assert (act.states == State.DEAD).sum(0).tolist() == [0, 1, 2]
    assert raster.curves["dead_fraction"] == raster.site_curves["act"] == (0.0, 1 / 8, 2 / 8)


def test_repaired_units_are_marked_once():
    raster = run(Raster(), [0])
    raster.add(report(site(dead=[0]), step=19), edited={"act": (0, 3)})
    raster.add(report(site(), step=29))
    assert raster.sites["act"].states[0].tolist() == [State.DEAD, State.REPAIRED, State.ALIVE]
    assert raster.curves["remedied_units"] == (0.0, 2.0, 0.0)


def test_sites_that_come_late_or_are_absent_are_not_judged_meanwhile():
    raster = run(Raster(), [])
    raster.add(report(site(name="late", dead=[1]), step=19))
    assert list(raster.sites) == ["act", "late"]
    assert raster.sites["late"].states[1].tolist() == [State.NOT_JUDGED, State.DEAD]
    assert raster.sites["act"].states[1].tolist() == [State.ALIVE, State.NOT_JUDGED]
    assert math.isnan(raster.site_curves["late"][0])
    assert math.isnan(raster.site_curves["act"][1])


def test_a_name_that_passes_to_a_layer_of_another_size_starts_anew():
    raster = run(Raster(), [0])
    raster.add(report(site(5, dead=[4]), step=19))
    assert raster.sites["act"].states.tolist()[4] == [State.NOT_JUDGED, State.DEAD]


@pytest.mark.parametrize("units", [1, 2, 255, 256, 257, 300, 4096, 100_000])
def test_rows_are_units_in_order_and_no_stretch_is_left_out(units):
    rows = units_shown(units)
    assert len(rows) == min(units, MOST_ROWS)
    assert torch.equal(rows, rows.unique())
    assert int(rows.max()) < units
    assert (rows.diff() <= 2 * max(units // MOST_ROWS, 1)).all()


@pytest.mark.parametrize("period", [2, 4, 16, 64])
def test_a_patterned_layer_is_shown_in_its_shares(period):
    raster = run(Raster(), range(0, 4096, period), units=4096)
    assert (raster.sites["act"].states == State.DEAD).float().mean() == pytest.approx(1 / period, abs=0.03)


def columns_of(windows, stride):
    """By brute force: the merged columns of a list of windows."""
    return [windows[at : at + stride] for at in range(0, len(windows), stride)]


@pytest.mark.parametrize("count", [511, 512, 513, 514, 1023, 1024, 1025, 1500, 2049, 5000])
def test_halving_equals_merging_the_whole_history(count):
    generator = torch.Generator().manual_seed(count)
    base, raster, states, steps, rows = site(4), Raster(), [], [], []
    for step in range(count):
        dead, rare = torch.rand(2, 4, generator=generator) < 0.2
        new = replace(base, dead=dead, rare=rare & ~dead, newly_dead=dead)
        edited = {"act": (step % 4,)} if step % 50 == 0 else {}
        raster.add(report(new, step=step), edited)
        states.append(states_of(new))
        steps.append(step)
        for unit in edited.get("act", ()):
            states[-1][unit] = State.REPAIRED
        rows.append(headline_metrics(report(new), len(edited)))
    assert len(raster.steps) <= MOST_COLUMNS
    assert raster.windows == count
    merged = [torch.stack(column).amax(0) for column in columns_of(states, raster.stride)]
    assert torch.equal(raster.sites["act"].states, torch.stack(merged, 1))
    assert raster.steps == tuple(column[-1] for column in columns_of(steps, raster.stride))
    for key, curve in raster.curves.items():
        parts = columns_of([row[key] for row in rows], raster.stride)
        assert curve == pytest.approx([sum(part) if key in EVENTS else part[-1] for part in parts])


def as_values(raster):
    sites = {name: (one.kind, one.units, one.steps, one.states.tolist()) for name, one in raster.sites.items()}
    return repr((raster.windows, raster.stride, sites, raster.curves, raster.site_curves))


@pytest.mark.parametrize("count", [0, 1, 7, 600])
def test_resume_is_continuation(count, tmp_path):
    first = run(Raster(), *[[number % 8] for number in range(count)])
    if count:
        run(first, [0], name="late", units=300)
    torch.save(encode(first.state), tmp_path / "state")
    second = Raster()
    second.restore(decode(RasterState, torch.load(tmp_path / "state", weights_only=True)))
    assert as_values(first) == as_values(second)
    assert as_values(run(first, *[[1], [2]] * 300)) == as_values(run(second, *[[1], [2]] * 300))


def large_model(raster):
    """Fill one window of 64 sites of 4096 units each; return the generator and the sites."""
    base, generator = site(4096), torch.Generator().manual_seed(0)
    sites = tuple(replace(base, name=f"layer{i}", dead=torch.rand(4096, generator=generator) < 0.3) for i in range(64))
    raster.add(report(*sites, step=0))
    return generator, sites


@pytest.mark.timing
def test_a_window_of_a_large_model_is_added_fast():
    raster = Raster()
    _, sites = large_model(raster)
    start = time.process_time()
    raster.add(report(*sites, step=1))
    assert time.process_time() - start < 0.5


def test_bounded_in_memory_and_file():
    raster = Raster()
    generator, sites = large_model(raster)
    for step in range(1, 512):
        turned = replace(sites[0], dead=torch.rand(4096, generator=generator) < 0.3)
        raster.add(report(turned, *sites[1:], step=step))
    assert all(one.states.shape == (256, 512) for one in raster.sites.values())
    assert raster.state.states.numel() + raster.state.values.numel() < 1_000_000


def test_the_picture_is_a_staircase_of_what_each_unit_was():
    raster = run(Raster(), [], [0], [0, 2], units=3)
    picture = image_of(raster.sites["act"], (6, 7))
    alive, dead = (list(bytes.fromhex(state.colour[1:])) for state in (State.ALIVE, State.DEAD))
    assert picture.dtype == np.uint8
    assert picture.shape == (6, 9, 3)
    patches = picture[::2, ::3].tolist()
    assert patches == [[alive, alive, alive], [alive, alive, dead], [alive, dead, dead]]
    assert (picture == picture[::2, ::3].repeat(2, 0).repeat(3, 1)).all()


@given(st.lists(st.lists(st.sampled_from([State.ALIVE, State.DEAD, State.RARE]), min_size=4, max_size=4), min_size=1))
def test_a_staircase_has_the_same_rows_in_the_order_of_first_deaths(rows):
    states = torch.tensor(rows, dtype=torch.uint8)
    stairs = SiteRaster("a", "relu", len(rows), torch.arange(len(rows)), states, (1, 2, 3, 4)).staircase.tolist()
    assert sorted(stairs) == sorted(states.tolist())
    first = [row.index(State.DEAD) if State.DEAD in row else 4 for row in stairs]
    assert first == sorted(first, reverse=True)


def test_curves_hold_what_is_logged():
    one = report(site(dead=[0]), replace(site(name="smooth", dormant=[0, 1]), smooth=True))
    logged = metrics_of(one, remedied_units=3)
    whole = {key: value for key, value in logged.items() if key.startswith(("dead_relu/", "dead_relu_details/"))}
    whole = {key.split("/")[1]: value for key, value in whole.items()}
    assert whole == headline_metrics(one, 3) | {"useful_units": 0.0}
    assert site_metrics(one) == {
        "act": logged["dead_relu_sites/act"],
        "smooth": logged["dead_relu_dormant/smooth"],
    }
