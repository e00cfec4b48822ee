"""What remedies propose, and what they refuse."""

import dataclasses
import itertools
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from views import DEAD, layer, mask, normal_quantiles, rows, seeded, view_of

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.remedies import (
    LEVELS,
    BiasWarming,
    Edits,
    InitDistribution,
    LeakySlope,
    Remedy,
    Reset,
    SwapActivation,
    ThermalKick,
    WakeUp,
    Write,
    ladder_of,
    remedy_of,
)

REMEDIES = [Reset, ThermalKick, BiasWarming, WakeUp, LeakySlope, SwapActivation]


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", REMEDIES)
def test_proposals_are_pure_and_repeatable(make):
    values, laws, attribution = layer(norm=True)
    view = view_of(attribution, DEAD, values, laws, quantiles=normal_quantiles(6, -4.0, 1.0))
    before = {name: (value.clone(), value._version) for name, value in values.items()}
    state = torch.get_rng_state()
    one, two = (make().propose(view, seeded(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, (value, version) in before.items():
        assert torch.equal(values[name], value)
        assert values[name]._version == version
    assert len(one.writes) == len(two.writes)
    for a, b in zip(one.writes, two.writes, strict=True):
        assert torch.equal(torch.as_tensor(a.values), torch.as_tensor(b.values))
        assert not set(a.slice.units.tolist()) - {1, 3}
    assert (one.warmth is None) == (two.warmth is None)
    assert one.writes or one.lift or one.push or one.activation


@pytest.mark.parametrize("make", [Reset, ThermalKick, BiasWarming, WakeUp, LeakySlope])
def test_nothing_to_treat_is_nothing_to_change(make):
    values, laws, attribution = layer()
    view = view_of(attribution, mask(0, 0, 0, 0, 0, 0), values, laws)
    assert not make().propose(view, seeded())


def test_own_fields_tell_remedies_apart():
    shared = {field.name for field in dataclasses.fields(Remedy)}
    own = [{field.name for field in dataclasses.fields(one)} - shared for one in REMEDIES]
    for one, other in itertools.combinations(own, 2):
        assert one
        assert not one & other


def test_needs():
    assert [sorted(one.needs) for one in REMEDIES] == [
        ["incoming", "outgoing"],
        ["incoming"],
        ["incoming"],
        [],
        [],
        ["module"],
    ]
    assert [one().is_exact for one in REMEDIES] == [True, False, True, True, False, False]
    assert not Reset(frozen=True).is_exact
    assert not BiasWarming(at_once=True).is_exact
    assert not any(one().treats_frozen for one in REMEDIES[1:])
    assert [Reset(frozen=frozen).treats_frozen for frozen in (True, False)] == [True, False]


# -- reset -------------------------------------------------------------------------------------------------------------


def written(edits, values):
    """Apply writes to copies."""
    copies = {name: value.clone() for name, value in values.items()}
    for write in edits.writes:
        write.slice.write_(copies[write.slice.name], write.values)
    return copies


def test_reset_redraws_and_clears():
    values, laws, attribution = layer(units=400, width=50, norm=True)
    dead = torch.arange(400) % 2 == 0
    edits = Reset().propose(view_of(attribution, dead, values, laws), seeded())
    assert edits.writes[0].slice.role == "reader"  # readers let go first
    new = written(edits, values)
    fresh = new["fc.weight"][dead]
    assert fresh.std().item() == pytest.approx(0.5, rel=0.03)
    assert fresh.abs().max() <= 0.5 * 3**0.5
    assert (new["fc.bias"][dead] == 0.25).all()
    for name, value in {"weight": 1, "bias": 0, "mean": 0, "var": 1}.items():
        assert (new[f"bn.{name}"][dead] == value).all()
    assert not new["head.weight"][:, dead].any()
    for name, value in values.items():
        live = (slice(None), ~dead) if name == "head.weight" else ~dead
        assert torch.equal(new[name][live], value[live])


def test_reset_keeps_the_readers_of_frozen_units():
    values, laws, attribution = layer()
    frozen = mask(1, 0, 0, 0, 0, 0)
    view = view_of(attribution, DEAD, values, laws, frozen=frozen)
    new = written(Reset(frozen=True).propose(view, seeded()), values)
    assert new["head.weight"].any(0).tolist() == [True, False, True, False, True, True]
    assert torch.equal(new["head.weight"][:, 0], values["head.weight"][:, 0])
    changed = (new["fc.weight"] != values["fc.weight"]).any(1)
    assert changed.tolist() == [True, True, False, True, False, False]
    new = written(Reset(frozen=False).propose(view, seeded()), values)
    assert torch.equal((new["fc.weight"] != values["fc.weight"]).any(1), DEAD)


def test_reset_with_a_bias_of_ones_own():
    values, laws, attribution = layer(norm=True)
    new = written(Reset(bias=0.1).propose(view_of(attribution, DEAD, values, laws), seeded()), values)
    assert torch.equal(new["fc.bias"][DEAD], torch.full((2,), 0.1))
    assert torch.equal(new["bn.bias"][DEAD], torch.full((2,), 0.1))


@pytest.mark.parametrize("hinge", [0.0, 3.0])
def test_new_units_exceed_the_site_s_hinge(hinge):
    values, laws, attribution = layer()
    view = view_of(attribution, DEAD, values, laws)
    x = torch.randn(50, 4, generator=seeded(1))
    new = written(Reset().propose(dataclasses.replace(view, inputs=x, hinge=hinge), seeded()), values)
    share = ((x @ new["fc.weight"].T + new["fc.bias"]) > hinge).double().mean(0)[DEAD]
    assert ((share > 0.08) & (share < 0.92)).all()


def test_weights_that_began_as_zeros_get_the_default_law():
    values, _, attribution = layer(units=300, width=25)
    dead = torch.ones(300, dtype=torch.bool)
    for laws in (
        {},
        {"fc.weight": InitDistribution.of(torch.zeros(3, 3)), "fc.bias": InitDistribution(0.0, 0.0, False)},
    ):
        new = written(Reset().propose(view_of(attribution, dead, values, laws), seeded()), values)
        assert new["fc.weight"].abs().max() <= 0.2
        assert new["fc.weight"].std().item() == pytest.approx(0.2 / 3**0.5, rel=0.03)
        assert not new["fc.bias"].any()


@pytest.mark.parametrize(
    "module", [nn.Linear(20, 10), nn.Conv2d(6, 10, 3, groups=2), nn.Conv1d(4, 10, 5)], ids=lambda one: str(one)
)
def test_default_law_is_that_of_torch(module):
    """What torch draws by itself has the law that zeros are replaced by."""
    values = {"m.weight": torch.zeros_like(module.weight)}
    attribution = Attribution((rows("m.weight", "weight", 10),))
    dead = torch.ones(10, dtype=torch.bool)
    edits = Reset().propose(view_of(attribution, dead, values, {}), seeded())
    bound = module.weight.detach().abs().max().item()
    assert edits.writes[0].values.abs().max().item() == pytest.approx(bound, rel=0.05)


def test_laws_are_told_from_what_was_drawn():
    flat, normal = torch.rand(4000) * 2 - 1, torch.randn(4000)
    assert InitDistribution.of(flat).uniform
    assert not InitDistribution.of(normal).uniform
    assert InitDistribution.of(torch.full((3, 3), 0.1)).std == 0  # also where the mean is rounded
    assert InitDistribution.of(torch.zeros(0)) == InitDistribution(0.0, 0.0, False)
    for drawn in (flat, normal):
        again = InitDistribution.of(drawn).draw(torch.zeros(4000), seeded())
        assert again.std().item() == pytest.approx(drawn.std().item(), rel=0.05)


@pytest.mark.timing
@pytest.mark.parametrize("make", [torch.rand, torch.randn])
def test_the_law_of_a_large_tensor_is_told_from_some_of_its_entries(make):
    drawn = make(3000, 1001).T  # not as it lies in memory
    started = time.process_time()
    law = InitDistribution.of(drawn)
    assert time.process_time() - started < 0.1
    assert law == InitDistribution.of(drawn)
    assert law.mean == pytest.approx(drawn.mean().item(), abs=0.02)
    assert law.std == pytest.approx(drawn.std().item(), rel=0.02)
    assert law.uniform == (make is torch.rand)
    assert InitDistribution.of(torch.full((3000, 1001), 0.1)).std == 0


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (300, 300), (7, 5, 3)])
def test_of_a_small_tensor_all_entries_count(shape):
    drawn = torch.randn(shape)
    law = InitDistribution.of(drawn)
    if drawn.numel() > 1:
        assert law.std == pytest.approx(drawn.double().std(correction=0).item())
        drawn.view(-1)[-1] = 1e6
        assert InitDistribution.of(drawn).mean > 1
    else:
        assert law == InitDistribution(float(drawn) if drawn.numel() else 0.0, 0.0, False)


# -- thermal kick ------------------------------------------------------------------------------------------------------


def kicked(remedy, mean, units=2000, scale=1.0, bias=True):
    """Kick units whose inputs are normal, far below the hinge, and see how many fire."""
    generator = seeded(5)
    x = torch.randn(500, 8, generator=generator)
    values = {"fc.weight": torch.randn(units, 8, generator=generator) * scale / 8**0.5}
    laws = {"fc.weight": InitDistribution(0.0, 0.35 * scale, False), "fc.bias": InitDistribution(0.0, 0.0, False)}
    incoming = [rows("fc.weight", "weight", units)]
    shift = torch.full((units,), mean * scale)
    if bias:
        values["fc.bias"] = shift
        incoming.append(rows("fc.bias", "bias", units))
    z = x @ values["fc.weight"].T + shift
    quantiles = torch.quantile(z.double(), torch.tensor(LEVELS, dtype=torch.float64), dim=0)
    dead = z.amax(0) <= 0
    view = view_of(Attribution(tuple(incoming)), dead, values, laws, quantiles=quantiles)
    new = written(remedy.propose(view, seeded(7)), values)
    after = x @ new["fc.weight"].T + new.get("fc.bias", shift)
    assert torch.equal(after[:, ~dead], z[:, ~dead])
    return ((after.amax(0) > 0) & dead).sum().item() / dead.sum().item()


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("mean", [-5.0, -50.0])
def test_a_kick_revives_a_third_at_any_depth_and_scale(mean, scale):
    assert 0.3 < kicked(ThermalKick(), mean, scale=scale) < 0.5
    assert kicked(ThermalKick(depth=2.0), mean, scale=scale) > 0.55


def test_a_kick_bridges_the_distance_by_weights_where_there_is_no_bias():
    assert kicked(ThermalKick(), -10.0, bias=False) > 0.3


def test_a_kick_reaches_what_counts_behind_a_norm():
    values, laws, attribution = layer(norm=True)
    new = written(ThermalKick().propose(view_of(attribution, DEAD, values, laws), seeded()), values)
    changed = {name for name, value in values.items() if not torch.equal(new[name], value)}
    assert changed == {"fc.weight", "bn.weight", "bn.bias"}
    assert (new["bn.bias"][DEAD] > values["bn.bias"][DEAD]).all()  # never further down


def test_a_kick_uses_the_report_where_the_batch_tells_nothing():
    values, laws, attribution = layer(units=4000)
    dead = torch.ones(4000, dtype=torch.bool)
    view = view_of(attribution, dead, values, laws, peak=torch.full((4000,), -7.0))
    lift = written(ThermalKick().propose(view, seeded()), values)["fc.bias"] + 9
    assert lift.square().mean().sqrt().item() == pytest.approx(7.05, rel=0.05)


# -- sites -------------------------------------------------------------------------------------------------------------


def test_what_stays_is_done_once_and_judged_late_and_what_costs_nothing_as_often_as_need_be():
    assert (SwapActivation().attempts, SwapActivation().cooldown) == (1, 10)
    assert (SwapActivation(attempts=3, cooldown=2).attempts, SwapActivation(cooldown=2).cooldown) == (3, 2)
    with pytest.raises(ValueError, match="at least 1"):
        SwapActivation(attempts=0)
    assert (Reset().attempts, Reset().cooldown) == (3, 1)
    assert [make().attempts for make in (BiasWarming, WakeUp, LeakySlope)] == [None] * 3


# -- flags and arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("reset", Reset()),
        ("thermal_kick", ThermalKick()),
        ("bias_warming", BiasWarming()),
        ("wake_up", WakeUp()),
        ("leaky", LeakySlope()),
        *[(kind, SwapActivation(activation=kind)) for kind in ("leaky_relu", "rrelu", "elu", "selu", "gelu", "silu")],
    ],
)
def test_flags(flag, remedy):
    assert remedy_of(flag) == remedy
    assert ladder_of(flag) == ladder_of(remedy) == ladder_of([flag]) == (remedy,)


