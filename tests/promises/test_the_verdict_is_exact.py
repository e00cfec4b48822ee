"""Promise 2: the masks are those of a loop over all activations; no data is not death, and NaN is not silence."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader
from toys import EVERYTHING, Log, Net, Verdicts, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor, find_dead_units


class Recorded(Net):
    """Keeps what each rectifier put out in each training batch, by plain hooks."""

    def __init__(self, net=None, **options):
        super().__init__(net, **options)
        self.taken, self.seen = False, []
        for name, module in self.named_modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda m, args, out, name=name: self._take(name, out))

    def _take(self, name, out):
        if self.taken:
            self.seen[-1].setdefault(name, []).append(out.detach().clone())

    def training_step(self, batch, batch_idx):
        self.seen.append({})
        self.taken = True
        loss = super().training_step(batch, batch_idx)
        self.taken = False
        return loss


def brute_force(observations, min_samples, window, all_rates=False):
    """Go through all observations, unit by unit; yield each window's {site: (silent, dead, age, firing rate)}.

    The rate is that of the first and last observation; the last is still to come where a window is cut short.
    """
    age = {}
    for start in range(0, len(observations), window):
        verdict = {}
        part = observations[start : start + window]
        for name in {name for outs in part for name in outs}:
            units = next(outs[name][0].shape[1] for outs in part if name in outs)
            rows = []
            for unit in range(units):
                fired = samples = hits_rated = samples_rated = 0
                for number, outs in enumerate(part):
                    values = [value for out in outs.get(name, ()) for value in out[:, unit].tolist()]
                    hits = sum(value > 0 for value in values)
                    age[name, unit] = 0 if hits else age.get((name, unit), 0) + len(values)
                    fired, samples = fired + hits, samples + len(values)
                    if all_rates or number in (0, window - 1):
                        hits_rated, samples_rated = hits_rated + hits, samples_rated + len(values)
                    if hits:
                        age[name, unit] = 0
                rows.append(
                    (
                        fired == 0,
                        fired == 0 and age[name, unit] >= min_samples,
                        age[name, unit],
                        hits_rated / samples_rated,
                    )
                )
            verdict[name] = rows
        yield verdict


def assert_equals_brute_force(report, verdict):
    assert [site.name for site in report.sites] == sorted(verdict)
    for site in report.sites:
        silent, dead, age, rate = map(list, zip(*verdict[site.name], strict=True))
        assert site.silent.tolist() == silent
        assert site.dead.tolist() == dead
        assert site.age.tolist() == age
        assert site.firing_rate.tolist() == rate


EXACT = {
    "every step": ({"every_n_steps": 1, "window": 4, "min_samples": 30}, {}),
    "every third": ({"every_n_steps": 3, "window": 2, "min_samples": 11}, {}),
    "accumulated": ({"every_n_steps": 2, "window": 3, "min_samples": 30}, {"accumulate_grad_batches": 3}),
    "long window": ({"every_n_steps": 1, "window": 100, "min_samples": 30}, {}),
}


@pytest.mark.parametrize(("case", "all_rates"), [*((case, False) for case in EXACT), ("accumulated", True)])
def test_verdicts_equal_a_brute_force_loop(case, all_rates):
    settings, options = EXACT[case]
    monitor, model = Verdicts(**settings), Recorded(lr=0.3)
    monitor.all_rates = all_rates
    fit(model, batches(22, 7, shuffle=True), monitor, max_epochs=2, **options)
    group = options.get("accumulate_grad_batches", 1)
    epochs = model.seen[:22], model.seen[22:]
    groups = [epoch[start : start + group] for epoch in epochs for start in range(0, 22, group)]
    joined = [{name: [out for seen in part for out in seen[name]] for name in part[0]} for part in groups]
    observed = joined[:: settings["every_n_steps"]]
    expected = list(brute_force(observed, settings["min_samples"], settings["window"], all_rates))
    windows = monitor.reports if len(monitor.reports) == len(expected) else monitor.reports[1:]  # one was provisional
    assert len(windows) == len(expected) > 0
    for report, verdict in zip(windows, expected, strict=True):
        assert_equals_brute_force(report, verdict)
    assert monitor.report.dead_units >= 3


def test_a_provisional_verdict_before_the_first_validation_does_not_end_the_window():
    log, monitor, model = Log(), Verdicts(every_n_steps=2, window=4, min_samples=1), Recorded(lr=0.0)
    fit(model, batches(12), monitor, val=batches(1), val_check_interval=5, logger=log)
    observed = model.seen[::2]
    assert [step for step, _ in log.verdicts()] == [4, 6, 11]
    provisional, first, last = monitor.reports
    assert_equals_brute_force(provisional, next(brute_force(observed[:3], 1, 4)))
    expected = list(brute_force(observed, 1, 4))
    assert_equals_brute_force(first, expected[0])
    assert_equals_brute_force(last, expected[1])


def test_a_short_run_ends_with_one_verdict_over_all_that_was_observed():
    log, monitor = Log(), Verdicts(every_n_steps=1, min_samples=1)
    fit(Net(), batches(3), monitor, logger=log)
    assert [step for step, _ in log.verdicts()] == [2]
    assert monitor.report.sites[0].samples == 15


def test_a_mask_hides_padding():
    class Tokens(Net):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).mean()

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0] = 1.0
        net[0].bias.copy_(torch.tensor([0.0] + [1.0] * 7))
    x = torch.full((6, 3, 4), -1.0)
    x[:, 2] = 1.0  # padding, on which alone unit 0 fires
    valid = torch.tensor([[1, 1, 0]] * 6)
    loader = DataLoader(torch.utils.data.TensorDataset(x, valid), batch_size=2)
    monitor = DeadReLUMonitor(**EVERYTHING, mask=lambda batch: batch[1])
    fit(Tokens(net, lr=0.0), loader, monitor)
    assert monitor.report["net.1"].dead.tolist() == [True] + [False] * 7
    assert monitor.report["net.1"].samples == 12
    monitor = DeadReLUMonitor(**EVERYTHING, mask=lambda batch: None)
    fit(Tokens(net, lr=0.0), loader, monitor)
    assert not monitor.report["net.1"].dead.any()


def test_a_layer_that_never_runs_is_neither_alive_nor_dead():
    model, monitor = Net(), DeadReLUMonitor(**EVERYTHING)
    model.spare = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    fit(model, batches(4), monitor)
    assert [site.name for site in monitor.report.sites] == ["net.1", "net.3"]
    assert monitor.report.unwatched == {"spare.1": "it has not run while observed"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_silence(value):
    class Poisoned(Net):
        def training_step(self, batch, batch_idx):
            batch = batch.clone()
            batch[0, 0] = value
            return self(batch).mean() * 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Poisoned(mlp(8)), batches(4), monitor)
    assert monitor.report["net.1"].nonfinite.any()
    assert not (monitor.report["net.1"].dead & monitor.report["net.1"].peak.isnan()).any()


def test_empty_batches_count_nothing():
    class Emptied(Net):
        def training_step(self, batch, batch_idx):
            return self(batch[:0] if batch_idx % 2 else batch).sum()

    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Emptied(), batches(4), monitor)
    assert monitor.report["net.1"].samples == 10


# -- computed weights, and sites that get lost --------------------------------------------------------------


class Ternary(nn.Module):
    """A quantised weight, made by code out of sight with its gradient passed straight through."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sign() * weight.abs().mean()

        @staticmethod
        def backward(ctx, grad):
            return grad

    def forward(self, weight):
        return self.Through.apply(weight)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", (torch.arange(4) > 0).float())

    def forward(self, weight):
        return weight * self.kept.view(1, -1, *[1] * (weight.ndim - 2))


