"""Selections found where they are made: as sparse autoencoders write them, against the latents themselves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import resumed_and_whole
from torch import nn
from toys import Loader, Net, Verdicts, assert_same, fit, reports_of, tensors, watchers
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu import DeadReLUMonitor, find_dead_units, watch
from lightning_deadrelu.observe.watch import Watch

OFTEN = {"every_n_steps": 1, "window": 4, "min_samples": 1}
UNITS, K = 10, 2


# -- how selections are written --------------------------------------------------------------------------------


def topk_in_place(x):
    """OpenAI's and SAELens' way."""
    values, indices = torch.topk(x, K, dim=-1, sorted=False)
    result = torch.zeros_like(x)
    result.scatter_(-1, indices, values.relu())
    return result


def topk_of_rectified(x):
    """The way of dictionary_learning."""
    acts = x.relu()
    chosen = acts.topk(K, sorted=False, dim=-1)
    return torch.zeros_like(acts).scatter_(dim=-1, index=chosen.indices, src=chosen.values)


def topk_mask(x):
    return x * torch.zeros_like(x).scatter_(-1, torch.topk(x, K, dim=-1)[1], 1)


def topk_negative_too(x):
    values, indices = (x - 1).topk(K)
    return x.new_zeros(x.shape).scatter(-1, indices, values)


def topk_above_the_last(x):
    return x * (x >= x.topk(K).values[..., -1:])


def over_the_batch(x):
    """SAELens' way."""
    acts = x.relu()
    flat = acts.flatten()
    chosen = torch.topk(flat, K * x.shape[:-1].numel(), dim=-1)
    return torch.zeros_like(flat).scatter(-1, chosen.indices, chosen.values).reshape(acts.shape)


def over_the_batch_viewed(x):
    flat = x.reshape(-1)
    values, indices = flat.topk(K * len(x), sorted=False)
    return torch.zeros_like(flat).scatter_(-1, indices, values).view(x.shape)


def jumprelu(x):
    return x * (x > torch.full((UNITS,), 0.3))


def jumprelu_of_rectified(x):
    acts = x.relu()
    return acts * (acts > 0.3)


def jumprelu_beside_a_rectifier(x):
    return F.relu(x) * (x > torch.tensor(0.3)).to(x.dtype)


def jumprelu_where(x):
    return torch.where(x > 0.3, x, 0.0)


def jumprelu_turned_round(x):
    return torch.lt(0.3 * torch.ones(()), x).float() * x