def test_auto_goes_from_what_asks_most_to_what_asks_nothing():
    assert ladder_of("auto") == (Reset(), BiasWarming(), WakeUp())
    assert ladder_of([LeakySlope(), "auto"]) == (LeakySlope(), Reset(), BiasWarming(), WakeUp())
    needs = [len(remedy.needs) for remedy in ladder_of("auto")]
    assert needs == [2, 1, 0]


def test_ladders():
    assert ladder_of(None) == ()
    assert ladder_of(("reset", LeakySlope(slope=0.1), "gelu")) == (
        Reset(),
        LeakySlope(slope=0.1),
        SwapActivation(activation="gelu"),
    )


@pytest.mark.parametrize(
    ("remedy", "reason"),
    [
        (
            "rest",
            "Did you mean `remedy='reset'`\\? Known: auto, reset, thermal_kick, bias_warming",
        ),
        ("zzz", "`remedy='zzz'` is no remedy. Known: auto"),
        ("prelu", "PReLU brings parameters.*Call `swap_activations_"),
        ([], "an empty list names no remedy. Try `remedy=None`"),
        (["reset", None], "`remedy=None`: it takes a flag"),
        (["reset", ["leaky"]], "it takes a flag, a remedy, or a list"),
        (3, "`remedy=3`: it takes a flag"),
        ({"reset"}, "it takes a flag"),
        (Reset, "`remedy=Reset` is a class.*Try `remedy=Reset\\(\\)`"),
        (Remedy(), "`remedy=Remedy\\(\\)` has no `propose`"),
    ],
)
def test_bad_ladders_are_refused(remedy, reason):
    with pytest.raises(ValueError, match=reason):
        ladder_of(remedy)


