"""What is told of latents, against loops over the latents themselves."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from toys import Loader, Log, Net, fit, tensors
from views import report_of

from lightning_deadrelu import DeadReLUMonitor, LivenessReport, watch
from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.report.latents import latent_metrics, latents_of
from lightning_deadrelu.statistics import Totals, UnitHistory, judge
from lightning_deadrelu.statistics.totals import NOTHING

UNITS, KEYS = 12, ("l0", "dead_features", "mean_log10_feature_sparsity", "below_1e-5", "below_1e-6")


class TopK(nn.Module):
    """Latents of which the last three never fire; what they are stays, for the ground truth."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, UNITS), nn.ReLU(), nn.Linear(UNITS, 4)
        self.latents = []
        with torch.no_grad():
            self.up.bias[9:] = -100.0

    def forward(self, x):
        x = self.act(self.up(x))
        values, places = x.topk(3)
        self.latents.append(torch.zeros_like(x).scatter(-1, places, values))
        return self.down(self.latents[-1])


def expected(latents, window, dead_from):
    """Tell by loops what SAELens would log after some batches; the last ``window`` make densities."""
    fired = [[any(row[unit] != 0 for row in batch.tolist()) for unit in range(UNITS)] for batch in latents]
    passes, tokens, counts, rows = [0] * UNITS, [0] * UNITS, [0] * UNITS, 0
    for number, (batch, who) in enumerate(zip(latents, fired, strict=True)):
        for unit in range(UNITS):
            passes[unit] = 0 if who[unit] else passes[unit] + 1
            tokens[unit] = 0 if who[unit] else tokens[unit] + len(batch)
            if number >= len(latents) - window:
                counts[unit] += sum(row[unit] != 0 for row in batch.tolist())
        rows += len(batch) if number >= len(latents) - window else 0
    logs = [math.log10(count / rows + 1e-10) for count in counts]
    return {
        "l0": sum(counts) / rows,
        "dead_features": sum(count >= dead_from for count in tokens),
        "mean_log10_feature_sparsity": sum(logs) / UNITS,
        "below_1e-5": 0.0,  # of so few rows that cannot be said
        "below_1e-6": 0.0,
        "mean_passes_since_fired": sum(passes) / UNITS,
    }


def test_a_loop_logs_what_saelens_would():
    torch.manual_seed(0)
    model, logged = TopK(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    log = lambda metrics, step: logged.append((step, metrics))  # noqa: E731
    settings = {"every_n_steps": 1, "window": 4, "min_samples": 30, "preset": "sae", "log": log}
    with watch(model, optimizer, **settings) as monitor:
        for batch in tensors(12):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    assert [step for step, _ in logged] == [3, 7, 11]
    for step, metrics in logged:
        own = {key.removeprefix("dead_relu_sae/topk/"): value for key, value in metrics.items() if "_sae/" in key}
        assert own == pytest.approx(expected(model.latents[: step + 1], 4, 30))
    assert own["dead_features"] >= 3


def test_a_logger_gets_them_if_asked():
    for preset in ("sae", None):
        log = Log()
        fit(Net(TopK()), Loader(tensors(8)), DeadReLUMonitor(every_n_steps=1, window=4, preset=preset), logger=log)
        keys = {key for _, row in log.verdicts() for key in row if key.startswith("dead_relu_sae/net-topk/")}
        assert len(keys) == (6 if preset else 0)


def of(kind, **fields):
    return replace(report_of(torch.zeros(4, dtype=torch.bool)), **{"kind": kind, "name": kind, **fields})


def test_latents_are_what_is_selected_else_what_is_rectified():
    relu, topk, point, gelu = of("relu"), of("topk"), of("watchpoint"), of("gelu", smooth=True)
    assert latents_of(LivenessReport((relu, topk, point, gelu))) == (topk, point)
    assert latents_of(LivenessReport((relu, gelu))) == (relu,)


def test_what_was_silent_in_a_short_window_is_not_yet_rare():
    fired = torch.tensor([0, 0, 0, 40])
    age = torch.tensor([99_999, 100_000, 1_000_000, 0])
    last = torch.tensor([5, 0, -1, 9], dtype=torch.int32)
    short = of("topk", fired=fired, age=age, last_fired=last, elements=5_000, samples=5_000)
    told = latent_metrics(LivenessReport((short,), step=9), "x")
    assert (told["x_sae/topk/below_1e-5"], told["x_sae/topk/below_1e-6"]) == (2, 1)
    assert told["x_sae/topk/mean_passes_since_fired"] == (4 + 9 + 10 + 0) / 4
    long = of("topk", fired=torch.tensor([5, 15, 200, 0]), age=age * 0 + 0, last_fired=last, elements=10**7)
    told = latent_metrics(LivenessReport((replace(long, age=torch.tensor([0, 0, 0, 10**7])),)))
    assert (told["dead_relu_sae/topk/below_1e-5"], told["dead_relu_sae/topk/below_1e-6"]) == (3, 2)


def test_ten_million_tokens_are_a_threshold_as_good_as_any():
    """In windows of a million tokens each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    with torch.no_grad():
        model[0].bias[1:] = torch.tensor([50.0, 50.0, -50.0])
    optimizer, dead = torch.optim.SGD(model.parameters(), 0.0), []
    with watch(model, optimizer, every_n_steps=1, window=1, min_samples=10_000_000, preset="sae") as monitor:
        batch = torch.randn(1_000_000, 2)
        for number in range(11):
            if number == 1:
                with torch.no_grad():
                    model[0].bias[2] = -50.0
            model(batch).sum().backward()
            optimizer.step()
            dead.append(monitor.step().sites[0].dead.tolist())
    assert [number for number, mask in enumerate(dead) if mask[3]] == [9, 10]
    assert [number for number, mask in enumerate(dead) if mask[2]] == [10]
    assert not any(mask[1] for mask in dead)
    assert monitor.report.sites[0].age.tolist()[2:] == [10_000_000, 11_000_000]


def test_ages_are_beyond_32_bits():
    layout = Layout([Site("a", False, "topk", ("w",), 2)])
    many, maxima = torch.full((1, 2), 2**31), torch.tensor(list(NOTHING.values()))[:, None].repeat(1, 2)
    maxima[list(NOTHING).index("last_fired")] = torch.tensor([-1.0, 1.0])
    totals = Totals(
        fired=torch.tensor([0, 3]),
        samples=many,
        elements=many,
        blind=many * 0,
        magnitude=torch.zeros(2),
        projection=torch.zeros(2),
        maxima=maxima,
    )
    before = replace(UnitHistory.empty(2, 1), age=torch.tensor([2**33, 2**33]))
    report, after = judge(totals, before, layout)
    assert report.sites[0].age.tolist() == [2**33 + 2**32, 0]
    assert after.age.dtype == torch.int64
    assert latent_metrics(report)["dead_relu_sae/a/l0"] == 3 / 2**32


def test_another_preset_is_refused():
    with pytest.raises(ValueError, match=r"`watch\(preset='moe'\)`: there is one.*Try `preset=\"sae\"`"):
        watch(nn.ReLU(), torch.optim.SGD([torch.zeros(1)], 0.1), preset="moe")
