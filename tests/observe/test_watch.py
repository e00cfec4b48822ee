"""The layout: what gets a place, under which name, and how counts move to another layout."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from lightning_deadrelu import find_dead_units
from lightning_deadrelu.observe.audit import trace
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import Rules


class Shared(nn.Module):
    """One ReLU behind three layers, so that its sites are numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, width) for width in (4, 4, 4))
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.Linear(4, 2), nn.ReLU6())

    def forward(self, x, order=(0, 1, 2)):
        for i in order:
            x = self.relu(self.layers[i](x))
        return self.head(x)


def names(watch: Watch) -> list[str]:
    return [site.name for site in watch.liveness.report().sites]


def run(order=(0, 1, 2), **arguments) -> Watch:
    torch.manual_seed(0)
    watch = Watch(Shared(), **arguments)
    with watch.probe:
        watch._model(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), order)
    assert watch.probe.failure is None
    return watch


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], ["relu", "relu-1", "relu-2", "head.1"]),
        ([], ["relu-1"], ["relu", "relu-2", "head.1"]),  # names do not depend on what is left out
        (["head.*"], [], ["head.1"]),
        (["relu6"], [], ["head.1"]),
        (["relu*"], ["relu-2"], ["relu", "relu-1"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    watch = run(include=include, exclude=exclude)
    assert names(watch) == expected
    watch.check_patterns()


def test_subscribers_do_not_displace_each_other():
    watch, seen = Watch(Shared()), []
    handles = [
        watch.probe.router.subscribe_input("head", lambda x: seen.append("first")),
        watch.probe.router.subscribe_input("head", lambda x: seen.append("second")),
        watch.subscribe(lambda number, rectifier, x, dims, valid: seen.append(rectifier.kind)),
    ]
    expected = ["relu", "first", "second", "relu6"]
    for gone, handle in zip(["", "first", "second"], handles, strict=True):
        expected = [name for name in expected if name != gone]
        with watch.probe:
            watch._model(torch.randn(5, 4), (0,))
        assert watch.probe.failure is None
        assert seen == expected
        seen.clear()
        handle.remove()
    assert not watch.probe.is_subscribed


def test_patterns_are_held_against_what_ran_on_all_ranks():
    """``layers.1`` has run on one of them, and is no site: late there is not late."""
    for order in ((0, 1), (0,)):
        watch = run(order=order, include=["relu*", "layers.1"])
        ran = [run(order=other).ran for other in ((0, 1), (0,))]
        with pytest.raises(ValueError, match=r"layers\.1"):
            watch.check_patterns(ran)
        watch.check_patterns([ran[1], ran[1]])


def test_counts_move_with_their_sites_to_another_layout():
    ours, theirs = run(order=(0, 1)), run(order=(2, 1))
    ours.liveness.flush()
    before = {site.source: site for site in ours.sites}
    layout = tuple(dict.fromkeys([*theirs.sites, *ours.sites]))
    counts = {ours.sites[i].source: ours.liveness.fired[ours.layout.place(i)].clone() for i in range(len(ours.sites))}
    ours.adopt(layout)
    assert ours.sites == layout
    for i, site in enumerate(ours.sites):
        fired = ours.liveness.fired[ours.layout.place(i)]
        assert torch.equal(fired, counts[site.source]) if site.source in before else not fired.any()
    with ours.probe:  # and what comes next goes to the right place
        ours._model(torch.ones(1, 4), (2,))
    assert ours.liveness.totals().elements.sum(1).tolist() == [1, 5, 6, 5]


def test_a_site_left_out_stays_out_in_another_layout():
    watch = run(exclude=["relu-1"])
    watch.adopt(list(watch.sites))
    with watch.probe:
        watch._model(torch.ones(1, 4))
    assert names(watch) == ["relu", "relu-2", "head.1"]
    assert len(watch.sites) == 4


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4)])
def test_the_mask_tells_padding_from_data(shape):
    watch = Watch(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), rules=Rules(1))
    watch.valid = torch.tensor([[True, True, False], [True, False, False]])
    with watch.probe:
        watch._model(torch.ones(shape))
    assert watch.liveness.report().sites[0].samples == 3


def test_the_mask_does_not_speak_of_other_shapes():
    watch = Watch(nn.Sequential(nn.Conv1d(4, 2, 1), nn.ReLU()), rules=Rules(1))
    watch.valid = torch.tensor([[True, True, False], [True, False, False]])
    with watch.probe:
        watch._model(torch.ones(2, 4, 3))
    assert watch.liveness.report().sites[0].samples == 2


