"""Remedies that bring back what a unit had learnt: how high they lift, what they push, and which slope they give."""

import dataclasses

import pytest
import torch
from views import DEAD, layer, mask, normal_quantiles, seeded, view_of

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.remedies import LEVELS, BiasWarming, Edits, LeakySlope, NotApplicable, WakeUp

# -- bias warming ------------------------------------------------------------------------------------------------------


def warmed(remedy, quantiles, dead=DEAD, **options):
    values, laws, attribution = layer()
    return remedy.propose(view_of(attribution, dead, values, laws, quantiles=quantiles, **options), seeded())


def heights(edits):
    """Spread over all units what a lift adds to the bias."""
    (rise,) = edits.lift.rises
    height = torch.zeros(6, dtype=torch.float64)
    height[rise.slice.units] = rise.values
    return height


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.25, 0.5])
def test_warming_makes_a_share_fire(rate):
    z = torch.randn(20_000, 6, dtype=torch.float64) * torch.linspace(0.1, 9, 6) - 50
    quantiles = torch.quantile(z, torch.tensor(LEVELS, dtype=torch.float64), dim=0)
    height = heights(warmed(BiasWarming(firing_rate=rate), quantiles))
    assert height[~DEAD].eq(0).all()
    fires = ((z + height) > 0).double().mean(0)[DEAD]
    assert (fires >= rate).all()
    assert fires.max() < rate + 0.25  # the margin is the same for narrow and broad units


def test_where_units_are_selected_they_are_to_fire_no_more_than_the_others():
    values, laws, attribution = layer()
    view = view_of(attribution, DEAD, values, laws, quantiles=normal_quantiles(6, -5.0, 1.0))
    seldom = {"fired": torch.tensor([1, 0, 3, 0, 5, 100]), "elements": 100}
    heights_of = {}
    for kind in ("relu", "topk"):
        own = dataclasses.replace(view, report=dataclasses.replace(view.report, kind=kind, **seldom))
        heights_of[kind] = heights(BiasWarming(firing_rate=0.2).propose(own, seeded()))
    assert heights_of["relu"].equal(heights(BiasWarming(firing_rate=0.2).propose(view, seeded())))
    assert heights_of["topk"].equal(heights(BiasWarming(firing_rate=0.03).propose(view, seeded())))


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_units_that_compete_are_not_pushed(kind):
    values, laws, attribution = layer()
    view = view_of(attribution, DEAD, values, laws)
    with pytest.raises(NotApplicable, match="selected on all inputs alike"):
        WakeUp().propose(dataclasses.replace(view, report=dataclasses.replace(view.report, kind=kind)), seeded())


def test_warming_to_just_above_the_peak():
    quantiles = normal_quantiles(6, -5.0, 1.0)
    above = quantiles[-1] + heights(warmed(BiasWarming(firing_rate=None), quantiles))
    assert (above[DEAD] > 0).all()
    assert (above[DEAD] < 0.1).all()


def test_warming_is_capped():
    quantiles = normal_quantiles(6, -5.0, 1.0)
    quantiles[:8] -= 1e6  # outliers below
    depth, spread = -quantiles[-1, 1], quantiles[7, 1] - quantiles[2, 1]
    capped = warmed(BiasWarming(firing_rate=0.5, steps=7, cap=1.0), quantiles)
    assert capped.lift.steps == 7
    assert heights(capped)[1] <= 1.02 * (depth + spread)
    half = heights(warmed(BiasWarming(firing_rate=0.5, cap=0.5), quantiles))[1]
    assert half <= 0.52 * (depth + spread)


def test_a_term_that_warms_at_once_goes_as_the_lift_comes():
    quantiles = normal_quantiles(6, -5.0, 1.0)
    edits = warmed(BiasWarming(at_once=True, steps=9), quantiles)
    assert edits.warmth.steps == edits.lift.steps == 9
    assert torch.allclose(edits.warmth.gamma.double(), heights(edits))
    assert warmed(BiasWarming(), quantiles).warmth is None


def test_warming_never_pulls_down_and_leaves_unknown_units_alone():
    quantiles = normal_quantiles(6, -5.0, 1.0)
    quantiles[0, 1], quantiles[-1, 3] = -torch.inf, torch.nan
    assert warmed(BiasWarming(), quantiles) == Edits()
    high = normal_quantiles(6, -5.0, 1.0) + 100
    assert (heights(warmed(BiasWarming(), high)) >= 0).all()


def test_warming_lifts_a_layer_whose_inputs_are_all_zero():
    height = heights(warmed(BiasWarming(), torch.zeros(len(LEVELS), 6, dtype=torch.float64)))
    assert (height[DEAD] > 0).all()


# -- pushes and slopes -------------------------------------------------------------------------------------------------


def shown(quantiles=None, known=True, dead=DEAD, **options):
    values, laws, attribution = layer()
    attribution = attribution if known else Attribution(no_incoming="its weight is computed")
    view = view_of(attribution, dead, values, laws, quantiles=quantiles)
    return dataclasses.replace(view, **options)


def test_a_push_goes_to_treated_units_that_are_not_frozen():
    frozen = mask(1, 0, 0, 0, 0, 0)
    values, laws, attribution = layer()
    push = WakeUp(target_rate=0.3, max_steps=7).propose(view_of(attribution, DEAD, values, laws, frozen), seeded()).push
    assert torch.equal(push.units, DEAD)
    assert (push.firing_rate, push.strength, push.steps) == (0.3, 1.0, 7)


def test_a_slope_goes_along_with_a_lift_or_else_with_a_push():
    quantiles = normal_quantiles(6, -5.0, 1.0)
    edits = LeakySlope().propose(shown(quantiles), seeded())
    assert (edits.activation.kind, edits.activation.steps, edits.lift.steps) == ("leaky_relu", 50, 50)
    assert edits.push is None
    edits = LeakySlope().propose(shown(quantiles, known=False), seeded())
    assert edits.lift is None
    assert torch.equal(edits.push.units, DEAD)


def test_a_unit_puts_out_no_more_than_the_slope_times_its_spread():
    for mean, std in ((-5.0, 1.0), (-300.0, 2.0), (-0.1, 1.0)):
        slopes = LeakySlope(slope=0.2).propose(shown(normal_quantiles(6, mean, std)), seeded()).activation.slopes
        assert slopes[~DEAD].eq(0).all()
        assert slopes[DEAD].tolist() == pytest.approx([0.2 * min(1, std / -mean)] * 2, rel=0.01)


def test_without_a_module_of_its_own_the_slope_is_left_out_or_refused():
    view = shown(normal_quantiles(6, -5.0, 1.0), no_module="its rectifier is called as a function")
    edits = LeakySlope().propose(view, seeded())
    assert edits.activation is None
    assert edits.lift is not None
    with pytest.raises(NotApplicable, match="its rectifier is called as a function"):
        LeakySlope(ramp_steps=None).propose(view, seeded())


def test_a_slope_that_stays_comes_alone():
    edits = LeakySlope(ramp_steps=None, per_unit=False).propose(shown(), seeded())
    assert edits.activation.steps == 0
    assert torch.equal(edits.activation.slopes, torch.full((6,), 0.1))
    assert edits.lift is edits.push is None
