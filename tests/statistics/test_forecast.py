"""Who sinks is warned about before it is dead, and few others are."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_deadrelu import LivenessReport, UnitLiveness, find_dead_units
from lightning_deadrelu.statistics.forecast import Peaks, at_risk_fraction, forecast


def slowly(peaks: list[float], most_rising: int) -> tuple[bool, float, float]:
    """Do for one unit, in loops, what `forecast` does for all."""
    pairs = list(itertools.combinations(range(len(peaks)), 2))
    signs = [(peaks[j] > peaks[i]) - (peaks[j] < peaks[i]) for i, j in pairs]
    if not all(map(math.isfinite, peaks)) or sum(signs) > 2 * most_rising - len(pairs):
        return False, 0.0, math.inf
    slope = statistics.median((peaks[j] - peaks[i]) / (j - i) for i, j in pairs)
    level = statistics.median(peak - slope * (i - len(peaks) + 1) for i, peak in enumerate(peaks))
    left = max(level, 0.0) / -slope if slope < 0 else math.inf
    return left <= len(peaks) and peaks[-1] > 0, slope, left


def most_rising(windows: int) -> int:
    """Count by trying all permutations which numbers of rising pairs one in 200 at most falls below."""
    rising = [
        sum(a < b for a, b in itertools.combinations(order, 2)) for order in itertools.permutations(range(windows))
    ]
    return max(k for k in range(-1, 20) if sum(r <= k for r in rising) <= 0.005 * len(rising))


@pytest.mark.parametrize("windows", [6, 7, 8])
def test_forecast_is_that_of_a_slow_loop(windows):
    trend = torch.arange(windows)[:, None] * torch.linspace(-1.2, 0.5, 300)
    peaks = torch.randn(windows, 300, dtype=torch.float64) + trend + 7
    peaks[2, ::50], peaks[:, 1::50] = math.nan, 3.0
    peaks[1, 2::50], peaks[3, 3::50] = -math.inf, math.inf
    peaks[1:4, 4::5] = peaks[1:4, 4::5].round()  # ties
    found, most = forecast(peaks), most_rising(windows)
    expected = [slowly(column, most) for column in peaks.T.tolist()]
    assert found.at_risk.tolist() == [at_risk for at_risk, _, _ in expected]
    assert 10 < found.at_risk.sum() < 200
    torch.testing.assert_close(found.slope, torch.tensor([slope for _, slope, _ in expected]).double())
    torch.testing.assert_close(found.windows_left, torch.tensor([left for _, _, left in expected]).double())


@pytest.mark.parametrize("windows", range(6))
def test_few_windows_tell_nothing(windows):
    assert not forecast(torch.arange(windows, 0, -1.0)[:, None].expand(-1, 3)).at_risk.any()


@pytest.mark.parametrize(("height", "most"), [(1, 0.002), (2, 0.003), (5, 0.001)])
def test_false_alarms_are_few(height, most):
    """Peaks without a trend, at so many standard deviations above zero."""
    assert forecast(torch.randn(8, 200_000) + height).at_risk.float().mean() < most


def test_what_sinks_too_slowly_is_no_risk():
    found = forecast(torch.stack([torch.linspace(8, end, 8) for end in (7.0, 4.5, 3.5)], 1))
    assert found.at_risk.tolist() == [False, False, True]
    assert found.windows_left.tolist() == pytest.approx([49, 9, 5.444], abs=0.01)


def sinking(window: int, units: int = 8) -> torch.Tensor:
    """Make inputs: unit 0 sinks by 0.25 a window from 3 and dies after window 12, the others stay."""
    rows = torch.rand(400, units) * 2 - 1
    rows[:, 0] = torch.rand(400) - 1 + 3 - 0.25 * window
    return rows


def judged(rows: torch.Tensor) -> LivenessReport:
    liveness = UnitLiveness({"relu": rows.shape[1]})
    liveness.update(rows)
    return liveness.report()


def test_a_sinking_unit_is_warned_about_before_it_dies():
    peaks, warned, dead = Peaks(), {}, None
    for window in range(16):
        report = judged(sinking(window))
        for unit in peaks.add(report)["relu"].tolist():
            warned.setdefault(unit, window)
        if dead is None and report["relu"].dead[0]:
            dead = window
    assert warned == {0: 6}  # and no other unit
    assert dead == 12


def test_the_forecast_is_right():
    peaks = Peaks()
    for window in range(9):
        peaks.add(judged(sinking(window)))
    assert forecast(peaks["relu"]).windows_left[0] == pytest.approx(12 - 8, abs=0.1)
    assert forecast(peaks["relu"]).windows_left[1:].isinf().all()


def test_the_dead_are_no_longer_at_risk():
    peaks = Peaks()
    for window in range(20):
        at_risk = peaks.add(judged(sinking(window)))
    assert not len(at_risk["relu"])


@pytest.mark.parametrize("windows", [6, 7, 8])
def test_only_suspects_are_forecast_and_nobody_is_left_out(windows):
    generator, kept, peaks = torch.Generator().manual_seed(windows), [], Peaks(windows)
    site, walk, warned = judged(sinking(0, units=600)).sites[0], torch.full((600,), 4.0), 0
    for _ in range(40):
        walk = walk + torch.randn(600, generator=generator)
        peak = walk.double()
        peak[::3] = peak[::3].round()  # ties
        peak[torch.rand(600, generator=generator) < 0.02] = math.nan
        peak[torch.rand(600, generator=generator) < 0.02] = math.inf
        kept = [*kept, peak.float()][-windows:]
        found = peaks.add(LivenessReport((replace(site, peak=peak),)))["relu"]
        assert torch.equal(found, forecast(torch.stack(kept)).at_risk.nonzero().flatten())
        assert torch.equal(peaks["relu"].nan_to_num(9.9), torch.stack(kept).nan_to_num(9.9))
        warned += len(found)
    assert warned > 100


def test_memory_is_bounded():
    peaks = Peaks(windows=7)
    for window in range(30):
        peaks.add(judged(sinking(window)))
    (ring,) = peaks.values()
    assert ring.shape == (7, 8)


def test_saved_and_loaded_goes_on(tmp_path):
    through, first = Peaks(), Peaks()
    for window in range(4):
        report = judged(sinking(window))
        through.add(report)
        first.add(report)
    torch.save(dict(first), tmp_path / "state.pt")
    second = Peaks()
    second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    for window in range(4, 10):
        report = judged(sinking(window))
        assert torch.equal(through.add(report)["relu"], second.add(report)["relu"])
    shorter = Peaks(windows=6)
    shorter.restore(second)
    assert len(shorter["relu"]) == 6


def test_a_site_that_did_not_run_waits_and_another_width_starts_anew():
    peaks, report = Peaks(), judged(sinking(0))
    peaks.add(report)
    assert not peaks.add(LivenessReport((replace(report.sites[0], samples=0),)))
    assert len(peaks["relu"]) == 1
    peaks.add(judged(sinking(1, units=5)))
    assert peaks["relu"].shape == (1, 5)


def test_smooth_sites_never_sink():
    report = find_dead_units(nn.Sequential(nn.Linear(3, 4), nn.GELU()), [torch.rand(300, 3)], include=["gelu"])
    assert not Peaks().add(report)


def test_the_fraction_counts_what_is_trained():
    site = judged(sinking(0)).sites[0]
    report = LivenessReport((site, replace(site, name="teacher", trainable=False), replace(site, name="new")))
    at_risk = torch.arange(2)
    assert at_risk_fraction(report, {"relu": at_risk, "teacher": at_risk}) == 2 / 16


def test_too_few_windows_are_refused():
    with pytest.raises(ValueError, match=r"`Peaks\(windows=3\)`: too few .* Try `windows=8`"):
        Peaks(windows=3)