WHOLE = ("patience", "cooldown", "attempts", "max_edits", "stop_step", "evidence")


@pytest.mark.parametrize(
    ("make", "field", "value", "reason"),
    [
        *[(Reset, field, value, "whole number of at least 1") for field in WHOLE for value in (0, 1.5, True, "3")],
        (Reset, "patience", None, "at least 1. Try"),
        (Reset, "start_step", -1, "at least 0. Try `start_step=0`"),
        (Reset, "seed", -1, "at least 0"),
        (Reset, "significance", 0.0, "above 0 and below 1. Try `significance=0.001`"),
        (Reset, "significance", 1, "above 0 and below 1"),
        (Reset, "significance", True, "above 0 and below 1"),
        (Reset, "dry_run", 1, "a switch. Try `dry_run=True`"),
        (Reset, "bias", float("nan"), "a finite number"),
        (Reset, "bias", float("inf"), "a finite number"),
        (Reset, "frozen", None, "a switch"),
        (ThermalKick, "strength", 0, "above 0"),
        (ThermalKick, "depth", -1.0, "above 0"),
        (ThermalKick, "depth", "deep", "above 0"),
        (BiasWarming, "firing_rate", 0, "above 0 and below 1"),
        (BiasWarming, "firing_rate", 1.0, "above 0 and below 1"),
        (BiasWarming, "steps", 0, "at least 1"),
        (BiasWarming, "cap", 0, "above 0"),
        (BiasWarming, "margin", 0, "above 0"),
        (LeakySlope, "slope", 0, "above 0 and below 1"),
        (LeakySlope, "slope", 1, "above 0 and below 1"),
        (LeakySlope, "per_unit", 2, "a switch"),
        (LeakySlope, "ramp_steps", 1, "at least 2"),
        (SwapActivation, "activation", "relu", "one of leaky_relu, rrelu, elu, selu, gelu, silu"),
        (SwapActivation, "activation", None, "one of leaky_relu"),
        (SwapActivation, "activation", "prelu", "PReLU brings parameters"),
    ],
)
def test_bad_arguments_are_refused(make, field, value, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        make(**{field: value})
    assert str(caught.value).startswith(f"`{make.__name__}({field}={value!r})`")


def test_a_stop_before_the_start_is_refused():
    with pytest.raises(ValueError, match=r"behind `start_step=10`, or it never acts\. Try `stop_step=1010`"):
        Reset(start_step=10, stop_step=10)
    assert Reset(start_step=10, stop_step=11).stop_step == 11


# -- one's own ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lift(Remedy):
    height: float = 0.1

    def propose(self, view, generator):
        bias = view.attribution.bias.of(view.units)
        lift = self.height - view.report.peak[bias.units]
        return Edits(writes=(Write(bias, bias.read(view.values[bias.name]) + lift),))


def test_ones_own_remedy():
    values, laws, attribution = layer()
    new = written(Lift(height=0.5).propose(view_of(attribution, DEAD, values, laws), seeded()), values)
    assert torch.equal(new["fc.bias"], torch.where(DEAD, -7.5, -9.0))
    assert ladder_of([Lift(), "gelu"])[0] == Lift()
    with pytest.raises(ValueError, match=r"`Lift\(patience=0\)`"):
        Lift(patience=0)


def test_needs_that_no_site_has_are_refused():
    class Odd(Lift):
        needs = frozenset({"incomming"})

    with pytest.raises(ValueError, match=r"`Odd.needs` names \['incomming'\], which no site has"):
        Odd()


def test_one_remedy_from_the_command_line():
    """jsonargparse tells the members of a union by their fields."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    union = Reset | ThermalKick | BiasWarming | WakeUp | LeakySlope | SwapActivation | None
    parser.add_argument("--remedy", type=union)
    for given in (
        LeakySlope(slope=0.2),
        ThermalKick(depth=2.0),
        BiasWarming(cap=2.0),
        WakeUp(push=0.5),
        Reset(bias=0.1),
    ):
        name = f"lightning_deadrelu.remedies.{type(given).__name__}"
        own = {f.name for f in dataclasses.fields(given)} - {f.name for f in dataclasses.fields(Remedy)}
        fields = {field: getattr(given, field) for field in own}
        config = parser.parse_object({"remedy": {"class_path": name, "init_args": fields}})
        assert parser.instantiate_classes(config).remedy == given