def quantised(weight):
    return torch.fake_quantize_per_tensor_affine(weight, 0.1, 0, -8, 7)


class Quantised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, quantised(self.weight), self.bias)


COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "masked": lambda layer: parametrize.register_parametrization(layer, "weight", Masked()) or layer,
    "quantised out of sight": lambda layer: parametrize.register_parametrization(layer, "weight", Ternary()) or layer,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6, bias=False), lambda: nn.Conv1d(4, 6, 1, bias=False)])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_layer_whose_weight_is_computed_is_watched_as_before(name, make):
    layer = make()
    x = torch.randn(300, 4, 2)[..., 0] if isinstance(layer, nn.Linear) else torch.randn(300, 4, 2)
    model = nn.Sequential(layer, nn.ReLU())
    with torch.no_grad():
        x[:, 0] = x[:, 0].abs()
        layer.weight[2] = -layer.weight[2].abs()
    before = find_dead_units(model, [x])
    COMPUTED[name](layer)
    report = find_dead_units(model, [x])
    assert [site.units for site in report.sites] == [site.units for site in before.sites] == [6]
    fired = (model(x) > 0).transpose(0, 1).flatten(1).sum(1)
    assert report.sites[0].dead.tolist() == (fired == 0).tolist()


def test_a_quantised_layer_is_watched():
    model = nn.Sequential(Quantised(4, 6, bias=False), nn.ReLU())
    assert find_dead_units(model, [torch.randn(300, 4)]).sites[0].units == 6


class Pruning(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            for layer in (pl_module.net[0], pl_module.net[2]):
                prune.l1_unstructured(layer, "weight", 0.2)


def without_bias():
    net = nn.Sequential(nn.Linear(4, 8, False), nn.ReLU(), nn.Linear(8, 6, False), nn.ReLU(), nn.Linear(6, 1))
    with torch.no_grad():
        net[2].weight[:3] = -1
    return net


def test_pruning_in_the_middle_of_a_run_loses_no_site():
    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Net(without_bias(), lr=0.0), batches(8), monitor, Pruning())
    (first, second) = monitor.report.sites
    assert (first.name, second.name) == ("net.1", "net.3")
    assert first.samples == second.samples == 20
    assert second.dead.tolist() == [True] * 3 + second.dead.tolist()[3:]


class LosesItsLayers(Net):
    """From the fifth batch on runs other layers, as a growing model does."""

    def forward(self, x):
        return super().forward(x) if len(self.losses) < 4 else x.sum(-1, keepdim=True) * self.net[4].bias


def test_a_fraction_never_falls_because_sites_got_lost():
    model, monitor = LosesItsLayers(without_bias(), lr=0.0), DeadReLUMonitor(**EVERYTHING)
    seen = []

    class Scores(Callback):
        def on_train_batch_end(self, *_):
            seen.append(monitor.report and (monitor.report.dead_units, monitor.report.units))

    with pytest.warns(
        UserWarning, match=r"`net\.1`, `net\.3` did not run in this window; the last verdict stands"
    ) as said:
        fit(model, batches(16), monitor, Scores())
    assert len([one for one in said if "did not run" in str(one.message)]) == 1
    assert len(set(seen[3:])) == 1
    assert seen[-1][0] >= 3