class Function(torch.autograd.Function):
    @staticmethod
    def forward(x, threshold):
        return (x * (x > threshold)).to(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, threshold = ctx.saved_tensors
        return (x > threshold) * gradient, None


def jumprelu_function(x):
    return Function.apply(x, torch.full((UNITS,), 0.3))


WAYS = {
    "topk": [topk_in_place, topk_of_rectified, topk_mask, topk_negative_too],
    "batch_topk": [over_the_batch, over_the_batch_viewed],
    "jumprelu": [
        jumprelu,
        jumprelu_of_rectified,
        jumprelu_beside_a_rectifier,
        jumprelu_where,
        jumprelu_turned_round,
        jumprelu_function,
        topk_above_the_last,
    ],
}
KINDS = {way.__name__: kind for kind, ways in WAYS.items() for way in ways}
ALL = {way.__name__: way for ways in WAYS.values() for way in ways}


class Autoencoder(nn.Module):
    """An autoencoder whose last three latents can never be selected; it keeps its latents, for the ground truth."""

    def __init__(self, way):
        super().__init__()
        self.up, self.down, self.way = nn.Linear(4, UNITS), nn.Linear(UNITS, 4), way
        self.latents = []
        with torch.no_grad():
            self.up.bias[7:] = -100.0

    def forward(self, x):
        latents = self.way(self.up(x))
        self.latents.append(latents.detach().clone())
        return self.down(latents)


def counted(latents):
    """Count by loops how often each latent was not zero, and how many samples there were."""
    fired, samples = [0] * UNITS, 0
    for batch in latents:
        for row in batch.reshape(-1, UNITS).tolist():
            samples += 1
            for unit, value in enumerate(row):
                fired[unit] += value != 0
    return fired, samples


def selection(report):
    return next(site for site in report.sites if site.kind in WAYS)


# -- verdicts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(9, 4), (2, 3, 4)])
def test_who_fires_is_who_is_not_zero(name, shape):
    torch.manual_seed(0)
    model = Autoencoder(ALL[name])
    report = find_dead_units(model, list(torch.randn(6, *shape)), min_samples=1)
    site, (fired, samples) = selection(report), counted(model.latents)
    assert (site.name, site.kind, site.units) == (f"{KINDS[name]}", KINDS[name], UNITS)
    assert site.fired.tolist() == fired
    assert site.elements == site.samples == samples
    assert site.dead.tolist() == [count == 0 for count in fired]
    assert site.age[-1] == samples
    assert (site.peak > 0).equal(~site.silent)
    assert report.unwatched == {}
    rest = {one.kind for one in report.sites} - {site.kind}
    assert rest == ({"relu"} if "rectif" in name or name == "over_the_batch" else set())


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 4), st.sampled_from(sorted(ALL)))
def test_counts_equal_a_loop_whatever_is_selected_from(seed, rows, batches, name):
    """Numbers of few values have ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    way, latents = ALL[name], []
    model = nn.Sequential(nn.Identity())

    def forward(model, x):
        latents.append(way(model(x * 1.0)))

    class Parent(nn.Module):
        def forward(self, x):
            forward(model, x)

    data = [torch.randint(-2, 3, (rows, UNITS), generator=generator) / 2 for _ in range(batches)]
    site = selection(find_dead_units(Parent(), data, min_samples=1))
    assert site.fired.tolist() == counted(latents)[0]


def test_how_far_a_unit_is_from_being_selected():
    x = torch.tensor([[3.0, 2.0, -1.0, 0.5], [1.0, 4.0, 2.5, 0.0]])

    def peaks(way):
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
        nn.init.eye_(model[0].weight)

        class Way(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                return way(self.inner(x))

        return selection(find_dead_units(Way(), [x], min_samples=1)).peak.tolist()

    assert peaks(topk_in_place) == [3.0, 4.0, 2.5, -1.5]
    assert peaks(over_the_batch_viewed) == [3.0, 4.0, 2.5, -1.5]
    assert peaks(lambda x: x * (x > torch.tensor([9.0, 0.0, 0.0, 1.0]))) == [-6.0, 4.0, 2.5, -0.5]


def test_it_is_counted_too_where_what_was_selected_from_is_gone():
    class OneLine(Autoencoder):
        def forward(self, x):
            values, indices = self.up(x).topk(K)
            self.latents.append(torch.zeros(len(x), UNITS).scatter(-1, indices, values))
            return self.down(self.latents[-1])

    model = OneLine(None)
    site = selection(find_dead_units(model, tensors(4), min_samples=1))
    assert site.fired.tolist() == counted([one.detach() for one in model.latents])[0]
    assert site.kind == "topk"
    assert site.peak[7:].tolist() == [0.0] * 3


def channels(x):
    flat = x.flatten(1)
    values, indices = flat.topk(5)
    return torch.zeros_like(flat).scatter(1, indices, values).view_as(x)


def test_units_are_channels_behind_a_convolution():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), Way(channels))
    with torch.no_grad():
        model[0].bias[0] = -100
    images = list(torch.randn(4, 2, 1, 5, 5))
    site = selection(find_dead_units(model, images, min_samples=1))
    outputs = torch.cat([model(one) for one in images])
    assert (site.kind, site.units, site.samples) == ("topk", 3, 8)
    assert site.fired.tolist() == (outputs != 0).sum((0, 2, 3)).tolist()


class Way(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return self.way(x)


def dropout_by_hand(x):
    return x * (torch.rand_like(x) > 0.5)


def gated_by_another(x):
    return x * (x.roll(1, -1) > 0)


def auxiliary_loss(x):
    x = torch.where(torch.arange(UNITS) > 6, x, -torch.inf)
    values, indices = x.topk(K)
    return torch.zeros_like(x).scatter(-1, indices, values)


def lowest(x):
    values, indices = x.topk(K, largest=False)
    return torch.zeros_like(x).scatter(-1, indices, values)


def into_something(x):
    values, indices = x.topk(K)
    return torch.ones_like(x).scatter_(-1, indices, values)


def not_scattered(x):
    return x.topk(K).values.relu().sum(-1, keepdim=True) + x


def clipped(x):
    return x * (x < 1)


NO_SELECTIONS = [dropout_by_hand, gated_by_another, auxiliary_loss, lowest, into_something, not_scattered, clipped]


@pytest.mark.parametrize("way", NO_SELECTIONS)
def test_what_is_none_is_taken_for_none(way):
    report = find_dead_units(nn.Sequential(nn.Linear(4, UNITS), Way(way)), tensors(2), min_samples=1)
    assert report.sites == ()


# -- nothing changes ---------------------------------------------------------------------------------------------


def test_a_gradient_proves_that_a_unit_was_chosen():
    torch.manual_seed(0)
    model = Autoencoder(topk_in_place)
    with torch.no_grad():
        model.up.bias[7:] = torch.tensor([-100.0, -1.0, -1.0])
    every = {"every_n_steps": 10, "window": 4, "min_samples": 36, "gradient_evidence": True}
    data = torch.randn(31, 9, 4, generator=torch.Generator().manual_seed(2))
    with watch(model, optimizer := torch.optim.SGD(model.parameters(), 0.0), **every) as monitor:
        for batch in data:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    fired, _ = counted(model.latents)
    assert [unit for unit, count in enumerate(fired) if count] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert selection(monitor.report).dead.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("name", ["topk_in_place", "topk_mask", "over_the_batch", "jumprelu", "jumprelu_function"])
def test_training_is_the_same_with_a_monitor_and_without(name):
    def everything_after(*callbacks):
        torch.manual_seed(0)
        model = Net(Autoencoder(ALL[name]))
        trainer = fit(model, Loader(tensors(12)), *callbacks)
        return model.state_dict(), trainer.optimizers[0].state_dict(), model.losses, torch.get_rng_state()

    plain = everything_after()
    assert_same(everything_after(DeadReLUMonitor(**OFTEN, checkup=True)), plain)
    assert watchers() == []


@pytest.mark.parametrize("name", ["topk_in_place", "over_the_batch", "jumprelu"])
def test_compiled_models_are_observed_eagerly(name):
    torch.manual_seed(0)
    model = Autoencoder(ALL[name])
    model.latents = _Forgetful()
    compiled = torch.compile(model, backend="aot_eager")
    with watch(compiled, optimizer := torch.optim.SGD(model.parameters(), 0.0), **OFTEN) as monitor:
        for batch in tensors(8):
            compiled(batch).sum().backward()
            optimizer.step()
            monitor.step()
    assert monitor.failure is None
    site = selection(monitor.report)
    assert site.samples == 20
    with torch.no_grad():
        latents = [ALL[name](model.up(batch)) for batch in tensors(8)[4:]]
    assert site.fired.tolist() == counted(latents)[0]


class _Forgetful(list):
    def append(self, value):
        pass


# -- several ranks, resume -----------------------------------------------------------------------------------------


def halves(rank):
    return [batch[rank::2] for batch in tensors(10, size=6)]


def fit_on(rank, name):
    torch.manual_seed(0)
    monitor = Verdicts(**{**OFTEN, "window": 10, "min_samples": 5})
    model = Net(Autoencoder(ALL[name]), lr=0.0)
    ddp_trainer(callbacks=[monitor]).fit(model, Loader(halves(rank)))
    return reports_of(monitor), selection(monitor.report).fired.tolist(), model.net.latents


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["topk_in_place", "over_the_batch", "jumprelu"])
def test_two_ranks_count_what_both_selected(name):
    first, second = on_two_ranks(fit_on, name)
    assert first[:2] == second[:2]
    fired, samples = counted([*first[2], *second[2]])
    assert first[1] == fired
    site = next(site for site in first[0][-1]["sites"] if site["kind"] == KINDS[name])
    assert site["dead"] == [unit for unit, count in enumerate(fired) if not count]
    assert site["samples"] == samples


def test_a_run_goes_on_as_if_it_had_not_ended():
    torch.manual_seed(0)
    later, whole = resumed_and_whole(Autoencoder(topk_in_place), tensors(12), **{**OFTEN, "min_samples": 30})
    assert_same(later.to_dict(), whole.to_dict())


# -- who feeds and reads -------------------------------------------------------------------------------------------


def attributed(way):
    model = Autoencoder(way)
    watch = Watch(model)
    watch.trace()
    with watch:
        model(torch.randn(6, 4)).square().mean().backward()
    assert watch.tracer.failure == ""
    return watch.attributions


def names(slices):
    return [one.name for one in slices]


def test_a_reset_is_refused_where_units_compete_and_a_lift_is_not():
    one = attributed(topk_in_place)["topk"]
    assert names(one.incoming) == ["up.weight", "up.bias"]
    assert one.no_outgoing == "a unit that is chosen takes the place of another"
    both = attributed(over_the_batch)
    assert names(both["relu"].incoming) == ["up.weight", "up.bias"]
    assert both["relu"].no_outgoing == "`reshape` reads it"
    assert both["batch_topk"].no_incoming == "it rectifies what `relu` puts out"


def test_a_threshold_leaves_both_known():
    one = attributed(jumprelu)["jumprelu"]
    assert names(one.incoming) == ["up.weight", "up.bias"]
    assert names(one.outgoing) == ["down.weight"]


def test_what_else_reads_the_chosen_is_seen():
    def leaking(x):
        values, indices = x.topk(K)
        return torch.zeros_like(x).scatter(-1, indices, values) + values.sum()

    assert attributed(leaking)["topk"].no_incoming == "`up.weight` also feeds `topk` (it joins units)"

    def counting(x):
        mask = (x > 0.3).float()
        return x * mask + mask.mean() * torch.ones(UNITS)

    assert "gt" in attributed(counting)["jumprelu"].no_incoming


# -- repairs -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*% dead", "ignore:.* refused `")
@pytest.mark.parametrize("name", ["topk_in_place", "over_the_batch", "over_the_batch_viewed", "jumprelu"])
def test_what_is_dead_comes_back(name):
    torch.manual_seed(0)
    model = Autoencoder(ALL[name])
    with torch.no_grad():
        model.up.bias[7:] = -3.0
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    data = torch.randn(400, 16, 4, generator=torch.Generator().manual_seed(1))
    settings = {"every_n_steps": 2, "window": 5, "min_samples": 50, "threshold": 0.0, "remedy": "auto"}
    fire = torch.zeros(3, dtype=torch.bool)
    with watch(model, optimizer, **settings) as monitor:
        for batch in data:
            (model(batch) - batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if report := monitor.step():
                fire |= ~selection(report).silent[7:]
                assert report.step > 10 or not fire.any()
    assert monitor.failure is None
    said = "\n".join(map(str, monitor.events))
    assert fire.all(), said
    if name != "jumprelu":
        assert not any(event.action == "edited" and event.remedy == "Reset" for event in monitor.events), said