def test_unwatched_names_what_has_not_run():
    watch = run(order=())
    assert watch.unwatched() == {"relu": "it has not run while observed"}


def test_a_pattern_for_what_has_not_run_yet_is_no_mistake():
    run(order=(), include=["relu*", "head.1", "layers.*"]).check_patterns()
    with pytest.raises(ValueError, match=r"`include=\['head'\]`: \['head'\] matches no activation"):
        run(include=["head"]).check_patterns()


def test_a_dimension_given_for_no_site_is_refused():
    watch = run(unit_dims={"nowhere.*": 1})
    with pytest.raises(ValueError, match=r"`unit_dims=\['nowhere.\*'\]`: \['nowhere.\*'\] matches no activation"):
        watch.check_patterns()


def test_unit_dims_override_the_producer():
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(x))

    for dim, units in ((1, 5), (-1, 3), (0, 2)):
        watch = Watch(Columns(), unit_dims={"act": dim})
        with watch.probe:
            watch._model(torch.randn(2, 5, 4))
        assert watch.sites[0].units == units


class Twice(nn.Module):
    """One module, two sites, of one weight."""

    def __init__(self):
        super().__init__()
        self.W_i, self.tau, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)

    def forward(self, x):
        hidden = self.W_i(x)
        return self.head(self.tau(hidden)) + self.head(self.tau(-hidden))


class Functional(Twice):
    def forward(self, x):
        hidden = self.W_i(x)
        return self.head(hidden.relu()) + self.head((-hidden).relu())


@pytest.mark.parametrize(("model", "name"), [(Twice, "tau"), (Functional, "relu")])
def test_a_reason_names_another_site_by_the_name_it_goes_by(model, name):
    sites = trace(model(), torch.rand(5, 4)).attributions
    assert list(sites) == [name, f"{name}-1"]
    assert sites[name].no_incoming == f"`W_i.weight` also feeds `{name}-1`"


class Spaced(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("first head", nn.Linear(4, 3))
        self.add_module("my act", nn.ReLU())
        self.add_module("left:out", nn.ReLU())
        self.add_module("never ran", nn.ReLU())

    def forward(self, x):
        first, act, left, _ = self.children()
        return left(act(first(x)))


@pytest.mark.parametrize("patterns", [{"include": ["my act"]}, {"exclude": ["left:out"]}, {"include": ["my_*"]}])
def test_a_path_with_a_space_has_one_name_and_is_found_by_both_spellings(patterns):
    report = find_dead_units(Spaced(), [torch.rand(5, 4)], **patterns)
    assert [site.name for site in report.sites] == ["my_act"]
    assert report.unwatched == {"never_ran": "it has not run while observed"}


class Tasks(nn.Module):
    """A body, and a head for each task, with a loss module that is no part of it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.act = nn.ReLU()
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(6, 5), nn.ReLU())])

    def forward(self, x):
        h = nn.Identity()(self.act(self.body(x)))
        return torch.cat([torch.relu(head(h) - 1) for head in self.heads], 1)


def widen(model):
    model.body[0], model.body[2] = nn.Linear(4, 9), nn.Linear(9, 7)
    model.heads[0][0] = nn.Linear(7, 5)


CHANGES = {
    "wider layers": widen,
    "another activation module": lambda model: setattr(model, "act", nn.ReLU()),
    "a head more": lambda model: model.heads.append(nn.Sequential(nn.Linear(6, 3), nn.ReLU6())),
    "another body": lambda model: setattr(model, "body", nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 6))),
    "no change": lambda model: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_exchanged_between_observations_is_known_from_the_first_on(change):
    def observe(watch):
        watch.probe.arm()
        model(torch.randn(5, 4))
        watch.probe.disarm()
        return set(watch.sites)

    model = Tasks()
    watch = Watch(model)
    before = observe(watch)
    CHANGES[change](model)
    after = observe(Watch(model))
    assert observe(watch) == observe(watch) == before | after
    assert watch.probe.failure is None
    assert (before == after) == (change in ("no change", "another activation module"))


def test_tangents_of_forward_mode_are_not_counted():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    watch = Watch(model)
    with watch.probe, forward_ad.dual_level():
        out = model(forward_ad.make_dual(torch.ones(5, 4), torch.ones(5, 4)))
        assert forward_ad.unpack_dual(out).tangent is not None
    assert watch.probe.failure is None
    assert watch.liveness.report().sites[0].samples == 5
