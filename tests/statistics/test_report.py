"""What users see of a verdict."""

import copy
import json
import pickle
import sys
from dataclasses import replace

import pytest
import torch

from lightning_deadrelu.statistics import LivenessReport, Rules, UnitHistory, UnitLiveness, judge


def two_sites(trainable=(True, True)) -> LivenessReport:
    metric = UnitLiveness({"a": 2, "b": 3}, rules=Rules(1))
    metric.update(torch.tensor([[1.0, -1.0]]), site=0)
    metric.update(torch.tensor([[-1.0, -1.0, 2.0], [-1.0, -1.0, 1.0]]), site=1)
    return judge(metric.totals().to_host(), UnitHistory.empty(), metric.layout, Rules(1), trainable=trainable, step=7)[
        0
    ]


def test_report_counts_the_sites_that_are_trained():
    report = two_sites()
    assert (report.units, report.dead_units, report.dead_fraction, report.step) == (5, 3, 0.6, 7)
    frozen = two_sites(trainable=(True, False))
    assert (frozen.units, frozen.dead_units, frozen.dead_fraction) == (2, 1, 0.5)
    assert frozen["b"].dead_fraction == pytest.approx(2 / 3)


def test_a_unit_is_used_that_fires_in_any_observation():
    metric = UnitLiveness({"relu": 4}, window=3)
    for metric.observation, x in enumerate(torch.tensor([[1.0, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, 1, -1]])):
        metric.update(x[None])
    assert metric.report()["relu"].used_fraction == 0.75


def test_report_names_its_sites_when_asked_for_another():
    with pytest.raises(KeyError, match=r"'c' is no site of this report. Sites: a, b"):
        two_sites()["c"]


def test_report_is_frozen_and_survives_json():
    report = two_sites()
    with pytest.raises(AttributeError):
        report.step = 3
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["dead_units"] == 3
    assert plain["sites"][1]["dead"] == [0, 1]
    assert plain["sites"][1]["age"] == [2, 2, 0]


def test_rates_are_shares_of_all_elements_and_go_along_with_copies():
    metric = UnitLiveness({"relu": 2})
    metric.update(torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, -1.0], [1.0, -1.0]]))
    site = metric.report()["relu"]
    metric.reset()
    for one in (pickle.loads(pickle.dumps(site)), copy.deepcopy(site), replace(site, name="other"), site):
        assert one.firing_rate.tolist() == one.usual_rate.tolist() == [0.75, 0.0]
        assert one.firing_rate.dtype == one.usual_rate.dtype == torch.float64
    assert site.firing_rate is site.firing_rate
    assert not hasattr(site, "rate")


def test_rates_do_not_depend_on_the_default_precision():
    metric = UnitLiveness({"relu": 1})
    metric.update(torch.tensor([[1.0]]).expand(100_000, 1))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        site = metric.report()["relu"]
        assert (site.usual_rate.item(), site.firing_rate.item()) == (1.0, 1.0)
    finally:
        torch.set_default_dtype(before)


def test_reprs_are_short():
    report = two_sites()
    assert repr(report) == "LivenessReport(step=7, 2 sites, 3 of 5 units dead)"
    assert repr(report["b"]) == "SiteReport('b', relu, 3 units, 2 dead, 1 always_on, 2 dormant)"
    assert repr(LivenessReport(())) == "LivenessReport(step=0, 0 sites, 0 of 0 units dead)"


def test_a_data_frame_has_a_row_for_each_unit():
    pytest.importorskip("pandas")
    report = two_sites()
    frame = report.to_pandas()
    assert list(zip(frame["site"], frame["unit"], strict=True)) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)]
    for site in report.sites:
        rows = frame[frame["site"] == site.name]
        for name in ("dead", "peak", "age", "firing_rate", "usual_rate", "rate_bound"):
            assert rows[name].tolist() == getattr(site, name).tolist(), name
    assert len(LivenessReport(()).to_pandas()) == 0


def test_without_pandas_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pandas is not installed. Try `pip install pandas`"):
        two_sites().to_pandas()
